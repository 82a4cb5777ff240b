"""What can be known to fail before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from distpro.batch import Batch
from distpro.term import entries_of
from distpro.train import distributed
from distpro.train.state import no_trace
from pathways.registry import UserError

if TYPE_CHECKING:
    from distpro.train.trainer import Trainer


def check_last_batch(trainer: Trainer, samples: int | None, batch_size: int, drop_last: bool) -> None:
    """Raise UserError where the training would stop because a batch is one sample (for each process), the last of an epoch
    or each, and BatchNorm, or a loss that compares samples, cannot do with one.

    Such a batch is passed through student and terms, without a trace, as BatchNorm on maps larger than 1x1 can. Where
    there is no such batch, or it is not reached, nothing is computed.

    Args:
        samples: of the training part; None where they are not known, or come as batches of somebody else's.
        batch_size: of all processes together.
    """
    weights = [0.0 if term.weight == 0 else 1.0 for term in trainer.objective.terms for _ in entries_of(term)]
    _check_single(
        trainer,
        trainer.train_loader,
        lambda batch: trainer.objective.training_pass(batch, weights),
        samples,
        batch_size,
        last=not drop_last and trainer.total_steps >= trainer.steps_per_epoch,
        key="training.batch_size",
        cure="set training.drop_last: true, or another training.batch_size",
        more="more training samples",
    )


def check_last_validation_batch(
    trainer: Trainer, loader: Any, samples: int | None, batch_size: int, drop_last: bool
) -> None:
    """As `check_last_batch`, of the validation part of a search, whose batches pass through the student in training mode."""
    searcher: Any = trainer.weights
    looked_at = trainer.total_steps // searcher.every * searcher.validation_batches
    _check_single(
        trainer,
        loader,
        lambda batch: searcher.estimator.judge(trainer.objective.run_student(batch)[0], batch),
        samples,
        batch_size,
        last=not drop_last and looked_at >= len(loader),
        key="search.validation_batch_size",
        cure="set another search.validation_batch_size or search.validation_fraction",
        more="a larger search.validation_fraction",
    )


def _check_single(
    trainer: Trainer,
    loader: Any,
    run: Callable[[Batch], object],
    samples: int | None,
    batch_size: int,
    *,
    last: bool,
    key: str,
    cure: str,
    more: str,
) -> None:
    """Raise UserError where ``run`` fails on a batch of one sample that ``loader`` gives. ``last``: whether a last batch that is
    not whole is reached; ``cure`` and ``more``: what to do about one, and about a part that has no other sample."""
    ranks, objective = distributed.world_size(), trainer.objective
    if samples is None or trainer.step:
        return
    each, used = "" if ranks == 1 else f" for each of {ranks} processes", samples - samples % ranks
    part = key.partition(".")[0]
    of = "validation" if "validation" in key else part
    if batch_size == ranks:
        said, cure = (
            f"{key}: {batch_size} makes batches of one sample{each}, which do",
            f"set {key} to {2 * ranks} or more",
        )
    elif used % batch_size != ranks or not last:
        return
    elif used == ranks:
        said, cure = f"{part}: there is one {of} sample{each}, which does", f"that takes {more}"
    else:
        said = f"{part}: {samples} samples in batches of {batch_size} leave a last batch of one{each}, which does"
    batch = next(iter(loader.epoch(0, start=len(loader) - 1)))
    if batch.samples != 1:
        return
    cache, objective.cache = objective.cache, None
    try:
        with torch.no_grad(), no_trace(objective.student, objective.terms):
            run(batch)
    except ValueError as error:
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(f"{said} not work ({reason}); {cure}") from None
    finally:
        objective.cache = cache
