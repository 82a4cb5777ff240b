"""What a person should hear at the start and at the end of a training that can hardly be meant so, in a line each.

None of it is an error: a student may begin at chance level on purpose, and labels may be noise. Only tasks with an accuracy,
one label a sample, are looked at, on a few test batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from distpro.batch import Batch
from distpro.config.schema import Config
from distpro.data import Loader
from distpro.objective import Objective
from distpro.runs.parts import said_of_parts, said_of_scale
from distpro.search.searcher import Searcher
from distpro.task import ask
from distpro.tasks import Classification
from distpro.term import entries_of
from distpro.train import distributed
from distpro.train.state import no_trace
from distpro.train.tracking import read_metrics
from distpro.train.trainer import Trainer
from pathways.probing import untouched
from pathways.registry import UserError

SAMPLES = 512


def at_the_start(trainer: Trainer, facts: Mapping[str, Any] | None, config: Config) -> list[str]:
    """Of doubtful data, of settings that are without effect, of a teacher that knows nothing of the data, and of a student with more classes than
    the data."""
    facts, objective = facts or {}, trainer.objective
    notes = said_of_parts(trainer.train_loader, trainer.test_loader, facts.get("classes") or 0)
    notes += said_of_scale(facts.get("mean") or (), facts.get("std") or ())
    notes += [f"the term '{key}' has no gradient: it teaches the student nothing" for key in _without_gradient(trainer)]
    if config.has_teacher and not objective.entries and config.retrain.weights == "constant":
        notes.append("the config has a teacher, but no pathways or terms: it teaches nothing")
    unlearned = _unlearned(trainer)
    if unlearned:
        more = f" and {len(unlearned) - 1} more" * (len(unlearned) > 1)
        notes.append(
            f"evaluated, the student answers through {unlearned[0]}{more}, which no loss trains: a term on it?"
        )
    samples, size = facts.get("train"), config.training.batch_size
    if isinstance(samples, int) and size > samples:
        notes.append(f"training.batch_size is {size}, there are {samples} training samples: each epoch is one step")
    if config.data.workers and isinstance(trainer.train_loader, Loader) and not trainer.train_loader.streamed:
        notes.append(f"data.workers is {config.data.workers}, but the images are in memory: no worker is started")
    if trainer.task.headline != "accuracy":
        return notes
    if objective.teacher is not None:
        with untouched(objective.teacher.model):
            said = _guesses(trainer, _teacher(objective))
        images = "" if getattr(trainer.task, "tokens", None) else ", images of another normalisation (teacher.input)"
        cure = f"other weights{images}, or classes in another order?"
        notes += [f"the teacher {said}: {cure}"] if said else []
    answers, classes = _classes(trainer, facts)
    if answers > classes > 0:
        notes.append(f"the student answers with {answers} classes, the data have {classes}")
    return notes


def _without_gradient(trainer: Trainer) -> list[str]:
    """Keys of terms whose loss does not move with what they read of the student, on the first batch. Of images in one process."""
    objective, loader = trainer.objective, trainer.train_loader
    if not objective.entries or distributed.world_size() > 1 or objective.backend is not None:
        return []
    if (
        not isinstance(loader, Loader)
        or loader.streamed
        or objective.precision is not None
        or objective.cache is not None
    ):
        return []
    batch = next(iter(loader.epoch(0)))
    views: list[dict[str, Tensor]] = []
    with no_trace(objective.student, objective.terms), torch.enable_grad():
        teacher = objective.run_teacher(replace(batch, index=None))
        losses = objective.term_losses(objective.run_student(batch)[1], teacher, batch, views=views)
        groups = [
            (entry.key, own) for term, own in zip(objective.terms, views, strict=True) for entry in entries_of(term)
        ]
        return [
            key for (key, own), loss in zip(groups, losses, strict=True) if loss is not None and not _moves(loss, own)
        ]


def _unlearned(trainer: Trainer) -> list[str]:
    """Parameters through which a student of several answers gives the one that is evaluated, and which nothing trains: DeiT's second
    head without a term on it. On the first batch, of images in one process."""
    objective, loader = trainer.objective, trainer.train_loader
    if distributed.world_size() > 1 or objective.backend is not None or objective.cache is not None:
        return []
    if not isinstance(loader, Loader) or loader.streamed or not objective.computes_task or objective.teacher_training:
        return []
    batch, was_training = next(iter(loader.epoch(0))), objective.training
    try:
        with no_trace(objective.student, objective.terms), untouched(objective.student), torch.enable_grad():
            output, _ = objective.train().run_student(batch)
            if isinstance(output, Tensor):
                return []
            named = [(name, p) for name, p in objective.student.model.named_parameters() if p.requires_grad]
            trained = _reached(objective.training_pass(batch, _ever(trainer)).loss, named)
            response = _response(objective, objective.eval().predict(batch))
            answers = _reached(response.float().sum(), named) if response is not None else set()
    finally:
        objective.train(was_training)
    return [name for name, _ in named if name in answers - trained]


def _ever(trainer: Trainer) -> list[float]:
    """1 for every entry that has a weight at the start, in the middle or at the end of the training."""
    count = len(trainer.objective.entries)
    if isinstance(trainer.weights, Searcher) or not count:
        return [1.0] * count
    steps = (0, trainer.total_steps // 2, trainer.total_steps - 1)
    asked = [trainer.weights.weights(step) for step in steps]
    return [float(any(float(weights[n]) != 0 for weights in asked)) for n in range(count)]


def _reached(value: Tensor, named: Sequence[tuple[str, Tensor]]) -> set[str]:
    if not value.requires_grad:
        return set()
    gradients = torch.autograd.grad(value, [p for _, p in named], allow_unused=True)
    return {name for (name, _), gradient in zip(named, gradients, strict=True) if gradient is not None}


def _moves(loss: Tensor, views: Mapping[str, Tensor]) -> bool:
    read = [view for view in views.values() if view.requires_grad]
    if not read or not loss.requires_grad:
        return False
    gradients = torch.autograd.grad(loss, read, retain_graph=True, allow_unused=True)
    return any(bool(gradient.any()) for gradient in gradients if gradient is not None)


def sums_of(trainer: Trainer) -> list[float]:
    """Two sums of every parameter of the student that is trained, by which it is seen whether it has moved."""
    trained = [p.detach().double() for p in trainer.objective.student.parameters() if p.requires_grad]
    return torch.stack([s for p in trained for s in (p.sum(), p.abs().sum())]).tolist() if trained else []


def check_classes(trainer: Trainer, facts: Mapping[str, Any] | None) -> None:
    """Raise UserError, in every process, for a student with fewer classes than the data: the first label without one would
    end its training."""
    if type(trainer.task) is not Classification:
        return
    answers, classes = _classes(trainer, facts)
    if 0 < answers < classes:
        raise UserError(
            f"the student answers with {answers} classes, the data have {classes}: student.params.num_classes?"
        )


def _classes(trainer: Trainer, facts: Mapping[str, Any] | None) -> tuple[int, int]:
    """Of the student's answers and of the data; 0 where there are none."""
    response, classes = _student(trainer.objective)(next(_few(trainer.test_loader))), (facts or {}).get("classes")
    answers = 0 if response is None or response.dim() != 2 else response.shape[1]
    return answers, classes if isinstance(classes, int) else 0


