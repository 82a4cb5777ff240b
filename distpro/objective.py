"""Task loss plus weighted distillation terms, L(θ, t) = w_task(t) L_task(θ) + λ Σ_j w_j(t) · ℓ_j(θ), and the vector ℓ.

This is the one place where teacher and student run: precision, gradients, which parts have to be computed at all, and
whether the teacher's answer is known already, are decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distpro.process import Clock
from distpro.schedule import Schedule
from distpro.term import Entry, Moving, Term, entries_of
from pathways.registry import UserError
from pathways.space import Pathway
from pathways.tapped import Tapped
from pathways.taps import LOGITS

if TYPE_CHECKING:
    from distpro.train.cache import TeacherCache

__all__ = ["Entry", "Evaluation", "Features", "Moving", "Objective", "Term", "entries_of"]

Features = Mapping[str, Tensor]


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
        task: task loss, detached scalar; 0 where it was not computed.
        terms: the vector ℓ of unweighted term losses, (N,) float32, detached; 0 where a term was not computed.
        output: the student's output; None where nothing reads it.
        teacher: the teacher's tapped tensors.
        views: per term, the tensors it read, each its own view, whose ``.grad`` is kept by the backward pass.
    """

    loss: Tensor
    task: Tensor
    terms: Tensor
    output: Tensor | None
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
        task_weight: weight of the task loss, or a process. Where it is the number 0, the task loss is not computed.
        frozen: modules of the student that do not train: no gradients, and evaluation mode.
        prune: run only those parts of teacher and student that terms and task loss depend on.
        cache: keeps the teacher's outputs on disk. Its augmentations repeat as often as its epochs do.
        clock: the training's length; a cache has to know where epochs begin.
        compile: a backend of torch.compile (``inductor``) for teacher, student and pathways; other terms run as they are.
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
        task_weight: Moving = 1.0,
        frozen: Sequence[nn.Module] = (),
        prune: bool = True,
        cache: TeacherCache | None = None,
        clock: Clock | None = None,
        compile: str | None = None,
    ):
        super().__init__()
        self._backend = compile
        self._run, self._run_pathways = self._compiled(_run), self._compiled(_run_each)
        if teacher is None and any(term.teacher_taps for term in terms):  # type: ignore[union-attr]
            raise UserError("objective: distillation terms need a teacher")
        self.task_loss, self.precision = task_loss, precision
        self.teacher_training = teacher_training
        self.task_weight, self.prune, self.cache, self.clock = task_weight, prune, cache, clock
        self._frozen = tuple(frozen)
        for module in self._frozen:
            module.requires_grad_(False)
        self.example_input = example_input
        self._step = 0
        self._given = tuple(terms)
        self._weights_at: Callable[[int], Sequence[float]] = self._constant_weights
        self.student = Tapped(student, [], example_input)
        self.teacher: Tapped | None = None
        if teacher is not None:
            teacher.requires_grad_(False)
            self.teacher = Tapped(teacher, [], example_input, frozen=not teacher_training)
        self._set_terms(terms)
        self.train()

    def _set_terms(self, terms: Sequence[nn.Module]) -> None:
        self.terms = nn.ModuleList(terms)
        self.entries = [entry for term in terms for entry in entries_of(term)]
        if len({e.key for e in self.entries}) != len(self.entries):
            raise UserError(f"objective: two terms have one key among {', '.join(e.key for e in self.entries)}")
        ours, theirs = ([tap for t in terms for tap in getattr(t, side)] for side in ("student_taps", "teacher_taps"))
        self.student = self._retap(self.student, ours, self.computes_task or LOGITS in ours)
        if self.teacher is not None:
            self.teacher = self._retap(self.teacher, theirs, LOGITS in theirs)

    def _compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, compiled if that is wanted. It is given its modules: a copy of the objective has others."""
        if self._backend is None:
            return function
        return torch.compile(function, backend=self._backend, dynamic=False)

    def _retap(self, tapped: Tapped, names: Sequence[str], output: bool) -> Tapped:
        tapped.remove()
        inner = [n for n in dict.fromkeys(names) if n != LOGITS]
        frozen = tapped is self.teacher and not self.teacher_training
        return Tapped(tapped.model, inner, self.example_input, output=output or not self.prune, frozen=frozen)

    @property
    def computes_task(self) -> bool:
        """Whether the task loss is computed at all."""
        return self.task_weight != 0

    @property
    def keys(self) -> list[str]:
        """Names of the entries of the vector of term losses."""
        return [entry.key for entry in self.entries]

    def train(self, mode: bool = True) -> Objective:
        """As of any module, but the teacher stays in evaluation mode (unless ``teacher_training``)."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.train(mode and self.teacher_training)
        for module in self._frozen:
            module.eval()
        return self

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters of the student, then of the terms: what the optimiser is to train (Section 3.1)."""
        found = [*self.student.parameters(), *self.terms.parameters()]
        return [p for p in found if p.requires_grad]

    def clip_groups(self, by: str = "all") -> list[list[nn.Parameter]]:
        """Parameters whose gradients are clipped together.

        By ``module`` the student's and each term's own (transforms, regressors) are apart: else a regressor with a
        large gradient shrinks the steps of the student and of all other terms.
        """
        if by == "all":
            return [self.trainable_parameters()]
        groups = [[p for p in module.parameters() if p.requires_grad] for module in (self.student, *self.terms)]
        return [group for group in groups if group]

    # Weights

    def at(self, step: int) -> None:
        """The training step that the next evaluation belongs to: moves the processes of the terms' scalars."""
        self._step = step
        for term in self.terms:
            if isinstance(term, Term):
                term.at(step)

    def constants_at(self, step: int) -> list[float | None]:
        """Weight of each entry that the config or the caller has fixed, a process at its step; None for the others."""
        weights: list[float | None] = []
        for term in self.terms:
            fixed: Any = getattr(term, "weight", None)
            value = None if fixed is None else float(fixed(step) if callable(fixed) else fixed)
            weights += [value] * len(entries_of(term))
        return weights

    def _constant_weights(self, step: int) -> list[float]:
        return [1.0 if weight is None else weight for weight in self.constants_at(step)]

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
        by key or level (`Schedule.columns`), reduced first for terms with a ``reduction``; its ``scales`` are factors on
        the weights. Terms whose weight is zero at every step are taken out of the objective and cost nothing.

        Args:
            threshold: τ; None drops nothing.
            scale: λ, a factor on all driven weights, or a function of the step that gives it.
            mapping: term key → schedule key, where neither rule finds a column.

        Raises UserError where schedule and terms do not fit.
        """
        stretched = schedule.interpolate(total_steps).drop(threshold)
        self._set_terms(self._given)
        driven = self._driven()
        columns: dict[str, Tensor] = {}
        for reduction in dict.fromkeys(getattr(t, "reduction", None) for t in driven):
            members = [t for t in driven if getattr(t, "reduction", None) == reduction]
            entries = [_reduced(e, reduction) for t in members for e in entries_of(t)]
            joined = {e.key: "total" for e in entries} if reduction == "total" else mapping
            fitting = (stretched.reduce(reduction) if reduction else stretched).columns(entries, joined)
            scaled = fitting.weights * fitting.scales
            columns |= {entry.key: scaled[:, n] for n, entry in enumerate(entries)}
        self.keep([t for t in self.terms if t not in driven or any(columns[e.key].any() for e in entries_of(t))])
        factor = scale if callable(scale) else lambda step: scale

        def weights_at(step: int) -> list[float]:
            row, by = min(step, total_steps - 1), factor(step)
            return [
                by * columns[e.key][row].item() if e.key in columns else c
                for e, c in zip(self.entries, self._constant_weights(step), strict=True)
            ]

        self._weights_at = weights_at

    def follow_equal(
        self, scale: float | Callable[[int], float] = 1.0, scales: Mapping[str, float] | None = None
    ) -> None:
        """Weight every entry without a constant weight by 1/L, L their number (control of Table 1), times its entry
        in ``scales`` if it has one."""
        driven = [e.key for t in self._driven() for e in entries_of(t)]
        each = {key: (scales or {}).get(key, 1.0) / len(driven) for key in driven}
        factor = scale if callable(scale) else lambda step: scale
        self._weights_at = lambda step: [
            factor(step) * each[e.key] if e.key in each else c
            for e, c in zip(self.entries, self._constant_weights(step), strict=True)
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

    def teach(self, x: Tensor, index: Tensor | None = None) -> Features:
        """The teacher's tapped tensors for a batch, without gradients: computed, or read from the cache if there is
        one and ``index`` says which samples these are."""
        if self.teacher is None:
            return {}
        epoch = int(self._step // self.clock.steps_per_epoch) if self.clock is not None else 0
        known = self.cache.read(index, epoch) if self.cache is not None and index is not None else None
        if known is not None:
            return known
        with torch.no_grad(), self.autocast():
            output, features = self._run(self.teacher, x)
        taught = features if output is None else {**features, LOGITS: output}
        if self.cache is not None and index is not None:
            self.cache.write(index, epoch, {name: taught[name] for name in self.cache.taps})
        return taught

    def study(self, x: Tensor, autocast: bool = True) -> tuple[Any, dict[str, Tensor]]:
        """The student's output (None where it is pruned) and tapped tensors for a batch."""
        with self.autocast(autocast):
            output, features = self._run(self.student, x)
        return output, features if output is None else {**features, LOGITS: output}

    def predict(self, x: Tensor) -> Tensor:
        """What the student that is deployed says: its own output, or what a term's ``predict`` makes of its taps
        (SimKD's student answers through the teacher's classifier)."""
        term = next((t for t in self.terms if hasattr(getattr(t, "loss", None), "predict")), None)
        with self.autocast():
            if term is None:
                return self.student.model(x)
            _, features = self.student(x)
            return term.loss.predict(_unwrap([features[tap] for tap in term.student_taps]))  # type: ignore[operator,union-attr]

    def task_loss_of(self, output: Tensor, target: Tensor) -> Tensor:
        """Task loss in full precision, of the plain images only where each is followed by its rotations."""
        output = output[:: max(len(output) // len(target), 1)]
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
        pathways: list[tuple[int, Pathway, Any, Any]] = []  # place, pathway, what it compares
        with self.autocast(autocast):
            for term in self.terms:
                count = len(entries_of(term))
                if active is not None and not any(active[len(losses) : len(losses) + count]):
                    losses += [None] * count
                    if views is not None:
                        views.append({})
                    continue
                every = 1 if target is None else _rows_per_sample(term, student or teacher, target)
                read = {tap: student[tap] for tap in term.student_taps}  # type: ignore[union-attr]
                if views is not None:
                    read = {tap: f.view_as(f) for tap, f in read.items()}
                    for view in read.values():
                        if view.requires_grad:
                            view.retain_grad()
                    views.append(read)
                ours = _unwrap([_every(read[tap], every) for tap in term.student_taps])  # type: ignore[union-attr]
                theirs = _unwrap([_every(teacher[tap], every) for tap in term.teacher_taps])  # type: ignore[union-attr]
                if isinstance(term, Pathway):
                    pathways.append((len(losses), term, ours, theirs))
                    losses.append(None)
                    continue
                value = term(ours, theirs, target=target, index=index)
                found = list(value.unbind()) if value.dim() else [value]
                if len(found) != count:
                    raise UserError(
                        f"term '{term.key}' gives {len(found)} losses for {count} teacher taps; weight it whole"
                    )
                losses += found
            if pathways:
                places, *parts = zip(*pathways, strict=True)
                for place, value in zip(places, self._run_pathways(*parts), strict=True):
                    losses[place] = value
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
            teacher = self.teach(x, index)
        output, features = self.study(x)
        task = (
            self.task_loss_of(output, y)
            if output is not None and self.computes_task
            else torch.zeros((), device=x.device)
        )
        loss = task * self.task_weight_at(self._step)
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

    def task_weight_at(self, step: int) -> float:
        """Weight of the task loss at a training step."""
        return self.task_weight(step) if callable(self.task_weight) else self.task_weight

    def forward(
        self, x: Tensor, y: Tensor, index: Tensor | None = None, step: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch at a training step, and its named parts: ``loss``, ``task``, and each term's unweighted loss."""
        self.at(step)
        result = self.evaluate(x, y, index, self.weights_at(step))
        parts = {"loss": result.loss.detach(), "task": result.task, **dict(zip(self.keys, result.terms, strict=True))}
        return result.loss, parts


def _run(model: nn.Module, x: Tensor) -> Any:
    return model(x)


def _run_each(pathways: Sequence[nn.Module], student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[Tensor]:
    return [pathway(ours, theirs) for pathway, ours, theirs in zip(pathways, student, teacher, strict=True)]


def _unwrap(tensors: list[Tensor]) -> Tensor | list[Tensor]:
    return tensors[0] if len(tensors) == 1 else tensors


def _rows_per_sample(term: nn.Module, features: Features, target: Tensor) -> int:
    """The stride at which a term reads a batch that holds each sample's rotations too: 1 if it reads them all."""
    wanted = getattr(getattr(term, "loss", term), "views", 1)
    given = max(len(next(iter(features.values()))) // len(target), 1)
    if wanted not in (1, given):
        raise UserError(f"term '{term.key}' reads {wanted} rows per sample, the batch has {given}")
    return given // wanted


def _every(x: Tensor, stride: int) -> Tensor:
    return x if stride == 1 else x[::stride]
