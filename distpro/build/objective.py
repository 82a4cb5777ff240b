"""From a config to the objective of its pair, its task and its terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from distpro.build.carry import Carry
from distpro.build.given import Given
from distpro.build.models import Pair, build_pair
from distpro.build.task import build_task
from distpro.build.terms import build_terms, weight_of
from distpro.config.schema import Config
from distpro.data.loading import labels_of
from distpro.objective import Objective
from distpro.process import Clock, learned_of
from pathways.registry import UserError
from pathways.taps import check_taps

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": None}
"""dtype of autocast; a run has put its own in the place of ``auto``."""


def build_objective(
    config: Config, data: Any, train: Any, clock: Clock, carry: Carry | None = None, given: Given | None = None
) -> Objective:
    """Objective of the config's pair and terms, for a training on ``train`` that lasts as ``clock`` says.

    ``carry``: what it takes over from the stage before. ``given``: what was handed over as objects.
    """
    return compose(config, data, train, clock, carry, given)[1]


def compose(
    config: Config,
    data: Any,
    train: Any = None,
    clock: Clock | None = None,
    carry: Carry | None = None,
    given: Given | None = None,
    load: bool = True,
) -> tuple[Pair, Objective]:
    """The pair and its objective, as `build_objective` makes it; without ``load`` with random weights, to be looked at."""
    taken, clock = carry or Carry(), clock or Clock(1)
    task = build_task(config, given)
    prepare: Callable[[Any], None] | None = getattr(task, "prepare", None)
    if prepare is not None and train is not None:
        prepare(labels_of(train))
    pair = build_pair(config, data, task, load, taken.student, taken.teacher, given)
    terms = build_terms(config, pair, data, train, clock)
    _check_regions(pair, terms)
    learned = learned_of(config.task_weight)
    taken.give(terms)
    objective = Objective(
        pair.teacher,
        pair.student,
        terms,
        example_input=pair.call,
        precision=PRECISIONS[config.precision],
        teacher_training=config.teacher_training,
        task_weight=weight_of(config.task_weight if learned is None else learned.initial or 1.0, clock),  # type: ignore[arg-type]
        frozen=frozen_modules(config, pair.student),
        prune=config.prune,
        clock=clock,
        compile=config.compile,
        task=task,
    )
    return pair, objective


def _check_regions(pair: Pair, terms: Any) -> None:
    """Raise UserError for taps behind the regions of torchvision's R-CNNs, which each model chooses for itself: teacher's rows and
    student's would not belong together, whatever their number."""
    teacher, student = ({} if m is None else dict(m.named_modules()) for m in (pair.teacher, pair.student))
    for term in terms:
        for known, taps in ((teacher, term.teacher_taps), (student, term.student_taps)):
            for tap in taps:
                path = tap.partition(":")[0].partition("[")[0].split(".")
                above = [known.get(".".join(path[: n + 1])) for n in range(len(path))]
                if any(type(module).__name__ == "RoIHeads" for module in above):
                    raise UserError(
                        f"{term.key}: '{tap}' lies behind the regions, of which teacher and student choose their own, so that their "
                        "rows do not belong together: take taps before them (backbone, rpn.head)"
                    )


def build_deployed(config: Config, data: Any, student: nn.Module, terms: Mapping[str, Any]) -> Objective:
    """The objective of a trained student that answers through one of its terms, without the teacher's weights.

    ``terms``: saved weights of the terms by key.
    """
    _, objective = compose(config, data, carry=Carry(student.state_dict(), terms=terms), load=False)
    return objective


def frozen_modules(config: Config, student: nn.Module) -> list[nn.Module]:
    """The student's modules that ``freeze`` names. Raises UserError for one that it does not have."""
    check_taps(student, config.freeze, config.student.model)
    return [student.get_submodule(name) for name in config.freeze]