def at_the_end(trainer: Trainer, before: Sequence[float] = ()) -> list[str]:
    """Of a student that has not moved, has learnt nothing, or whose loss has risen; of a metric that says nothing. ``before``: its `sums_of` at the start."""
    notes = []
    if before and all(
        math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) for a, b in zip(before, sums_of(trainer), strict=True)
    ):
        notes.append("the student has not moved: training.optimizer.lr, or a loss without a gradient?")
    headline = trainer.task.headline
    values = [row[headline] for row in trainer.history if headline in row]
    if values and all(map(math.isnan, values)):
        notes.append(
            f"the test {headline} is nan in every evaluation: of what the metric is given, nothing can be computed"
        )
    elif values and "loss" in trainer.history[-1] and not math.isfinite(trainer.history[-1]["loss"]):
        notes.append(
            f"the test loss is {trainer.history[-1]['loss']}: an image or an answer of the test part is no number"
        )
    if headline == "accuracy":
        right = values[-1] / 100 if values and math.isfinite(values[-1]) else None
        said = _guesses(trainer, _student(trainer.objective), right)
        notes += [f"the student {said}: training.optimizer.lr, or longer?"] if said else []
    rows = read_metrics(trainer.folder) if trainer.folder is not None else []
    losses = [row["train/task_loss"] for row in rows if "train/task_loss" in row]
    if len(losses) > 1 and losses[-1] > losses[0]:
        rose = f"from {losses[0]:.4g} to {losses[-1]:.4g}"
        notes.append(f"the task loss of the training rose {rose}: lower training.optimizer.lr?")
    return notes


def _guesses(trainer: Trainer, answer: Callable[[Batch], Tensor | None], right: float | None = None) -> str:
    """What to say of answers that are hardly right more often than one class for every sample would be; else "".
    ``right``: how often they are right, if that is known."""
    hits, labels = 0, []
    for batch in _few(trainer.test_loader):
        target = trainer.task.labels(batch)[0]
        if target is not None and target.is_floating_point() and target.dim() == 2:
            target = target.argmax(1)
        if target is None or target.dim() != 1:
            return ""
        if right is None:
            response = answer(batch)
            if response is None or response.dim() != 2 or target.shape != response.shape[:1]:
                return ""
            hits += int((response.argmax(1) == target).sum())
        labels.append(target.cpu())
    seen = torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64)
    if len(seen) < 2 or (seen == seen[0]).all():
        return ""
    most = int(torch.unique(seen, return_counts=True)[1].max()) / len(seen)
    whole, right = right is not None, hits / len(seen) if right is None else right
    if right > most + 2 * math.sqrt(most * (1 - most) / len(seen)):  # two standard errors
        return ""
    samples, of = ("the test samples", f" of {len(seen)} looked at") if whole else (f"{len(seen)} test samples", "")
    return f"is right in {right:.1%} of {samples}, and one class for all of them in {most:.1%}{of}"


def _few(loader: Any) -> Iterator[Batch]:
    """Some batches, from everywhere where that costs nothing, for files lie sorted by class."""
    first = next(iter(loader.epoch(0)))
    count = min(len(loader), max(1, SAMPLES // max(first.samples, 1)), 16)
    if isinstance(loader, Loader):
        yield first
        yield from (next(iter(loader.epoch(0, start=n * len(loader) // count))) for n in range(1, count))
    else:
        yield from islice(loader.epoch(0), count)


def _teacher(objective: Objective) -> Callable[[Batch], Tensor | None]:
    def answer(batch: Batch) -> Tensor | None:
        assert objective.teacher is not None
        model = objective.teacher.model
        with objective.autocast():
            return _response(objective, ask(objective.task, model.eval(), batch))

    return answer


def _student(objective: Objective) -> Callable[[Batch], Tensor | None]:
    def answer(batch: Batch) -> Tensor | None:
        was_training = objective.training
        with untouched(objective.student):
            response = _response(objective, objective.eval().predict(batch))
        objective.train(was_training)
        return response

    return answer


def _response(objective: Objective, output: Any) -> Tensor | None:
    """None where the task does not know which part of an output is meant: a term may name it as a tap."""
    try:
        return objective.task.response(output)
    except UserError:
        return None
