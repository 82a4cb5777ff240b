"""The loader and the parts of any data set, the project's own or somebody else's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from distpro.data import foreign, splits
from distpro.data.augment import AugmentSpec
from distpro.data.foreign_loader import ForeignLoader
from distpro.data.loader import Loader
from distpro.data.splits import Split
from pathways.registry import UserError


def make_loader(
    data: Any,
    part: Any,
    batch_size: int,
    *,
    training: bool,
    seed: int = 0,
    augment: AugmentSpec = (),
    drop_last: bool = False,
    device: str | torch.device = "cpu",
    channels_last: bool = False,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    expand: str = "",
    augment_epochs: int | None = None,
    repeats: int = 1,
    sampler: str | Sequence[float] | None = None,
) -> Loader | ForeignLoader:
    """Batches of a part of ``data`` (a `Dataset` or `ForeignDataset`): for training shuffled and as ``augment``,
    ``drop_last``, ``expand`` and ``augment_epochs`` say, otherwise in order, plain and whole. The arguments are those
    of `Loader` and `ForeignLoader`. Raises UserError for what does not go with somebody else's data."""
    if isinstance(part, Split):
        return Loader(
            part,
            batch_size,
            mean=data.mean,
            std=data.std,
            augment=augment if training else (),
            shuffle=training,
            seed=seed,
            drop_last=training and drop_last,
            device=device,
            channels_last=channels_last,
            rank=rank,
            world_size=world_size,
            workers=workers,
            expand=expand if training else "",
            augment_epochs=augment_epochs if training else None,
            num_classes=data.num_classes,
            repeats=repeats if training else 1,
            sampler=sampler if training else None,
        )
    for key, value in (("augment", augment), ("augment_epochs", augment_epochs)):
        if value:
            raise UserError(
                f"{key} is for distpro's own data sets; a Dataset augments itself (boxes: data.params.augment)"
            )
    if repeats > 1 or sampler is not None:
        key = "repeats" if repeats > 1 else "sampler"
        raise UserError(f"data.{key} is for distpro's own data sets; a DataLoader of yours may have its own sampler")
    if expand and training:
        raise UserError(f"a loss reads {expand} of images, which distpro's own data sets give; a Dataset has none")
    return ForeignLoader(
        part,
        batch_size,
        shuffle=training,
        seed=seed,
        drop_last=training and drop_last,
        device=device,
        channels_last=channels_last,
        workers=workers,
        rank=rank,
        world_size=world_size,
        to_batch=getattr(data, "to_batch", None),
    )


@overload
def split(part: Split, fraction: float, seed: int) -> tuple[Split, Split]: ...
@overload
def split(part: Any, fraction: float, seed: int) -> tuple[Any, Any]: ...
def split(part: Any, fraction: float, seed: int) -> tuple[Any, Any]:
    """Two parts, ``fraction`` and the rest, seeded, and stratified where each sample has one known label; see
    `splits.split` for a `Split` and `foreign.split` for anything else."""
    return splits.split(part, fraction, seed) if isinstance(part, Split) else foreign.split(part, fraction, seed)


def labels_of(part: Any) -> Tensor | None:
    """The labels of a part's samples, (N,) int64; None where there is not one a sample, or only reading them would tell."""
    if isinstance(part, Split):
        return None if part.dense else part.labels
    return foreign.labels_of(part)
