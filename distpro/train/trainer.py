"""The one training loop: steps, epochs, evaluation, interruption and resume. Search and retrain differ only in who
says what the weights of the terms are (`Weights`)."""

from __future__ import annotations

import copy
import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch

from distpro.batch import Batch
from distpro.features import TrainingPass
from distpro.files import save_atomically
from distpro.objective import Objective
from distpro.task import Metrics, Task
from distpro.train import distributed
from distpro.train.checkpoint import CHECKPOINT, PREVIOUS, VERSION, ModuleState, load_checkpoint_into
from distpro.train.divergence import Diverged, check_student, divergence
from distpro.train.evaluation import evaluate
from distpro.train.keeping import BESIDE, Keeper, logged
from distpro.train.progress import Progress
from distpro.train.rates import LearningRate
from distpro.train.rows import Row
from distpro.train.state import draw_apart, random_of_ranks, random_state, set_random_of_ranks, snapshot
from distpro.train.stopping import Cut, Interrupted, Stop
from distpro.train.tracking import Tracker
from distpro.weights import Weights
from pathways.registry import UserError

__all__ = ["Diverged", "Interrupted", "Trainer"]


@dataclass
class Trainer:
    """Trains the objective's student.

    Args:
        objective, task, optimizer: what is trained, its metrics, and how.
        weights: who says the weights of the terms.
        train_loader, test_loader: with ``len`` and ``epoch(epoch, start) → Batch``es.
        epochs: whole epochs; ``max_steps`` may end the training earlier.
        learning_rate: factor on the optimiser's rates.
        folder: where checkpoint and logs go; None keeps nothing.
        clip_norm: largest gradient norm; clip_by: of what, see `Objective.clip_groups`.
        accumulate: batches whose mean gradient makes one step.
        metrics: makes fresh metrics for an evaluation; by default the task's.
        log_every: steps between two log rows; evaluate_every, checkpoint_every: epochs.
        on_checkpoint: called after every checkpoint, also on interruption.
        on_evaluation: called with the row of every evaluation, its epoch, step and metrics; what it raises ends the training.
        keeper: which student is left at the end; None: that of the last step.
        name: what the progress line calls the run.
        why_not: why its loaders do not give the same batches again, in words; "" where they do.
    """

    objective: Objective
    task: Task
    optimizer: torch.optim.Optimizer
    weights: Weights
    train_loader: Any
    test_loader: Any
    epochs: int
    learning_rate: LearningRate = field(default_factory=LearningRate)
    folder: Path | None = None
    tracker: Tracker | None = None
    max_steps: int | None = None
    clip_norm: float | None = None
    clip_by: str = "all"
    accumulate: int = 1
    metrics: Callable[[], Metrics] | None = None
    log_every: int = 50
    evaluate_every: int = 1
    checkpoint_every: int = 1
    on_checkpoint: Callable[[], None] = lambda: None
    on_evaluation: Callable[[dict[str, float]], None] = lambda row: None
    keeper: Keeper | None = None
    name: str = "train"
    why_not: str = ""

    def __post_init__(self) -> None:
        self.step = 0
        self.rows: int | None = None  # of the log, at the checkpoint that was gone on from
        self.history: list[dict[str, float]] = []  # test metrics per evaluation
        self.seconds = 0.0
        self._base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self._stop = Stop()
        self._stopping = self._checkpoint_due = False
        self._anchor: dict[str, Any] | None = None
        self._kept: dict[str, float] = {}  # metrics of the student that is left, where a keeper has chosen it
        fp16 = self.objective.precision is torch.float16
        self._scaler = torch.amp.GradScaler(self.objective.device.type, enabled=fp16)
        buffers = self.objective.student.model.named_buffers()
        self.finite_buffers = {n for n, b in buffers if b.is_floating_point() and bool(b.isfinite().all())}
        self._row = Row()
        self._modules = ModuleState(self.objective)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train_loader) / self.accumulate)

    @property
    def total_steps(self) -> int:
        return min(self.epochs * self.steps_per_epoch, self.max_steps or self.epochs * self.steps_per_epoch)

    # The loop

    def fit(self) -> dict[str, float]:
        """Train to the end, or raise Interrupted after SIGINT, SIGTERM or SIGUSR1, with a checkpoint written: after the step
        that is running, or in the middle of an evaluation, which is begun anew when the run is resumed.

        Returns the last evaluation's metrics, or those of the student that the keeper leaves, and ``best_<headline>`` beside it.
        """
        start = time.perf_counter() - self.seconds
        if self.folder is not None:
            self._modules.check()
        if not self.step:
            draw_apart()
        with self._stop.listening(), Progress(self.total_steps, self.name) as progress:
            if self._evaluation_missing():
                self._end_of_epoch(progress)
                self._save_if_due()
            while self.step < self.total_steps and not self._ends_early:
                epoch, first = divmod(self.step, self.steps_per_epoch)
                stops = False
                batches = self.train_loader.epoch(epoch, start=first * self.accumulate)
                while group := tuple(islice(batches, self.accumulate)):
                    self._drop_anchor()
                    self.train_step(*group)
                    self.seconds = time.perf_counter() - start
                    self._log(progress)
                    stops = self._stops()
                    if stops or self.step >= self.total_steps:
                        break
                    self._save_if_due()
                if self.step % self.steps_per_epoch == 0 or self.step >= self.total_steps:
                    self._end_of_epoch(progress)
                    self.seconds = time.perf_counter() - start
                self._save_if_due()
                if stops and self.step < self.total_steps:
                    self._leave()
        if self.keeper is not None:
            self._conclude(self.keeper)
        return self.result()

    def _leave(self) -> NoReturn:
        number, begun = self._stop.number or signal.SIGTERM, None
        if self._resumable:
            self.save()
        else:
            assert self._anchor is not None
            begun = self._anchor["step"]
            self._write(self._anchor)
        raise Interrupted(number, self.step, self.total_steps, begun)

    @property
    def _resumable(self) -> bool:
        """Whether the training can be gone on with from after this step."""
        return self.step >= self.total_steps or self._ends_early or self.weights.resumable(self.step)

    @property
    def _ends_early(self) -> bool:
        return self.keeper is not None and self.keeper.stops

    def _conclude(self, keeper: Keeper) -> None:
        if keeper.leave():
            self._stop.number = None  # the training is over; what is kept is evaluated to its end
            self._kept = {**self.test(), **keeper.facts}

    def _drop_anchor(self) -> None:
        """Where the next step leads between steps that one hypergradient looks at: keep what a run that is stopped there goes
        on from. (Several processes stop behind them.)"""
        if distributed.world_size() == 1 and self.weights.resumable(self.step):
            between = not self.weights.resumable(self.step + 1)
            self._anchor = copy.deepcopy(self.state_dict()) if between else None

    def _stops(self) -> bool:
        """Whether to stop after this step: all ranks at the same one, so they ask each other now and then."""
        if distributed.world_size() == 1 or self.step % 10 == 0:
            self._stopping = distributed.any_of(self._stop.number is not None)
        return self._stopping and (self._resumable or self._anchor is not None)

    def _save_if_due(self) -> None:
        """The checkpoint of an epoch's end, there or at the next step from which a run can be gone on with."""
        if self._checkpoint_due and self._resumable:
            self.save()
            self._checkpoint_due = False

    def train_step(self, *batches: Batch) -> None:
        """One step of Algorithm 1: forward, backward, update of θ, and of α̃ where the weights are searched. The
        gradient is the mean of the batches' (a watched step has one)."""
        self._set_learning_rate()
        watching = self.weights.watches(self.step)
        state = random_state(self.objective.student) if watching else {}
        go_back = snapshot(self.objective, self.optimizer) if watching and self.weights.repeats else None
        done = self._backward(batches, capture=watching and self.weights.needs_views)
        if watching:
            self.weights.before_update(self.step, batches[0], state, done)
        self._update()
        if watching and self.weights.after_update(self.step) and go_back is not None:
            go_back()
            done = self._backward(batches, capture=False)
            self._update()
        if self.keeper is not None:
            self.keeper.after_step()
        self.step += 1
        self._row.add(done, sum(batch.samples for batch in batches))

    def _backward(self, batches: Sequence[Batch], capture: bool) -> TrainingPass:
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.at(self.step)
        passes = [self._pass(batch, capture, len(batches)) for batch in batches]
        done = passes[0]
        if len(passes) > 1:
            done.task = torch.stack([p.task for p in passes]).mean()
            done.terms = torch.stack([p.terms for p in passes]).mean(0)
        distributed.average_gradients(self.objective.trainable_parameters())
        return done

    def _pass(self, batch: Batch, capture: bool, parts: int) -> TrainingPass:
        done = self.objective.training_pass(batch, self.weights.weights(self.step), capture)
        if hasattr(self.task, "parts") and done.output is not None:
            self._row.parts.append({name: value.detach() for name, value in self.task.parts(done.output).items()})
        if done.loss.requires_grad:  # else every weight is 0 at this step
            self._scaler.scale(done.loss if parts == 1 else done.loss / parts).backward()
        return done

    def _update(self) -> None:
        if self.clip_norm is not None:
            self._scaler.unscale_(self.optimizer)
            for group in self.objective.clip_groups(self.clip_by):
                torch.nn.utils.clip_grad_norm_(group, self.clip_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()

    def _set_learning_rate(self) -> None:
        factor = self.learning_rate(self.step / self.steps_per_epoch, self.total_steps / self.steps_per_epoch)
        for group, base in zip(self.optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = base * factor

    # Numbers

    def _log(self, progress: Progress) -> None:
        if self.step % self.log_every and self.step < self.total_steps and self.step % self.steps_per_epoch:
            progress.update(self.step)
            return
        losses, parts = self._row.means()
        task, *terms = losses.mean(0).tolist()
        values: dict[str, Any] = {"train/task_loss": task} if self.objective.computes_task else {}
        values |= {**parts, "lr": self.optimizer.param_groups[0]["lr"]}
        values |= self._row.terms(self.objective.keys, losses)
        values["images_per_second"] = self._row.rate()
        values |= self.weights.scalars()
        self._record(values)
        total = task + sum(terms)
        progress.update(
            self.step,
            loss=task if self.objective.computes_task else total,
            images_per_second=values["images_per_second"],
        )
        self._row.begin()
        if not math.isfinite(total):
            raise divergence(self, losses)

    def _record(self, values: dict[str, Any]) -> None:
        if self.tracker is not None:
            self.tracker.scalars(values, self.step, self.step / self.steps_per_epoch)

    def _end_of_epoch(self, progress: Progress) -> None:
        epoch, last = math.ceil(self.step / self.steps_per_epoch), self.step >= self.total_steps
        self._share_statistics()
        check_student(self)
        if self._evaluates():
            try:
                metrics = self._evaluate(epoch)
            except Cut:
                self._leave()
            self._record({logged(name): value for name, value in metrics.items()})
            self.history.append({"epoch": epoch, "step": self.step, **metrics})
            beside = {n for n in metrics if n.startswith(BESIDE) and not n.endswith(f"_{self.task.headline}")}
            shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name not in beside)
            progress.message(f"epoch {epoch}/{math.ceil(self.total_steps / self.steps_per_epoch)}  {shown}")
            self._row.go_on()
            self.on_evaluation(self.history[-1])
        if last or self._ends_early or epoch % self.checkpoint_every == 0:
            self._checkpoint_due = True

    def _evaluate(self, epoch: int) -> dict[str, float]:
        metrics = self.test()
        if self.task.headline not in metrics:
            known = ", ".join(metrics) or "there are none"
            raise UserError(f"the task's headline '{self.task.headline}' is none of its metrics ({known})")
        return metrics if self.keeper is None else metrics | self.keeper.evaluate(epoch, self.test, self.test_loader)

    def _evaluates(self) -> bool:
        """Whether an evaluation belongs to the end of the epoch that this step is."""
        epoch = math.ceil(self.step / self.steps_per_epoch)
        return self.step >= self.total_steps or epoch % self.evaluate_every == 0

    def _evaluation_missing(self) -> bool:
        """Of a run that was stopped in its evaluation, or before it."""
        ended = self.step > 0 and (self.step % self.steps_per_epoch == 0 or self.step >= self.total_steps)
        return ended and self._evaluates() and not (self.history and self.history[-1]["step"] == self.step)

    def test(self, loader: Any = None) -> dict[str, float]:
        """Metrics of the student, in evaluation mode, on the test set, or on what another loader gives."""
        metrics = self.task.metrics() if self.metrics is None else self.metrics()
        alone = distributed.world_size() == 1
        cut = (lambda: self._stop.number is not None) if alone else (lambda: False)
        if loader is not None:
            return evaluate(self.objective, metrics, loader, cut=cut)
        return evaluate(self.objective, metrics, self.test_loader, self._show, cut)

    def _show(self, output: Any, batch: Batch) -> None:
        """Pictures of predictions, of a task that makes some."""
        pictures = getattr(self.task, "pictures", None)
        if self.tracker is not None and pictures is not None and (shown := pictures(output, batch)) is not None:
            self.tracker.images("test/predictions", shown, self.step)

    def result(self) -> dict[str, float]:
        """Metrics of the last evaluation, the best headline metric beside them, and the time taken."""
        if not self.history:
            return {}
        headline = self.task.headline
        best = (max if self.task.higher_is_better else min)(row[headline] for row in self.history)
        last, kept = self.history[-1], self._kept
        found = {**last, **kept, f"last_{headline}": last[headline]} if kept else last
        return {**found, f"best_{headline}": best, "seconds": self.seconds}

    # Interruption and resume

    @property
    def checkpoint_path(self) -> Path | None:
        return self.folder / CHECKPOINT if self.folder is not None else None

    def save(self) -> None:
        """Write everything that a resumed run needs to go on to the same numbers."""
        self._share_statistics()
        self._row.share()
        random = random_of_ranks(self.objective.student)
        if distributed.is_main():
            self._write({**self.state_dict(), **random})
            self.on_checkpoint()

    def _write(self, state: dict[str, Any]) -> None:
        if self.tracker is not None:
            self.tracker.flush()  # or the curves would lack what was done before the checkpoint
        if self.checkpoint_path is not None:
            self._modules.check()
            save_atomically(state, self.checkpoint_path, kept_as=self.checkpoint_path.with_name(PREVIOUS))

    def _share_statistics(self) -> None:
        """Running statistics of the student as means over the ranks: each has seen its own part of the data."""
        distributed.average(b for b in self.objective.student.buffers() if b.is_floating_point())
        if self.keeper is not None:
            self.keeper.share()

    def resume(self) -> None:
        """Go on from the folder's checkpoint. Raises UserError if there is none, or it is of another set-up."""
        assert self.checkpoint_path is not None
        load_checkpoint_into(self.load_state_dict, self.checkpoint_path)

    def state_dict(self) -> dict[str, Any]:
        """The training's whole state: tensors, numbers, strings, lists and dicts only."""
        return {
            "version": VERSION,
            "step": self.step,
            **self._modules.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "weights": self.weights.state_dict(),
            "scaler": self._scaler.state_dict(),
            "random": random_state(self.objective.student),
            "history": self.history,
            "rows": None if self.tracker is None else self.tracker.rows,
            **self._row.state_dict(),
            "seconds": self.seconds,
            **({} if self.keeper is None else {"keeper": self.keeper.state_dict()}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Back to a state from `state_dict`."""
        self._modules.load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.weights.load_state_dict(state["weights"])
        self._scaler.load_state_dict(state["scaler"])
        if self.keeper is not None:
            self.keeper.load_state_dict(state["keeper"])
        self.step, self.rows, self.seconds = state["step"], state.get("rows"), state["seconds"]
        self.history = state["history"]
        self._row.load_state_dict(state, self.objective.device)
        set_random_of_ranks(state)
