"""What a config amounts to, without running it: shapes, pathways, parameters, cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distpro import build
from distpro.batch import Batch
from distpro.build.cache import rows_per_sample
from distpro.build.device import settle_precision
from distpro.build.models import Pair
from distpro.config.reading import for_retrain
from distpro.config.schema import Config
from distpro.objective import Objective, entries_of
from distpro.report.recipe import recipe_of
from distpro.schedule import Schedule
from distpro.weights import CONTROLS, columns_of
from pathways.call import map_tensors
from pathways.layouts import Layout
from pathways.probing import untouched
from pathways.registry import UserError
from pathways.space import parse_spec

TRAINING = {"teacher": 1.0, "student": 3.0, "terms": 3.0}
"""Forward passes' worth of a plain training step; a backward pass counts two."""


@dataclass(frozen=True)
class Description:
    """Facts of a run before it starts. ``unmasked``: terms that see positions that do not count (void pixels, padding), for
    their losses take no mask. ``recipe``: see `recipe_of`. ``problems``: why a model's stages were not found, where no term
    needs them. Costs are multiply-accumulates of one forward pass of one image; ``run_macs`` counts only the parts of the models
    that a loss depends on. ``retrain_steps``: of a search's config with its ``retrain.training``. ``trials``: plain trainings that
    a search may add. ``horizon``: of a search over several steps, how many, the stretch of those of which the first is kept whole,
    and bytes of all that is kept. ``rounds``: times that a search trains like this."""

    teacher: str
    student: str
    teacher_parameters: int
    student_parameters: int
    term_parameters: int
    teacher_stages: dict[str, Layout]
    student_stages: dict[str, Layout]
    terms: list[tuple[str, Any, int, float]]
    teacher_macs: float
    student_macs: float
    run_macs: dict[str, float]
    term_macs: float
    passes: dict[str, float]
    steps: int | None
    batch_size: int
    retrain_steps: int | None = None
    cache_bytes: int | None = None
    trials: int = 0
    horizon: tuple[int, int, int] | None = None
    rounds: int = 0
    unmasked: Sequence[str] = ()
    problems: Sequence[str] = ()
    recipe: str = ""

    @property
    def teacher_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the teacher's stages."""
        return {tap: layout.shape for tap, layout in self.teacher_stages.items()}

    @property
    def student_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the student's stages."""
        return {tap: layout.shape for tap, layout in self.student_stages.items()}

    @property
    def step_macs(self) -> float:
        """Multiply-accumulates of one training step."""
        return self._macs(self.passes)

    @property
    def retrains(self) -> float | None:
        """What a search costs at most, in retrains of its config that drop no term; None where that is not known."""
        if self.steps is None or not self.retrain_steps:
            return None
        search = max(1, self.rounds) * self.step_macs + self.trials * self.trial_macs
        return self.steps * search / (self.retrain_steps * self.trial_macs)

    @property
    def trial_macs(self) -> float:
        """Multiply-accumulates of one step of a trial."""
        return self._macs(TRAINING)

    def _macs(self, passes: Mapping[str, float]) -> float:
        costs = {**self.run_macs, "terms": self.term_macs}
        return self.batch_size * sum(costs[part] * count for part, count in passes.items())


