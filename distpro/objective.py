"""Task loss plus weighted distillation terms, L(θ, t) = L_task(θ) + λ Σ_j w_j(t) · ℓ_j(θ), and the vector ℓ itself.

This is the one place where teacher and student run: precision, gradients and which parts have to be computed at all
are decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distpro.schedule import Schedule
from pathways.registry import UserError
from pathways.tapped import Tapped
from pathways.taps import LOGITS

Features = Mapping[str, Tensor]


class Term(nn.Module):
    """A distillation loss, the taps it reads, and its weight.

    Args:
        loss: called as ``loss(student, teacher, target=..., index=...)`` with one tensor per tap (a bare tensor where
            there is one tap), gives a scalar.
        key: name of the term in schedules, logs and plots.
        student_taps, teacher_taps: what it reads; ``logits`` is the model's output.
        weight: constant weight, or None for a weight that a schedule or a search decides (1 until one does).
        level: (i, j, k) where the term belongs to one teacher and one student level, for schedules of another pair.
        per_level: weight the loss's ``levels`` separately: the term stands for L entries of the vector of losses,
            ``<key>.1`` to ``<key>.L``, one per teacher level.
        reduction: how a schedule of more terms is summed up for this one, see `Schedule.reduce`; None where it has a
            column of its own.
    """

    def __init__(
        self,
        loss: nn.Module,
        key: str,
        student_taps: Sequence[str] = (LOGITS,),
        teacher_taps: Sequence[str] = (LOGITS,),
        weight: float | None = None,
        level: tuple[int, int, int] | None = None,
        per_level: bool = False,
        reduction: str | None = None,
    ):
        super().__init__()
        self.loss = loss
        self.key = key
        self.student_taps, self.teacher_taps = tuple(student_taps), tuple(teacher_taps)
        self.weight = weight
        self.level = level
        self.per_level = per_level
        self.reduction = reduction

    def forward(self, student: Any, teacher: Any, target: Tensor | None = None, index: Tensor | None = None) -> Tensor:
        """Scalar loss, or the losses (L,) of a ``per_level`` term."""
        compare = self.loss.levels if self.per_level else self.loss
        return compare(student, teacher, target=target, index=index)  # type: ignore[operator]


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
    return [Entry(term.key, term.level, getattr(term, "transform_name", ""))]


def _reduced(entry: Entry, reduction: str | None) -> Entry:
    """The entry as it looks to a reduced schedule: with the levels that are left there, and without a transform."""
    sides = {"teacher_level": (0,), "student_level": (1,), "connection": (0, 1)}.get(reduction or "")
    if sides is None or entry.level is None:
        return entry
    i, j, _ = (level if side in sides else 0 for side, level in enumerate(entry.level))
    return Entry(entry.key, (i, j, 0))


@dataclass
class Evaluation:
    """One evaluation of the objective.

    Attributes:
        loss: what to differentiate, a scalar.
        task: task loss, detached scalar.
        terms: the vector ℓ of unweighted term losses, (N,) float32, detached; 0 where a term was not computed.
        output: the student's output.
        teacher: the teacher's tapped tensors.
        views: per term, the tensors it read, each its own view, whose ``.grad`` is kept by the backward pass.
    """

    loss: Tensor
    task: Tensor
    terms: Tensor
    output: Tensor
    teacher: Features = field(default_factory=dict)
    views: list[dict[str, Tensor]] = field(default_factory=list)


class Objective(nn.Module):
    """Task loss and distillation terms of one teacher-student pair.

    >>> objective = Objective(nn.Linear(4, 3), nn.Linear(4, 3), [])
    >>> loss, parts = objective(torch.zeros(2, 4), torch.tensor([0, 1]))
    >>> sorted(parts)
    ['loss', 'task']

    Args:
        teacher: any module, or None where no term needs one. It is frozen and runs in evaluation mode.
        student: any module.
        terms: pathways, `Term`s, or any module with ``key``, ``level``, ``student_taps`` and ``teacher_taps`` that is
            called as they are.
        example_input: one batch of inputs; with it, traced taps are checked against the model itself.
        task_loss: ``task_loss(output, target) → scalar``.
        precision: dtype of autocast (``torch.bfloat16``, ``torch.float16``), or None for full precision.
        teacher_training: run the teacher in training mode, as ReviewKD's published code does by mistake.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        student: nn.Module,
        terms: Sequence[nn.Module] = (),
        example_input: Tensor | None = None,
        task_loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        precision: torch.dtype | None = None,
        teacher_training: bool = False,
    ):
        super().__init__()
        if terms and teacher is None:
            raise UserError("objective: distillation terms need a teacher")
        self.task_loss, self.precision = task_loss, precision
        self.teacher_training = teacher_training
        self._example_input = example_input
        self._weights_at: Callable[[int], Sequence[float]] = self._constant_weights
        self.student = Tapped(student, [], example_input)
        self.teacher: Tapped | None = None
        if teacher is not None:
            teacher.requires_grad_(False)
            self.teacher = Tapped(teacher, [], example_input)
        self._set_terms(terms)
        self.train()

    def _set_terms(self, terms: Sequence[nn.Module]) -> None:
        self.terms = nn.ModuleList(terms)
        self.entries = [entry for term in terms for entry in entries_of(term)]
        if len({e.key for e in self.entries}) != len(self.entries):
            raise UserError(f"objective: two terms have one key among {', '.join(e.key for e in self.entries)}")
        self.student = self._retap(self.student, [tap for t in terms for tap in t.student_taps])  # type: ignore[misc,union-attr]
        if self.teacher is not None:
            self.teacher = self._retap(self.teacher, [tap for t in terms for tap in t.teacher_taps])  # type: ignore[misc,union-attr]

    def _retap(self, tapped: Tapped, names: Sequence[str]) -> Tapped:
        tapped.remove()
        return Tapped(tapped.model, [n for n in dict.fromkeys(names) if n != LOGITS], self._example_input)

    @property
    def keys(self) -> list[str]:
        """Names of the entries of the vector of term losses."""
        return [entry.key for entry in self.entries]

    def train(self, mode: bool = True) -> Objective:
        """As of any module, but the teacher stays in evaluation mode (unless ``teacher_training``)."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.train(mode and self.teacher_training)
        return self

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters of the student, then of the terms: what the optimiser is to train (Section 3.1)."""
        found = [*self.student.parameters(), *self.terms.parameters()]
        return [p for p in found if p.requires_grad]

    # Weights

    def _constant_weights(self, step: int) -> list[float]:
        weights: list[float] = []
        for term in self.terms:
            constant = getattr(term, "weight", None)
            weights += [1.0 if constant is None else float(constant)] * len(entries_of(term))  # type: ignore[arg-type]
        return weights

    def follow(
        self,
        schedule: Schedule,
        total_steps: int,
        threshold: float | None = None,
        scale: float | Callable[[int], float] = 1.0,
        mapping: Mapping[str, str] | None = None,
    ) -> None:
        """Let a schedule drive every term that has no constant weight.

        The schedule is interpolated to ``total_steps``, cleared of what the threshold drops, and matched to the terms
        by key or level (`Schedule.columns`), reduced first for terms with a ``reduction``. Terms whose weight is zero
        at every step are taken out of the objective and cost nothing.

        Args:
            threshold: τ; None drops nothing.
            scale: λ, a factor on all driven weights, or a function of the step that gives it.
            mapping: term key → schedule key, where neither rule finds a column.

        Raises UserError where schedule and terms do not fit.
        """
        stretched = schedule.interpolate(total_steps).drop(threshold)
        driven = self._driven()
        columns: dict[str, Tensor] = {}
        for reduction in dict.fromkeys(getattr(t, "reduction", None) for t in driven):
            members = [t for t in driven if getattr(t, "reduction", None) == reduction]
            entries = [_reduced(e, reduction) for t in members for e in entries_of(t)]
            joined = {e.key: "total" for e in entries} if reduction == "total" else mapping
            fitting = (stretched.reduce(reduction) if reduction else stretched).columns(entries, joined)
            columns |= {entry.key: fitting.weights[:, n] for n, entry in enumerate(entries)}
        self.keep([t for t in self.terms if t not in driven or any(columns[e.key].any() for e in entries_of(t))])
        factor = scale if callable(scale) else lambda step: scale
        constants = self._constant_weights(0)

        def weights_at(step: int) -> list[float]:
            row, by = min(step, total_steps - 1), factor(step)
            return [
                by * columns[e.key][row].item() if e.key in columns else c
                for e, c in zip(self.entries, constants, strict=True)
            ]

        self._weights_at = weights_at

    def follow_equal(self, scale: float | Callable[[int], float] = 1.0) -> None:
        """Weight every entry without a constant weight by 1/L, L their number (control of Table 1)."""
        driven = {e.key for t in self._driven() for e in entries_of(t)}
        factor = scale if callable(scale) else lambda step: scale
        constants = self._constant_weights(0)
        self._weights_at = lambda step: [
            factor(step) / len(driven) if e.key in driven else c for e, c in zip(self.entries, constants, strict=True)
        ]

    def keep(self, terms: Sequence[nn.Module]) -> None:
        """Take all but these terms out, and the taps that only the others have read."""
        self._set_terms(terms)

    def _driven(self) -> list[nn.Module]:
        return [t for t in self.terms if getattr(t, "weight", None) is None]

    def weights_at(self, step: int) -> Sequence[float]:
        """Weight of each entry at a training step."""
        return self._weights_at(step)

    # Passes

    def autocast(self, enabled: bool = True) -> torch.autocast:
        """The context in which models and terms run."""
        device = next(self.student.parameters()).device.type
        return torch.autocast(device, dtype=self.precision, enabled=enabled and self.precision is not None)

    def teach(self, x: Tensor) -> Features:
        """The teacher's tapped tensors for a batch, without gradients."""
        assert self.teacher is not None
        with torch.no_grad(), self.autocast():
            output, features = self.teacher(x)
        return {**features, LOGITS: output}

    def study(self, x: Tensor, autocast: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """The student's output and tapped tensors for a batch."""
        with self.autocast(autocast):
            output, features = self.student(x)
        return output, {**features, LOGITS: output}

    def task_loss_of(self, output: Tensor, target: Tensor) -> Tensor:
        """Task loss in full precision."""
        return self.task_loss(output.float() if output.dtype in (torch.bfloat16, torch.float16) else output, target)

    def term_losses(
        self,
        student: Features,
        teacher: Features,
        target: Tensor | None = None,
        index: Tensor | None = None,
        active: Sequence[bool] | None = None,
        views: list[dict[str, Tensor]] | None = None,
        autocast: bool = True,
    ) -> list[Tensor | None]:
        """The vector ℓ as a list of scalars, None where an entry is not ``active``.

        If ``views`` is a list, each term reads a view of its own of every tensor that needs a gradient, the view keeps
        its gradient in the backward pass, and the list receives one {tap: view} per term.
        """
        losses: list[Tensor | None] = []
        with self.autocast(autocast):
            for term in self.terms:
                count = len(entries_of(term))
                if active is not None and not any(active[len(losses) : len(losses) + count]):
                    losses += [None] * count
                    if views is not None:
                        views.append({})
                    continue
                read = {tap: student[tap] for tap in term.student_taps}  # type: ignore[union-attr]
                if views is not None:
                    read = {tap: f.view_as(f) for tap, f in read.items()}
                    for view in read.values():
                        if view.requires_grad:
                            view.retain_grad()
                    views.append(read)
                value = term(
                    _unwrap([read[tap] for tap in term.student_taps]),  # type: ignore[union-attr]
                    _unwrap([teacher[tap] for tap in term.teacher_taps]),  # type: ignore[union-attr]
                    target=target,
                    index=index,
                )
                found = list(value.unbind()) if value.dim() else [value]
                if len(found) != count:
                    raise UserError(
                        f"term '{term.key}' gives {len(found)} losses for {count} teacher taps; weight it whole"
                    )
                losses += found
        return losses

    def evaluate(
        self,
        x: Tensor,
        y: Tensor,
        index: Tensor | None = None,
        weights: Sequence[float] | Tensor = (),
        capture: bool = False,
        teacher: Features | None = None,
    ) -> Evaluation:
        """One pass of teacher, student and terms.

        Args:
            x, y, index: inputs, targets, sample numbers.
            weights: λ·w of each entry. A term whose entries are 0 in a list of numbers is not computed, and without
                any term the teacher does not run; a tensor of weights (searched ones) computes every term.
            capture: keep each term's own gradient with respect to what it reads, see `Evaluation.views`.
            teacher: the teacher's tensors for this batch, if they are known already.
        """
        active = None if isinstance(weights, Tensor) else [w != 0 for w in weights]
        needed = bool(self.entries) and (active is None or any(active))
        if needed and teacher is None:
            teacher = self.teach(x)
        output, features = self.study(x)
        loss = task = self.task_loss_of(output, y)
        views: list[dict[str, Tensor]] = [] if needed else [{} for _ in self.terms]
        values = torch.zeros(len(self.entries), device=task.device)
        if needed:
            assert teacher is not None
            losses = self.term_losses(features, teacher, y, index, active, views if capture else None)
            chosen = [n for n, value in enumerate(losses) if value is not None]
            stacked = torch.stack([losses[n].to(task.dtype) for n in chosen])  # type: ignore[union-attr]
            if isinstance(weights, Tensor):
                loss = loss + (weights * stacked).sum()
                values = stacked.detach().float()
            else:
                loss = loss + sum(weights[n] * value for n, value in zip(chosen, stacked.unbind(), strict=True))
                values[chosen] = stacked.detach().float()
        return Evaluation(loss, task.detach(), values, output, teacher or {}, views)

    def forward(
        self, x: Tensor, y: Tensor, index: Tensor | None = None, step: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch at a training step, and its named parts: ``loss``, ``task``, and each term's unweighted loss."""
        result = self.evaluate(x, y, index, self.weights_at(step))
        parts = {"loss": result.loss.detach(), "task": result.task, **dict(zip(self.keys, result.terms, strict=True))}
        return result.loss, parts


def _unwrap(tensors: list[Tensor]) -> Tensor | list[Tensor]:
    return tensors[0] if len(tensors) == 1 else tensors
