"""From a config to the terms of the objective: pathways and losses, with what each of them has to know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from distpro.build.models import Pair, needs_teacher
from distpro.build.reading import norms_before
from distpro.config.schema import Config, TermConfig
from distpro.losses import LOSSES, DistillationLoss, build_loss
from distpro.objective import Term
from distpro.process import Clock, is_process, learned_of, parse_process, reduction_of
from distpro.term import device_of
from distpro.train.state import seed_random
from pathways import build_pathways, connect
from pathways.registry import UserError


def build_terms(
    config: Config, pair: Pair, data: Any = None, train: Any = None, clock: Clock | None = None
) -> list[nn.Module]:
    """Pathways and other terms of the config, new parameters initialised from the seed (but not from the student's).

    Args:
        data, train: the data set and its training part, of which losses may have to know something; None where there
            are none.
        clock: the training's length, for weights and scalars that move.

    Raises UserError, naming the term, for whatever a loss refuses.
    """
    terms: list[nn.Module] = []
    if not needs_teacher(config):
        return terms
    seed_random(config.seed + 1)
    if config.pathways is not None:
        if pair.teacher is None:
            raise UserError("pathways need a teacher")
        space = config.pathways
        theirs = pair.teacher_reading(space.teacher).taps(["stages"], before_relu=True)
        for pathway in build_pathways(
            pair.teacher,
            pair.student,
            pair.call,
            theirs,
            pair.student_taps,
            space.connect,
            space.transforms,
            space.distance,
            teacher_shapes=pair.layouts("teacher", theirs),
            student_shapes=pair.layouts("student", pair.student_taps),
        ):
            pathway.weight = space.weight  # type: ignore[assignment]
            terms.append(pathway)
    facts = _Facts(config, pair, data, train)
    for n, term in enumerate(config.terms):
        try:
            terms += _build_term(term, pair, facts, clock or Clock(1))
        except UserError as error:
            raise UserError(f"terms.{n} ({term.loss}): {error}") from None
    return terms


def _build_term(config: TermConfig, pair: Pair, facts: _Facts, clock: Clock) -> list[nn.Module]:
    kind: type[DistillationLoss] = LOSSES[config.loss]  # type: ignore[assignment]
    assert pair.student_reading is not None
    if not getattr(pair.task, "exclusive", True) and (kind.compares_classes or kind.needs_target):
        raise UserError(
            "compares probabilities of classes of which one is right, or reads a label, and the task has no such classes: take loss l1, "
            "which compares responses as numbers, or one of features"
        )
    student_taps = config.student_taps or pair.student_reading.taps(kind.taps, kind.before_relu == "both")
    logits_only = kind.taps == ("logits",) and config.teacher is None
    if pair.teacher is None:
        teacher_taps = []
    elif config.teacher_taps:
        named = config.teacher is not None or len(pair.teachers) == 1
        teacher_taps = pair.teacher_reading(config.teacher).own(config.teacher_taps) if named else config.teacher_taps
    elif logits_only:
        teacher_taps = ["logits"]  # of several teachers: what they say together
    else:
        teacher_taps = pair.teacher_reading(config.teacher).taps(kind.taps, kind.before_relu != "neither")
    student, teacher = pair.layouts("student", student_taps), pair.layouts("teacher", teacher_taps)
    params, moving, learned = split_processes(config.params, clock)
    check_moving(config.loss, kind, [*moving, *learned])
    key = config.key or (config.loss if config.teacher is None else f"{config.loss}@{config.teacher}")
    groups: list[tuple[str, list[str], list[str], tuple[int, int, int] | None]]
    if config.connect is None:
        groups = [(key, student_taps, teacher_taps, None)]
    else:
        groups = [
            (f"{key}:{teacher_taps[i]}<-{student_taps[j]}", [student_taps[j]], [teacher_taps[i]], (i + 1, j + 1, 0))
            for i, j in connect(config.connect, teacher_taps, student_taps)
        ]
    reduction = reduction_of(config.weight)
    terms: list[nn.Module] = []
    for name, ours, theirs, level in groups:
        needs = {need: facts.give(need, theirs, config.teacher) for need in kind.needs if need not in params}
        loss = build_loss(
            config.loss,
            [student[t].shape for t in ours],
            [teacher[t].shape for t in theirs] if pair.teacher is not None else [student[t].shape for t in ours],
            **params,
            **{need: value for need, value in needs.items() if value is not None},
        ).to(device_of(pair.student))
        padded = getattr(pair.task, "tokens", None) is not None and any(len(student[t].shape) == 2 for t in ours)
        if padded and not loss.masked and any(True for _ in loss.parameters()):
            raise UserError(
                "its layers are made for one number of tokens, but texts have any: name taps of one size (an embedding)"
            )
        if not getattr(loss, "uses_teacher", True):
            theirs = []
        elif pair.teacher is None:
            raise UserError("the config has no teacher")
        if config.pretrain and not loss.pretrain_reads:
            raise UserError("has no stage before its own: pretrain is for losses that list two stages")
        per_level = reduction == "teacher_level" and level is None
        weight = weight_of(config.weight, clock)
        positions = facts.positions() if loss.needs_index else None
        last = [[t for t in taps if side[t].channels_last] for taps, side in ((ours, student), (theirs, teacher))]
        term = Term(
            loss, name, ours, theirs, weight, level, per_level, reduction, moving, config.pretrain, positions, *last
        )
        term.learned = tuple(path for own in learned for path in _each(loss, own))
        if level is not None:  # of two losses at one place, a schedule of another pair has to know which is which
            term.transform_name = key
        terms.append(term)
    return terms


def weight_of(spec: Any, clock: Clock) -> float | Callable[[int], float] | None:
    """A config's weight as a term takes it: a number, a process, or None for one that is searched or replayed."""
    if isinstance(spec, str) or reduction_of(spec) is not None:
        return None
    return parse_process(spec).bind(clock) if isinstance(spec, Mapping) else float(spec)


def split_processes(
    params: Mapping[str, Any], clock: Clock
) -> tuple[dict[str, Any], dict[str, Callable[[int], float]], list[str]]:
    """A loss's parameters at the first step (without those whose default is it), those that move, ``name`` or
    ``name.item`` → step → value, and the names of those that are learned."""
    fixed: dict[str, Any] = {}
    moving: dict[str, Callable[[int], float]] = {}
    names: list[str] = []
    for name, value in params.items():
        whole = learned_of(value)
        if whole is not None:
            names.append(name)
            fixed |= {} if whole.initial is None else {name: whole.initial}
            continue
        listed, started = isinstance(value, list), []
        for n, item in enumerate(value if listed else [value]):
            path, one = f"{name}.{n}" if listed else name, learned_of(item)
            if one is not None:
                if not isinstance(one.initial, (int, float)):
                    raise UserError(
                        f"parameter '{name}': an item that is learned says its start, {{learned: {{initial: 1}}}}"
                    )
                names.append(path)
                item = one.initial
            if is_process(item):
                moving[path] = parse_process(item).bind(clock)
                item = moving[path](0)
            started.append(item)
        fixed[name] = started if listed else started[0]
    return fixed, moving, names


def check_moving(name: str, kind: type[DistillationLoss], paths: Iterable[str]) -> None:
    """Raise UserError where one of these parameters of a loss is none that may move."""
    for path in paths:
        scalar = path.partition(".")[0]
        if scalar not in kind.scalars:
            raise UserError(
                f"parameter '{scalar}' of loss '{name}' cannot move (allowed: {', '.join(kind.scalars) or 'none'})"
            )


def _each(loss: DistillationLoss, path: str) -> list[str]:
    """The path of a scalar, or those of its items where it is a list."""
    value = getattr(loss, path, None)
    return [f"{path}.{n}" for n in range(len(value))] if isinstance(value, (list, tuple)) else [path]


def attention_heads(model: nn.Module | None, name: str | None = None) -> int | None:
    """The attention heads that a model's config states; of several teachers those of the one called ``name``."""
    member = getattr(model, name) if name is not None and hasattr(model, name) else model
    config = getattr(getattr(member, "model", member), "config", None) or getattr(member, "config", None)
    return getattr(config, "num_attention_heads", None)


class _Facts:
    """What a loss may have to know and no config should have to say, by the names in `DistillationLoss.needs`."""

    def __init__(self, config: Config, pair: Pair, data: Any, train: Any):
        self.config, self.pair, self.data, self.train = config, pair, data, train

    def give(self, need: str, teacher_taps: list[str], teacher: str | None) -> Any:
        """The value of a fact; None where it is not known."""
        return getattr(self, f"_{need}")(teacher_taps, teacher)

    def positions(self) -> torch.Tensor | None:
        """Stored sample number → position in the training set, for losses that keep something per sample."""
        index = getattr(self.train, "index", None)
        if index is None:
            return None
        positions = torch.full((int(index.max()) + 1,), -1, dtype=torch.int64)
        positions[index] = torch.arange(len(index))
        return positions

    def _num_classes(self, teacher_taps: list[str], teacher: str | None) -> int | None:
        return None if self.data is None else self.data.num_classes

    def _n_data(self, teacher_taps: list[str], teacher: str | None) -> int:
        return len(self.train) if self.train is not None else self.config.data.samples or self.pair.example.samples

    def _labels(self, teacher_taps: list[str], teacher: str | None) -> Any:
        labels = getattr(self.train, "labels", None)
        return labels if isinstance(labels, torch.Tensor) and labels.dim() == 1 else None

    def _batch_size(self, teacher_taps: list[str], teacher: str | None) -> int:
        return self.config.training.batch_size

    def _classifier(self, teacher_taps: list[str], teacher: str | None) -> nn.Linear | None:
        return self.pair.teacher_reading(teacher).classifier

    def _heads(self, teacher_taps: list[str], teacher: str | None) -> list[int] | None:
        """Attention heads of student and teacher, where both are models that say them (transformers')."""
        found = [attention_heads(self.pair.student), attention_heads(self.pair.teacher, teacher)]
        return None if None in found else found  # type: ignore[return-value]

    def _norms(self, teacher_taps: list[str], teacher: str | None) -> list[nn.BatchNorm2d | None]:
        assert self.pair.teacher is not None
        return norms_before(self.pair.teacher, teacher_taps, self.pair.call)