def describe(config: Config, searching: bool) -> Description:
    """Build the config's models with random weights, without data, and count.

    Raises UserError for what a run would refuse too, and if neither the config nor the name of the data set says how
    many classes there are and how large the images are.
    """
    config = settle_precision(config, searching)
    build.check_names(config)
    if searching:
        build.check_search(config)
    data, samples = build.blank_data(config)
    pair, objective = build.compose(config, data, load=False)
    if searching:
        build.check_learns(config, objective)
    elif config.retrain.schedule is not None and config.retrain.weights in CONTROLS:
        followed = [term for term in objective.terms if term.weight is None]  # type: ignore[union-attr]
        columns_of(Schedule.load(config.retrain.schedule), followed, config.retrain.mapping)
    elif config.retrain.weights == "uncertainty":
        objective.follow_uncertainty()  # refuses what cannot be
    terms = _term_costs(objective, pair.example)
    steps = retrain_steps = None
    if samples is not None:
        key, held = "training.validation_fraction", config.training.validation_fraction or 0.0
        if searching:
            retrain = for_retrain(config)
            retrain_steps = steps_of(retrain, samples, retrain.training.validation_fraction or 0.0)
            cut = getattr(data, "validation", None) is None
            key, held = "search.validation_fraction", config.search.fraction_of(samples) if cut else 0.0
        if held and round(samples * held) in (0, samples):
            raise UserError(f"{key}: {held} of {samples} samples leaves one part empty")
        steps = steps_of(config, samples, held)
    horizon = None
    if searching and steps and config.search.horizon != 1:
        horizon = build.fitting(config, steps, objective, pair.example)
    return Description(
        teacher=teacher_name(config) if pair.teacher is not None else "none",
        student=config.student.model,
        teacher_parameters=_parameters(pair.teacher),
        student_parameters=_parameters(pair.student),
        term_parameters=_parameters(objective.terms),
        teacher_stages=_stages(pair, "teacher"),
        student_stages=_stages(pair, "student"),
        terms=terms,
        teacher_macs=_macs(pair.teacher, pair) if pair.teacher is not None and objective.entries else 0.0,
        student_macs=_macs(pair.student, pair),
        run_macs={
            "teacher": _macs(objective.teacher, pair) if objective.teacher is not None else 0.0,
            "student": _macs(objective.student, pair),
        },
        term_macs=sum(cost for *_, cost in terms),
        passes=_passes(config, searching, horizon),
        steps=steps,
        retrain_steps=retrain_steps,
        batch_size=config.training.batch_size,
        trials=config.search.most_trials if searching else 0,
        horizon=horizon,
        rounds=config.search.rounds if searching else 0,
        unmasked=_unmasked(pair, objective),
        recipe=recipe_of(config, searching),
        problems=[r.problem for r in (*pair.teachers.values(), pair.student_reading) if r is not None and r.problem],
        cache_bytes=_cache_bytes(config, objective, pair, samples) if config.cache and samples else None,
    )


