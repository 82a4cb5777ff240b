"""What can be known to fail before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from distpro.term import entries_of
from distpro.train import distributed
from distpro.train.state import no_trace
from pathways.registry import UserError

if TYPE_CHECKING:
    from distpro.train.trainer import Trainer


def check_last_batch(trainer: Trainer, samples: int | None, batch_size: int, drop_last: bool) -> None:
    """Raise UserError where the training would stop at the end of an epoch, because its last batch is one sample (for each
    process) and BatchNorm, or a loss that compares samples, cannot do with one.

    Such a batch is passed through student and terms, without a trace, as BatchNorm on maps larger than 1x1 can. Where
    there is no such batch, or it is not reached, nothing is computed.

    Args:
        samples: of the training part; None where they are not known, or come as batches of somebody else's.
        batch_size: of all processes together.
    """
    ranks, loader, objective = distributed.world_size(), trainer.train_loader, trainer.objective
    if samples is None or drop_last or (samples - samples % ranks) % batch_size != ranks:
        return
    if trainer.step or trainer.total_steps < trainer.steps_per_epoch:
        return
    batch = next(iter(loader.epoch(0, start=len(loader) - 1)))
    if batch.samples != 1:
        return
    weights = [0.0 if term.weight == 0 else 1.0 for term in objective.terms for _ in entries_of(term)]
    cache, objective.cache = objective.cache, None
    try:
        with torch.no_grad(), no_trace(objective.student, objective.terms):
            objective.training_pass(batch, weights)
    except ValueError as error:
        each = "" if ranks == 1 else f" for each of {ranks} processes"
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"training: {samples} samples in batches of {batch_size} leave a last batch of one{each}, which does not work "
            f"({reason}); set training.drop_last: true, or another training.batch_size"
        ) from None
    finally:
        objective.cache = cache
