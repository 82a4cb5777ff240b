"""One distillation loss of the objective: what it reads, its weight, its place in the vector of term losses."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from pathways.registry import UserError
from pathways.taps import LOGITS

Moving = float | Callable[[int], float]
"""A number, or a process: step → number."""


class Term(nn.Module):
    """A distillation loss, the taps it reads, and its weight.

    Args:
        loss: called as ``loss(student, teacher, target=..., index=...)`` with one tensor per tap (a bare tensor where
            there is one tap), gives a scalar.
        key: name of the term in schedules, logs and plots.
        student_taps, teacher_taps: what it reads; ``logits`` is the model's output.
        weight: constant weight, a process ``step → weight``, or None for a weight that a schedule or a search decides
            (1 until one does).
        level: (i, j, k) where the term belongs to one teacher and one student level, for schedules of another pair.
        per_level: weight the loss's ``levels`` separately: the term stands for L entries of the vector of losses,
            ``<key>.1`` to ``<key>.L``, one per teacher level.
        reduction: how a schedule of more terms is summed up for this one, see `Schedule.reduce`; None where it has a
            column of its own.
        scalars: processes of other scalars of the loss, attribute → ``step → value``, for instance its temperature;
            ``level_weights.1`` is an item of a list.
        pretrain: compute the loss of the recipe's first stage, `DistillationLoss.pretrain`, in place of the loss.
        student_last, teacher_last: taps whose maps are (N, H, W, C); the loss is given (N, C, H, W).
        positions: stored sample number → place in what the loss keeps per sample, (largest number + 1,) int64; None
            hands the numbers on as they are.
        learned: scalars of the loss that a search moves and a schedule says, named as in ``scalars``.

    What a loss declares on its class (`distpro.losses.base.DistillationLoss`) is read from here: `rows`, `by_position`,
    `masked`, `deploys`.
    """

    transform_name = ""

    def __init__(
        self,
        loss: nn.Module,
        key: str,
        student_taps: Sequence[str] = (LOGITS,),
        teacher_taps: Sequence[str] = (LOGITS,),
        weight: Moving | None = None,
        level: tuple[int, int, int] | None = None,
        per_level: bool = False,
        reduction: str | None = None,
        scalars: Mapping[str, Callable[[int], float]] | None = None,
        pretrain: bool = False,
        positions: Tensor | None = None,
        student_last: Sequence[str] = (),
        teacher_last: Sequence[str] = (),
        learned: Sequence[str] = (),
    ):
        super().__init__()
        self.loss = loss
        self.key = key
        self.student_taps, self.teacher_taps = tuple(student_taps), tuple(teacher_taps)
        self.student_last, self.teacher_last = tuple(student_last), tuple(teacher_last)
        self.weight = None if weight is None else check_moving_number(f"term '{key}': weight", weight)
        self.level = level
        self.per_level = per_level
        self.reduction = reduction
        self.scalars = dict(scalars or {})
        self.learned = tuple(learned)
        self.pretrain = pretrain
        self.rows: str = getattr(loss, "rows", "first")
        self.by_position = bool(getattr(loss, "by_position", False)) and not per_level
        self.masked = bool(getattr(loss, "masked", False))
        self.deploys = bool(getattr(loss, "deploys", False))
        called = "levels" if per_level else "pretrain" if pretrain else "forward"
        _check_call(loss, key, called, ("target", "index", *(("mask",) if self.masked else ())))
        self.register_buffer("positions", positions, persistent=False)
        if pretrain and getattr(loss, "pretrain_reads", "both") == "teacher":
            self.student_taps = ()

    def at(self, step: int) -> None:
        """Give the loss's scalars the values of a training step."""
        for path, process in self.scalars.items():
            self.move(path, process(step))

    def move(self, path: str, value: float | Tensor) -> None:
        """Give one of the loss's scalars a value, or a tensor () where its derivative is asked for; ``level_weights.1`` is an
        item of a list."""
        name, _, item = path.partition(".")
        if item:
            values = list(getattr(self.loss, name))
            values[int(item)] = value
            setattr(self.loss, name, values)
        else:
            setattr(self.loss, name, value)

    def forward(
        self,
        student: Any,
        teacher: Any,
        target: Tensor | None = None,
        index: Tensor | None = None,
        mask: Tensor | list[Tensor | None] | None = None,
    ) -> Tensor:
        """Scalar loss, or the losses (L,) of a ``per_level`` term. ``mask``: see `DistillationLoss.masked`."""
        compare = self.loss.levels if self.per_level else self.loss.pretrain if self.pretrain else self.loss
        if self.positions is not None and index is not None:
            index = self.positions[index]  # type: ignore[index]
        more = {"mask": mask} if self.masked else {}
        return compare(student, teacher, target=target, index=index, **more)  # type: ignore[operator]


