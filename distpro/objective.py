"""Task loss plus weighted distillation terms, L(θ, t) = w_task(t) L_task(θ) + λ Σ_j w_j(t) · ℓ_j(θ), and the vector ℓ.

This is the one place where teacher and student run: precision, gradients, which parts have to be computed at all, and
whether the teacher's answer is known already, are decided here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distpro.batch import Batch, batch_of, not_empty
from distpro.features import Cache, Features, Reader, TrainingPass, check_apart, maps_of, own_views, scalar, unwrap
from distpro.process import Clock
from distpro.schedule import Said, Schedule
from distpro.task import Task, ask
from distpro.tasks.classification import Classification
from distpro.term import Entry, Moving, Term, as_term, check_moving_number, device_of, entries_of, losses_in, trained_of
from distpro.weights import Scalars, Scale, Uncertainty, columns_of, constants_of, strength_of, weights_of
from pathways.compiled import begin_step, compiled, run, run_each
from pathways.registry import UserError
from pathways.space import Pathway
from pathways.tapped import Tapped, guarded, keep_in_evaluation
from pathways.taps import LOGITS

__all__ = ["Entry", "Features", "Moving", "Objective", "Term", "TrainingPass", "entries_of"]


class Objective(nn.Module):
    """Task loss and distillation terms of one teacher-student pair.

    >>> objective = Objective(nn.Linear(4, 3), nn.Linear(4, 3), [])
    >>> loss, parts = objective(torch.zeros(2, 4), torch.tensor([0, 1]))
    >>> sorted(parts)
    ['loss', 'task']

    Args:
        teacher: any module, or None where no term needs one. It is frozen and runs in evaluation mode.
        student: any module.
        terms: pathways, `Term`s, or modules with ``key``, ``student_taps``, ``teacher_taps`` that are called alike.
        example_input: a batch's inputs, see `Batch`; with it, traced taps are checked against the model itself.
        task: what the models do, `distpro.task.Task`; classification by default.
        task_loss: ``task_loss(output, target) → scalar`` in place of the task's own loss.
        precision: dtype of autocast (``torch.bfloat16``, ``torch.float16``), or None for full precision.
        teacher_training: run the teacher in training mode, as ReviewKD's published code does by mistake.
        task_weight: weight of the task loss, or a process. Where it is the number 0, the task loss is not computed.
        frozen: modules of the student that do not train: no gradients, and evaluation mode.
        prune: run only those parts of teacher and student that terms and task loss depend on.
        cache: keeps the teacher's outputs on disk. Its augmentations repeat as often as its epochs do.
        clock: the training's length; a cache has to know where epochs begin.
        compile: a backend of torch.compile (``inductor``) for teacher, student and pathways, or its mode ``reduce-overhead``, inductor
            with CUDA graphs; other terms run as they are.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        student: nn.Module,
        terms: Sequence[nn.Module] = (),
        example_input: Any = None,
        task_loss: Callable[[Any, Any], Tensor] | None = None,
        precision: torch.dtype | None = None,
        teacher_training: bool = False,
        task_weight: Moving = 1.0,
        frozen: Sequence[nn.Module] = (),
        prune: bool = True,
        cache: Cache | None = None,
        clock: Clock | None = None,
        compile: str | None = None,
        task: Task | None = None,
    ):
        super().__init__()
        self.backend = compile
        self._run, self._run_pathways = guarded(run, compiled(run, compile)), compiled(run_each, compile)
        self.task: Task = Classification() if task is None else task
        self.task_loss, self.precision, self.teacher_training = task_loss, precision, teacher_training
        self.task_weight = check_moving_number("objective: task_weight", task_weight)
        self.prune, self.cache, self.clock = prune, cache, clock
        self._frozen, self.example_input = tuple(frozen), example_input
        for module in self._frozen:
            module.requires_grad_(False)
        self._step = self._next_step = 0
        self._given = tuple(as_term(term) for term in terms)
        if teacher is None and any(term.teacher_taps for term in self._given):  # type: ignore[union-attr]
            raise UserError("objective: distillation terms need a teacher")
        if teacher is not None:
            check_apart(teacher, student)
            teacher.requires_grad_(False)
        self._weights_at, self._scalars = weights_of(self._given, {}), Scalars({}, ())
        self.uncertainty: Uncertainty | None = None
        self._set_terms(self._given, student, teacher)
        self.train()

    def _set_terms(self, terms: Sequence[nn.Module], student: nn.Module, teacher: nn.Module | None) -> None:
        """Let the objective be one of these terms: their entries, and the taps that they read."""
        self.terms = nn.ModuleList(terms)
        self.entries = [entry for term in terms for entry in entries_of(term)]
        if len({e.key for e in self.entries}) != len(self.entries):
            raise UserError(f"objective: two terms have one key among {', '.join(e.key for e in self.entries)}")
        ours, theirs = ([tap for t in terms for tap in getattr(t, side)] for side in ("student_taps", "teacher_taps"))
        self._reads_response = LOGITS in ours or LOGITS in theirs
        self.student = self._tapped(getattr(self, "student", None), student, ours, self.computes_task or LOGITS in ours)
        self.teacher: Tapped | None = None if teacher is None else getattr(self, "teacher", None)
        if teacher is not None:
            frozen = not self.teacher_training
            self.teacher = self._tapped(self.teacher, teacher, theirs, LOGITS in theirs, frozen)

    def _tapped(
        self, now: Tapped | None, model: nn.Module, taps: Sequence[str], output: bool, frozen: bool = False
    ) -> Tapped:
        """The model with these taps; what there is already, where it reads the same."""
        names, output = [name for name in dict.fromkeys(taps) if name != LOGITS], output or not self.prune
        if now is not None:
            if (now.names, now.output) == (names, output):
                return now
            now.remove()
        return Tapped(model, names, self.example_input, output, frozen, hold=self.backend is not None)

    @property
    def computes_task(self) -> bool:
        """Whether the task loss is computed at all."""
        return self._scalars.task is not None or self.task_weight != 0

    @property
    def keys(self) -> list[str]:
        """Names of the entries of the vector of term losses."""
        return [entry.key for entry in self.entries]

    @property
    def device(self) -> torch.device:
        """Where the student is. Raises UserError for one without parameters."""
        return device_of(self.student)

    def train(self, mode: bool = True) -> Objective:
        """As of any module, but the teacher stays in evaluation mode (unless ``teacher_training``)."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.train(mode and self.teacher_training)
        keep_in_evaluation(self._frozen)
        return self

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters of the student, of the terms, and of weights that are trained, each once: the optimiser's (Section 3.1)."""
        return [p for group in self.clip_groups("module") for p in group]

    def clip_groups(self, by: str = "all") -> list[list[nn.Parameter]]:
        """Parameters whose gradients are clipped together: all; or by ``module`` the student's and each term's own (transforms,
        regressors) apart, else a regressor with a large gradient shrinks all other steps. One of two is the first one's."""
        if by == "all":
            return [self.trainable_parameters()]
        groups = trained_of([m for m in (self.student, *self.terms, self.uncertainty) if m is not None])
        return [group for group in groups if group]

    # Weights

    def at(self, step: int) -> None:
        """The training step that the next pass belongs to: moves the terms' scalars. `forward` counts on from there."""
        self._step = self._next_step = step
        for term in self.terms:
            if isinstance(term, Term):
                term.at(step)
        self._scalars.at(step)

    def constants_at(self, step: int) -> list[float | None]:
        """Weight of each entry that the config or the caller has fixed, a process at its step; None for the others."""
        return constants_of(self.terms, step)

    def follow(
        self,
        schedule: Schedule,
        total_steps: int,
        threshold: float | None | Said = "schedule",
        scale: Scale | Said = "schedule",
        mapping: Mapping[str, str] | None = None,
        start: float | Said = "schedule",
    ) -> None:
        """Let a schedule drive every term that has no constant weight, as it says itself: λ, start, threshold, scalars.

        It is matched to the terms by key or level (`Schedule.columns`), reduced first for terms with a ``reduction``. Terms
        whose weight is zero at every step are taken out and cost nothing. `forward` counts steps from 0 again; a training
        that is resumed says `at` which step after this.

        Args:
            threshold, start: in place of the schedule's; a threshold of None drops nothing.
            scale: λ in place of the schedule's, or a function of the step. mapping: term key → schedule key.

        Raises UserError where schedule and terms do not fit.
        """
        driven = [term for term in self._given if term.weight is None]
        columns, scalars = columns_of(schedule.saying(threshold, start).played(total_steps), driven, mapping)
        self._scalars, self._next_step, self.uncertainty = self._scalars.then(scalars, self._given), 0, None
        self.keep([t for t in self._given if t not in driven or any(columns[e.key].any() for e in entries_of(t))])
        self._weights_at = weights_of(self.terms, columns, total_steps, strength_of(schedule, total_steps, scale))

    def follow_equal(self, scale: Scale = 1.0, scales: Mapping[str, float] | None = None) -> None:
        """Weight every entry without a constant weight by 1/L, L their number (control of Table 1), times its ``scales``."""
        driven = [e.key for t in self.terms if t.weight is None for e in entries_of(t)]
        columns = {key: torch.tensor([(scales or {}).get(key, 1.0) / len(driven)]).double() for key in driven}
        self._weights_at, self._scalars = weights_of(self.terms, columns, 1, scale), self._scalars.then({}, ())
        self.uncertainty = None

    def follow_uncertainty(self, scale: Scale = 1.0, scales: Mapping[str, float] | None = None) -> None:
        """Train the weights of the task and of every entry without a constant weight beside the student, see `Uncertainty`:
        call it before the optimiser is made, which should not decay ``uncertainty.parameters()``."""
        self.uncertainty = Uncertainty([*self.terms], scale, scales).to(self.device)
        self._weights_at, self._scalars = self.uncertainty.weights, self._scalars.then({}, ())

    def keep(self, terms: Sequence[nn.Module]) -> None:
        """Take all but these terms out, and the taps that only the others have read."""
        if self.uncertainty is not None:
            raise UserError("objective: keep terms before `follow_uncertainty`, which trains a number of each")
        names, weights_at = self.keys, self._weights_at
        self._set_terms(terms, self.student.model, None if self.teacher is None else self.teacher.model)
        self._weights_at = lambda step: [dict(zip(names, weights_at(step), strict=True))[key] for key in self.keys]

    def weights_at(self, step: int) -> Sequence[float] | Tensor:
        """Weight of each entry at a training step."""
        return self._weights_at(step)

    # Passes

    def autocast(self, enabled: bool = True) -> torch.autocast:
        """The context in which models and terms run."""
        return torch.autocast(self.device.type, dtype=self.precision, enabled=enabled and self.precision is not None)

    def run_teacher(self, batch: Batch) -> Features:
        """The teacher's tapped tensors for a batch, without gradients: computed, or read from the cache if there is
        one and the batch says which samples these are. ``logits`` is the task's response."""
        if self.teacher is None:
            return {}
        epoch = int(self._step // self.clock.steps_per_epoch) if self.clock is not None else 0
        known = None if self.cache is None or batch.index is None else self.cache.read(batch.index, epoch)
        if known is not None:
            return known
        keep_in_evaluation(() if self.teacher_training else (self.teacher,))
        with torch.no_grad(), self.autocast():
            output, features = self._run(self.teacher, *self.task.call(batch, self.teacher.training))
        taught = self._with_response(output, features)
        if self.cache is not None and batch.index is not None:
            self.cache.write(batch.index, epoch, {name: taught[name] for name in self.cache.taps})
        return taught

    def run_student(self, batch: Batch, autocast: bool | None = True) -> tuple[Any, Features]:
        """The student's whole output (None where it is pruned) and tapped tensors for a batch. ``autocast`` None: in
        whatever context the caller is."""
        if autocast is not None:
            with self.autocast(autocast):
                return self.run_student(batch, None)
        keep_in_evaluation(self._frozen)
        output, features = self._run(self.student, *self.task.call(batch, self.student.training))
        return output, self._with_response(output, features)

    def _with_response(self, output: Any, features: dict[str, Tensor]) -> dict[str, Tensor]:
        wanted = isinstance(output, Tensor) or (output is not None and self._reads_response)
        response = self.task.response(output) if wanted else None
        return features if response is None else {**features, LOGITS: response}

    def predict(self, batch: Batch) -> Any:
        """What the student that is deployed says: its own output, or what a term's loss makes of its taps where that
        ``deploys`` (SimKD's student answers through the teacher's classifier)."""
        term = next((t for t in self.terms if t.deploys), None)
        with self.autocast():
            if term is None:
                return ask(self.task, self.student.model, batch)
            _, features = self.run_student(batch, None)
            maps = maps_of(term, "student", term.student_taps, features)  # type: ignore[arg-type]
            return term.loss.predict(unwrap(maps))  # type: ignore[operator,union-attr]

    def task_loss_of(self, output: Any, batch: Batch, reader: Reader | None = None) -> Tensor:
        """Task loss in full precision, of each sample's first row."""
        output = (reader or Reader(self.task, batch)).plain(output)
        return scalar(self.task.loss(output, batch) if self.task_loss is None else self.task_loss(output, batch.target))

    def term_losses(
        self,
        student: Features,
        teacher: Features,
        batch: Batch,
        active: Sequence[bool] | None = None,
        views: list[dict[str, Tensor]] | None = None,
        autocast: bool = True,
        reader: Reader | None = None,
    ) -> list[Tensor | None]:
        """The vector ℓ as a list of scalars, None where an entry is not ``active``.

        If ``views`` is a list, each term reads a view of its own of every tensor that needs a gradient, the view keeps
        its gradient in the backward pass, and the list receives one {tap: view} per term.
        """
        reader = reader or Reader(self.task, batch)
        if any(term.by_position for term in self.terms):
            student, teacher = reader.with_positions(student), reader.with_positions(teacher)
        losses: list[Tensor | None] = []
        pathways: list[tuple[int, Pathway, Any, Any, Any]] = []  # place, pathway, what it compares, which tokens count
        with self.autocast(autocast):
            term: Any
            for term in self.terms:
                count = len(entries_of(term))
                if active is not None and not any(active[len(losses) : len(losses) + count]):
                    losses += [None] * count
                    if views is not None:
                        views.append({})
                    continue
                names = reader.names_of(term, term.student_taps, student)
                read = {name: student[name] for name in names}
                if views is not None:
                    read = own_views(read)
                    views.append(read)
                ours, theirs = reader.read(term, "student", read), reader.read(term, "teacher", teacher)
                if isinstance(term, Pathway):
                    mask = reader.mask_of(ours[0]) if term.masked else None
                    pathways.append((len(losses), term, ours[0], theirs[0], mask))
                    losses.append(None)
                    continue
                if term.by_position and any(len(x) == 0 for x in ours):  # no position counts: no mean to take
                    losses += [sum(x.sum() for x in ours)] * count  # type: ignore[list-item]
                    continue
                more = {"mask": unwrap([reader.mask_of(x) for x in ours or theirs])} if term.masked else {}
                target = reader.target(bool(term.by_position), student or teacher)
                value = term(unwrap(ours), unwrap(theirs), target=target, index=batch.index, **more)
                losses += losses_in(value, term.key, count)
            if pathways:
                places, *parts = zip(*pathways, strict=True)
                for place, value in zip(places, self._run_pathways(*parts), strict=True):
                    losses[place] = value
        return losses

    def training_pass(
        self,
        batch: Batch,
        weights: Sequence[float] | Tensor = (),
        capture: bool = False,
        teacher: Features | None = None,
    ) -> TrainingPass:
        """One pass of teacher, student and terms.

        Args:
            batch: what to compute on.
            weights: λ·w of each entry, or none. A term with zeros in a list of numbers is not computed, and without any
                term the teacher does not run; a tensor of weights (searched or trained) computes every term.
            capture: keep each term's own gradient with respect to what it reads, see `TrainingPass.views`.
            teacher: the teacher's tensors for this batch, if they are known.
        """
        if len(weights) not in (0, len(self.entries)):
            raise UserError(f"objective: {len(weights)} weights for {len(self.entries)} term losses")
        active, used = (None, weights.detach()) if isinstance(weights, Tensor) else ([w != 0 for w in weights], weights)
        needed = bool(self.entries) and (active is None or any(active))
        if self.computes_task and not self.student.output:  # the task's weight was 0 until now
            self._set_terms(list(self.terms), self.student.model, None if self.teacher is None else self.teacher.model)
        begin_step(self.backend)
        teacher = self.run_teacher(batch) if needed and teacher is None else teacher
        output, features = self.run_student(batch)
        reader = Reader(self.task, batch)
        computes = output is not None and self.computes_task
        task = self.task_loss_of(output, batch, reader) if computes else torch.zeros((), device=self.device)
        weight = self.task_weight_at(self._step)
        loss = task * weight if self.uncertainty is None else self.uncertainty.of_task(task, weight, self._step)
        views: list[dict[str, Tensor]] = [] if needed else [{} for _ in self.terms]
        values = torch.zeros(len(self.entries), device=task.device)
        if needed:
            assert teacher is not None
            losses = self.term_losses(features, teacher, batch, active, views if capture else None, reader=reader)
            chosen = [n for n, value in enumerate(losses) if value is not None]
            stacked = torch.stack([losses[n].to(task.dtype) for n in chosen])  # type: ignore[union-attr]
            if isinstance(weights, Tensor):
                loss = loss + (weights * stacked).sum()
                values = stacked.detach().float()
            else:
                loss = loss + sum(weights[n] * value for n, value in zip(chosen, stacked.unbind(), strict=True))
                nothing = stacked.new_zeros(())  # an index of those that count would have to be sent to the device
                values = torch.stack([nothing if x is None else x.detach().to(task.dtype) for x in losses]).float()
        return TrainingPass(loss, task.detach(), values, used, output, teacher or {}, views)

    def task_weight_at(self, step: int) -> float:
        """Weight of the task loss at a training step."""
        return self._scalars.task_weight(step, self.task_weight)

    def forward(
        self, inputs: Any, target: Any = None, index: Tensor | None = None, step: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch at a training step, and its named parts: ``loss``, ``task``, and each term's unweighted loss.

        Args:
            inputs, target, index: see `distpro.batch.Batch`, which may be the inputs; without one, one row per sample.
            step: the training step. Without one, each call with gradients in training mode is one, from 0 or `at` on.
        """
        batch = not_empty(inputs if isinstance(inputs, Batch) else batch_of(inputs, target, index))
        count = self._next_step
        self.at(count if step is None else step)
        done = self.training_pass(batch, self.weights_at(self._step))
        trains = torch.is_grad_enabled() and (self.training or self.student.model.training)
        self._next_step = self._step + 1 if trains else count
        parts = {"loss": done.loss.detach(), "task": done.task, **dict(zip(self.keys, done.terms, strict=True))}
        return done.loss, parts