def steps_of(config: Config, samples: int, held: float) -> int:
    """Steps of a training of the part of ``samples`` that is not held out. Raises UserError where a step is longer than an epoch."""
    training, count = config.training, samples - round(samples * held)
    size = training.batch_size
    build.check_accumulate(config, count // size if training.drop_last else -(-count // size))
    batch = size * training.accumulate
    steps = training.epochs * (count // batch if training.drop_last else -(-count // batch))
    return min(steps, training.max_steps or steps)


def _stages(pair: Pair, side: str) -> dict[str, Layout]:
    """One side's stages; none where none were found, which matters only to terms that read them."""
    readings = pair.teachers.values() if side == "teacher" else [pair.student_reading]
    if any(reading is None or reading.problem for reading in readings):
        return {}
    return pair.layouts(side, pair.teacher_taps if side == "teacher" else pair.student_taps)


def _unmasked(pair: Pair, objective: Objective) -> list[str]:
    if objective.task.labels(pair.example)[1] is None:
        return []
    return [
        str(term.key)
        for term in objective.terms
        if not (term.by_position or term.masked or getattr(getattr(term, "loss", None), "needs_target", False))
    ]


def _cache_bytes(config: Config, objective: Objective, pair: Pair, samples: int) -> int:
    """Size of the full teacher cache, without its few bytes of checksums."""
    taught = objective.run_teacher(pair.example) if objective.entries else {}
    read = {tap for term in objective.terms for tap in term.teacher_taps}  # type: ignore[union-attr]
    row = sum(taught[tap][0].numel() * taught[tap].element_size() for tap in read)
    return samples * rows_per_sample(objective) * row * build.versions_of(config, config.training.epochs)


def teacher_name(config: Config) -> str:
    """The model of the teacher, or of all of them."""
    return " + ".join(member.model for member in ([config.teacher] if config.teacher else config.teachers.values()))


def _passes(config: Config, searching: bool, horizon: tuple[int, int, int] | None) -> dict[str, float]:
    """Forward passes' worth of computation per step; a backward pass counts two, a forward-mode pass three."""
    passes = dict(TRAINING)
    if searching:
        name, params = parse_spec(config.search.estimator, "search.estimator")
        name = "sweep" if name == "auto" and config.search.horizon != 1 else name
        forward_mode = {"student": 3.0 + 3.0}
        extra = {
            "auto": forward_mode,
            "forward_mode": forward_mode,
            "finite_difference": {"student": 3.0 + 2.0, "terms": 2.0},
            "unrolled": {"student": 3.0 + 6.0 * params.get("steps", 1), "terms": 6.0 * params.get("steps", 1)},
        }.get(name, {})
        for part, count in extra.items():
            passes[part] += count / config.search.every
        if (
            name == "sweep"
        ):  # in every step: forward and backward again with tangents; 2.34 trainings (tools/bench_horizon.py)
            passes["student"] += 7.0
            passes["terms"] += 7.0
            if horizon is not None and horizon[1] > 1:  # and the training of the steps between those that are kept
                passes = {part: count + TRAINING[part] for part, count in passes.items()}
        if config.search.repeats:
            passes = {
                part: count + (1 if part == "teacher" else 3) / config.search.every for part, count in passes.items()
            }
    return passes


def _parameters(module: nn.Module | None) -> int:
    return sum(p.numel() for p in module.parameters()) if module is not None else 0


@contextmanager
def _counting() -> Iterator[FlopCounterMode]:
    """Counts what runs, attention as its two matrix products: fused kernels are not in every version's books."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _macs(model: nn.Module, pair: Pair) -> float:
    with untouched(model), _counting() as counter:
        model.eval()
        pair.call.run(model)
    return counter.get_total_flops() / 2 / pair.example.samples


def _term_costs(objective: Objective, example: Batch) -> list[tuple[str, Any, int, float]]:
    """(key, level, parameters, multiply-accumulates per sample) of every term."""
    if not objective.entries:
        return []
    found: list[tuple[str, Any, int, float]] = []
    rows = rows_per_sample(objective)
    inputs = map_tensors(lambda x: x.repeat_interleave(rows, dim=0), example.inputs)  # a stand-in for the rotations
    index = torch.arange(example.samples, device=objective.device)
    batch = replace(example, inputs=inputs, index=index, rows_per_sample=rows)
    with untouched(objective):
        objective.eval()
        teacher, (_, student) = objective.run_teacher(batch), objective.run_student(batch)
        for term in objective.terms:
            only = [t is term for t in objective.terms for _ in entries_of(t)]
            with _counting() as counter:
                objective.term_losses(student, teacher, batch, only)
            macs = counter.get_total_flops() / 2 / batch.samples
            found.append((str(term.key), getattr(term, "level", None), _parameters(term), macs))
    return found


def as_text(d: Description) -> str:
    """The description for a person."""
    lines = [
        f"teacher  {d.teacher}: {d.teacher_parameters:,} parameters, {_model_cost(d.teacher_macs, d.run_macs['teacher'])}",
        *(f"    {tap}  {_shape(layout.shape)}  {layout}" for tap, layout in d.teacher_stages.items()),
        f"student  {d.student}: {d.student_parameters:,} parameters, {_model_cost(d.student_macs, d.run_macs['student'])}",
        *(f"    {tap}  {_shape(layout.shape)}  {layout}" for tap, layout in d.student_stages.items()),
        f"terms    {len(d.terms)}: {d.term_parameters:,} parameters, {_million(d.term_macs)} MMAC an image",
        *(
            f"    {key}  level {level or '-'}  {count:,} parameters  {_million(cost)} MMAC"
            for key, level, count, cost in d.terms
        ),
        f"step     batch {d.batch_size}, forward passes' worth: "
        + ", ".join(f"{part} {count:g}" for part, count in d.passes.items())
        + f" = {d.step_macs / 1e9:.1f} GMAC",
    ]
    lines += [f"recipe   {d.recipe}"] if d.recipe else []
    lines += [f"stages   {problem}" for problem in d.problems]
    if d.unmasked:
        lines.append(f"masks    void or padded positions are seen by {', '.join(d.unmasked)}: no mask is taken there")
    if d.steps is not None:
        lines.append(f"run      {d.steps:,} steps = {_macs_text(d.steps * d.step_macs)}")
    if d.horizon is not None:
        steps, stretch, size = d.horizon
        between = f", of every {stretch} the first whole; the others are trained again" if stretch > 1 else ""
        lines.append(f"horizon  {steps:,} steps at a time, {size / 1e9:.3g} GB kept of them{between}")
    if d.rounds:
        lines.append(f"rounds   {d.rounds} of these at most")
    if d.steps is not None and d.trials:
        ratio = d.trials + max(1, d.rounds) * d.step_macs / d.trial_macs
        lines.append(
            f"trials   {d.trials} trainings of as many steps at most = {_macs_text(d.trials * d.steps * d.trial_macs)}; "
            f"in all {ratio:.1f} trainings"
        )
    if d.retrains is not None:
        lines.append(f"retrain  {d.retrain_steps:,} steps, of which the search costs {d.retrains:.0%} at most")
    if d.cache_bytes is not None:
        lines.append(f"cache    {d.cache_bytes / 1e9:.3g} GB of teacher outputs when full")
    return "\n".join(lines)


def _model_cost(whole: float, run: float) -> str:
    part = f" ({_million(run)} of them run)" if _million(run) != _million(whole) else ""
    return f"{_million(whole)} MMAC an image{part}"


def _macs_text(macs: float) -> str:
    unit, size = next(((u, s) for u, s in (("PMAC", 1e15), ("TMAC", 1e12)) if macs >= s), ("GMAC", 1e9))
    return f"{macs / size:.3g} {unit}"


def _million(macs: float) -> str:
    return f"{macs / 1e6:.1f}"


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
