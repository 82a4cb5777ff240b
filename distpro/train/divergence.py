"""A training whose numbers are no numbers any more: that it is noticed, and what it came from."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pathways.call import tensors_in
from pathways.registry import UserError

if TYPE_CHECKING:
    from distpro.train.trainer import Trainer


class Diverged(UserError):
    """A loss, or a number of the student, is no finite number any more."""


def divergence(trainer: Trainer, losses: Tensor) -> Diverged:
    """What to say of the steps since the last log row, ``losses`` (steps, 1 + terms), of which one is not finite."""
    row, column = (~losses.isfinite()).nonzero()[0].tolist()
    step = trainer.step - len(losses) + row
    wrong = ["task", *trainer.objective.keys][column]
    said = f"the {wrong} loss is {losses[row, column]:g} at step {step + 1}"
    source = _source(trainer, step)
    if source:
        return Diverged(f"training diverged: {said}: {source}")
    cure = "training.distill_weight" if wrong == "task" else "training.distill_weight, or leave that term out"
    broken = first_of({**dict(trainer.objective.student.model.named_parameters()), **_of_terms(trainer)})
    now = f"; {broken} is not finite by now" if broken else ""
    return Diverged(f"training diverged: {said} (lower the learning rate, {cure}?){now}")


def check_student(trainer: Trainer) -> None:
    """Raise `Diverged` where a parameter or a running statistic is not finite after an update whose losses still were."""
    model = trainer.objective.student.model
    before = trainer.finite_buffers  # a mask may be infinite from the start
    buffers = {name: b for name, b in model.named_buffers() if name in before}
    broken = first_of({**dict(model.named_parameters()), **buffers, **_of_terms(trainer)})
    if broken:
        raise Diverged(
            f"training diverged: {broken} of the student is not finite after step {trainer.step}, though every loss was: a "
            "gradient was not (lower the learning rate, or set training.clip_norm?)"
        )


def first_of(tensors: Mapping[str, Tensor]) -> str:
    """The name of the first tensor that holds anything but finite numbers; "" if none does. One look at the device."""
    real = {name: t for name, t in tensors.items() if t.is_floating_point() and t.numel()}
    if not real:
        return ""
    fine = torch.stack([t.detach().isfinite().all() for t in real.values()]).tolist()
    return next((name for name, is_fine in zip(real, fine, strict=True) if not is_fine), "")


def _of_terms(trainer: Trainer) -> dict[str, Tensor]:
    return {f"terms.{name}": p for name, p in trainer.objective.terms.named_parameters()}


def _source(trainer: Trainer, step: int) -> str:
    """What of the step's batch or of the teacher is not finite, in words; "" if nothing is, or the batch does not come again."""
    if trainer.why_not:
        return ""
    epoch, first = divmod(step, trainer.steps_per_epoch)
    count = trainer.accumulate
    batches = islice(trainer.train_loader.epoch(epoch, start=first * count), count)
    for batch in batches:
        for what, value in (("an input", batch.inputs), ("a target", batch.target)):
            for tensor in tensors_in(value):
                if not tensor.dim() or not tensor.is_floating_point():
                    continue
                wrong = (~tensor.isfinite()).reshape(len(tensor), -1).any(1)
                if wrong.any():
                    row = int(wrong.nonzero()[0])
                    sample = f" (sample {int(batch.index[row])})" if batch.index is not None else ""
                    return f"{what} of that step's batch is not finite{sample if len(wrong) == batch.samples else ''}"
        trainer.objective.at(step)
        broken = first_of({k: v for k, v in trainer.objective.run_teacher(batch).items() if isinstance(v, Tensor)})
        if broken:
            own = None if trainer.objective.teacher is None else trainer.objective.teacher.model
            weight = "" if own is None else first_of(dict(own.named_parameters()))
            return f"the teacher's '{broken}' is not finite" + (f", for its weight {weight} is not" if weight else "")
    return ""
