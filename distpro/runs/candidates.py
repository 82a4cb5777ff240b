"""The candidates of a tuning: what may be trained, and which numbers of it are free.

Every candidate is the config with one change: which terms there are, and what their weights are. All of them train the same
student on the same data for as long.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch

from distpro import build
from distpro.build.data import search_parts
from distpro.build.given import Given
from distpro.build.runs import clock_of
from distpro.config.reading import for_retrain
from distpro.config.schema import Config, RetrainConfig, TermConfig
from distpro.losses.usual import usual_weight
from distpro.process import Clock, learned_of
from distpro.runs.searching import schedule_meta
from distpro.schedule import Schedule
from distpro.schedule_file import LOG
from distpro.search.scales import measure_scales
from distpro.weights import CONTROLS
from pathways.registry import UserError

Training = tuple[Config, Schedule | None]
"""What a trial trains: a config, and the schedule that it plays."""


@dataclass(frozen=True)
class Candidate:
    """Something that may be trained.

    Attributes:
        name, family: what it is called, and which of `tune.families` it is of.
        centres: its free numbers, weights or λ, at the values that their ranges are around.
        at: the training with given values of them.
        stated: whether the config asks for it by name, so that it is an error where it cannot be built.
    """

    name: str
    family: str
    at: Callable[[Mapping[str, float]], Training]
    centres: Mapping[str, float] = field(default_factory=dict)
    stated: bool = True


def candidates_of(
    config: Config, space: Schedule | None, learned: Mapping[str, Config], schedule: Schedule | None
) -> list[Candidate]:
    """The candidates of a config, in the order of its families.

    Args:
        config: with the precision that all have.
        space: the terms whose weights are free, at equal weights, see `measured_space`; None where there are none.
        learned: for each control, what `distpro retrain` makes of the config and ``schedule``.

    Raises UserError for names that two candidates have.
    """
    plain = for_retrain(config)
    stated = config.tune.model_fields_set
    _refuse_learned(config)
    found: list[Candidate] = []
    for family in dict.fromkeys(config.tune.families):
        if family == "single":
            found += [_single(plain, method, "methods" in stated) for method in config.tune.methods]
        elif family == "learned" and schedule is not None:
            found += [_learned(control, of, schedule) for control, of in learned.items()]
        elif family == "learned" and "families" in stated:
            raise UserError("tune.families: learned needs a schedule: give --schedule alpha.pt")
        elif family == "equal" and space is not None:
            found.append(_equal(plain, space))
        elif family == "static" and space is not None:
            found.append(_static(plain, space))
        elif family in ("equal", "static") and "families" in stated:
            raise UserError(
                f"tune.families: {family} needs pathways or terms whose weights are left open (weight: learned)"
            )
    names = [candidate.name for candidate in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"tune.methods: two candidates are called '{twice[0]}'; a term's key: is its name")
    return found


def _refuse_learned(config: Config) -> None:
    """Raise UserError where a number is learned beside the weights of what is to be tuned."""
    families = set(config.tune.families)
    methods = [m for m in config.tune.methods if isinstance(m, TermConfig)] if "single" in families else []
    terms = config.terms if {"equal", "static"} & families else []
    asked = ["task_weight"] if families != {"learned"} and learned_of(config.task_weight) is not None else []
    asked += [f"{t.loss}: {k}" for t in [*methods, *terms] for k, v in t.params.items() if learned_of(v) is not None]
    if asked:
        raise UserError(
            f"tune: {asked[0]} is learned, which only a search does: state a number, or tune.families=[learned] with a schedule "
            "that has it"
        )


def _single(config: Config, method: str | TermConfig, stated: bool) -> Candidate:
    term = TermConfig(loss=method) if isinstance(method, str) else method
    own = isinstance(term.weight, (int, float))
    if not (own and term.weight > 0) and term.weight != "learned":  # type: ignore[operator]
        raise UserError(
            f"tune.methods: {term.key or term.loss}: weight is {term.weight}; a number above 0, which its range is around"
        )
    centre = float(term.weight) if own else usual_weight(term.loss)  # type: ignore[arg-type]

    def at(values: Mapping[str, float]) -> Training:
        terms = [term.model_copy(update={"weight": values["weight"]})]
        return config.model_copy(
            update={"pathways": None, "terms": terms, "retrain": _playing(config, "constant")}
        ), None

    return Candidate(term.key or term.loss, "single", at, {"weight": centre}, stated)


def _equal(config: Config, space: Schedule) -> Candidate:
    def at(values: Mapping[str, float]) -> Training:
        return _strong(config, values["λ"]), space

    return Candidate("equal", "equal", at, {"λ": _strength(config)})


def _static(config: Config, space: Schedule) -> Candidate:
    centres = dict(zip(space.keys, (1 / len(space.keys) for _ in space.keys), strict=True))

    def at(values: Mapping[str, float]) -> Training:
        weights = torch.tensor([[values[key] for key in space.keys]], dtype=torch.float32)
        return _strong(config, _strength(config)), replace(space, weights=weights, alpha_tilde=weights.log())

    return Candidate("static", "static", at, centres)


def _learned(control: str, config: Config, schedule: Schedule) -> Candidate:
    retrain = config.retrain.model_copy(update={"schedule": None})
    plays = config.model_copy(update={"retrain": retrain})
    return Candidate(f"learned, {control}", "learned", lambda values: (plays, schedule))


def _strength(config: Config) -> float:
    return config.training.distill_weight or 1.0  # 0 has no range around it


def _strong(config: Config, strength: float) -> Config:
    """The config with a λ, playing weights of which nothing is left out or dropped."""
    training = config.training.model_copy(update={"distill_weight": strength})
    return config.model_copy(update={"training": training, "retrain": _playing(config, "searched")})


def _playing(config: Config, weights: str) -> Any:
    update = {"weights": weights, "start": 0.0, "threshold": None, "mapping": {}, "schedule": None}
    return config.retrain.model_copy(update=update)


def identity_of(config: Config, schedule: Schedule | None, total_steps: int) -> str:
    """Of what a training of so many steps trains: a schedule whose weights do not move is the same as its own last weights."""
    parts = [config.model_copy(update={"retrain": RetrainConfig()}).model_dump_json()]
    if schedule is not None:
        how, said = config.retrain.weights, schedule.saying(config.retrain.threshold, config.retrain.start or 0.0)
        plays = said.equal() if how == "equal" else CONTROLS[how](said, config.seed)
        played = plays.played(total_steps)
        numbers = {"scales": played.scales, "weights": played.weights, **played.scalars}
        parts += [str((played.keys, played.strength, played.warmup, list(numbers)))]
        parts += [str(tensor.tolist()) for tensor in numbers.values()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def measured_space(config: Config, data: Any, given: Given) -> Schedule | None:
    """The terms whose weights the config leaves open, as a schedule of one row with equal weights 1/N, with the factors that make
    them alike in size on the search's training part; None where there are none."""
    train_part, clock = training_part(config, data)
    objective = build.build_objective(for_retrain(config), data, train_part, clock, given=_own(given))
    free = [n for n, constant in enumerate(objective.constants_at(0)) if constant is None]
    if not free:
        return None
    scales, how = torch.ones(len(objective.entries)), config.search.normalise or "gradient"
    if how != "none":
        train = build.build_loader(config, data, train_part, training=True)
        scales = measure_scales(objective, islice(train.endless(), config.search.normalise_batches), how).cpu()
    entries, equal = [objective.entries[n] for n in free], torch.full((1, len(free)), 1 / len(free))
    return Schedule(
        keys=tuple(entry.key for entry in entries),
        levels=torch.tensor([entry.level or (0, 0, 0) for entry in entries], dtype=torch.int64),
        transforms=tuple(entry.transform_name for entry in entries),
        alpha_tilde=equal.log(),
        weights=equal,
        scales=scales[free],
        steps_per_epoch=1 / config.training.epochs,  # the row stands for the whole training
        meta=schedule_meta(config, data, objective),
        reading=LOG,
    )


def training_part(config: Config, data: Any) -> tuple[Any, Clock]:
    """The part of the data that trials train on, and how long one is."""
    train_part = search_parts(config, data)[1]
    return train_part, clock_of(config, build.build_loader(config, data, train_part, training=True))


def buildable(candidates: Sequence[Candidate], data: Any, given: Given) -> tuple[list[Candidate], dict[str, str]]:
    """Those that can be trained on this pair, and why others cannot, by name. Raises UserError where one of these is stated."""
    found, why_not = [], {}
    for candidate in candidates:
        config, _ = candidate.at(candidate.centres)
        try:
            build.check_names(config)
            build.build_objective(config, data, *training_part(config, data), given=_own(given))
            found.append(candidate)
        except UserError as error:
            if candidate.stated:
                raise UserError(f"candidate '{candidate.name}': {error}") from None
            why_not[candidate.name] = str(error)
    return found, why_not


def _own(given: Given) -> Given:
    """Objects of which the student may be changed."""
    return given.copied()