_DEFAULTS: dict[str, Any] = {
    "level": None,
    "transform_name": "",
    "weight": None,
    "per_level": False,
    "reduction": None,
    "learned": (),
    "rows": "first",
    "by_position": False,
    "masked": False,
    "deploys": False,
}


def check_moving_number(what: str, value: Any) -> Any:
    """A constant weight or a process, as it is. Raises UserError for a constant that is no finite number."""
    if callable(value):
        return value
    if isinstance(value, Tensor):
        real = value.dtype is not torch.bool and not value.is_complex()
        fits = real and value.numel() == 1 and bool(value.isfinite().all())
    else:
        fits = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not fits:
        raise UserError(f"{what}: expected a finite number or step → number, found {value!r}")
    return value


def at_step(what: str, value: Any, step: int) -> Any:
    """A constant as it is, or a process at a step. Raises UserError where a process gives no finite number."""
    if not callable(value):
        return value
    found = value(step)
    if not isinstance(found, (Real, Tensor)) or not math.isfinite(found):
        raise UserError(f"{what}: expected a finite number, found {found!r} at step {step}")
    return found


def as_term(module: nn.Module) -> nn.Module:
    """The module itself, with the attributes of a term that it does not have at their defaults: a pathway, a `Term`, or
    somebody's own module with ``key``, ``student_taps`` and ``teacher_taps``. Raises UserError for any other."""
    for name in ("key", "student_taps", "teacher_taps"):
        if not hasattr(module, name):
            raise UserError(f"objective: {type(module).__name__} is not a term: it has no '{name}'")
    for name, default in _DEFAULTS.items():
        if not hasattr(module, name):
            setattr(module, name, default)
    return module


def losses_in(value: Any, key: str, count: int) -> list[Tensor]:
    """The ``count`` losses that a term gave: a scalar, or a vector of them. Raises UserError for anything else."""
    if not isinstance(value, Tensor):
        raise UserError(f"term '{key}' gave {value!r}, expected a tensor of one number")
    found = list(value.unbind()) if value.dim() else [value]
    if len(found) != count:
        raise UserError(f"term '{key}' gives {len(found)} losses for {count} teacher taps; weight it whole")
    return found


def _check_call(loss: Any, key: str, part: str, names: Sequence[str]) -> None:
    """Raise UserError for a loss whose method ``part`` cannot be called with two tensors and these arguments by name."""
    function = getattr(loss, part, loss)
    try:
        takes = inspect.signature(function)
    except (TypeError, ValueError):  # it does not say
        return
    try:
        takes.bind(None, None, **dict.fromkeys(names))
    except TypeError as error:
        called = f"{part}(student, teacher, {', '.join(f'{name}=...' for name in names)})"
        own = f"{type(loss).__name__}.{part}({', '.join(takes.parameters)})"
        raise UserError(f"term '{key}': {own} is called as {called}: {error}") from None


@dataclass(frozen=True)
class Entry:
    """One entry of the vector of term losses: what a schedule's column has to fit."""

    key: str
    level: tuple[int, int, int] | None = None
    transform_name: str = ""


def entries_of(term: Any) -> list[Entry]:
    """The entries that a term adds to the vector of losses: one, or one per teacher level."""
    if getattr(term, "per_level", False):
        return [Entry(f"{term.key}.{i}", (i, 0, 0)) for i in range(1, len(term.teacher_taps) + 1)]
    return [Entry(term.key, getattr(term, "level", None), getattr(term, "transform_name", ""))]


def device_of(student: nn.Module) -> torch.device:
    """Where the student is. Raises UserError for one without parameters."""
    parameter = next(student.parameters(), None)
    if parameter is None:
        raise UserError("objective: the student has no parameters: there is nothing to train")
    return parameter.device


def trained_of(modules: Sequence[nn.Module]) -> list[list[nn.Parameter]]:
    """The parameters of each module that are trained; those that an earlier one has too are that one's alone."""
    seen: set[nn.Parameter] = set()
    groups = []
    for module in modules:
        groups.append([p for p in module.parameters() if p.requires_grad and p not in seen])
        seen.update(groups[-1])
    return groups
