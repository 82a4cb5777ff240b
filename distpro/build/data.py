"""From a config to its data set and loaders."""

from __future__ import annotations

from typing import Any

from distpro.build.device import device_of
from distpro.config.schema import Config
from distpro.data import Dataset, Loader, load_data
from distpro.losses import LOSSES
from distpro.train import distributed

IMAGE_SETS = {"cifar10": (10, (3, 32, 32)), "cifar100": (100, (3, 32, 32))}


def build_data(config: Config) -> Dataset:
    """The config's data set."""
    data = config.data
    root = {} if data.root is None else {"root": data.root}
    return load_data(
        data.name,
        samples=data.samples,
        classes=data.classes,
        seed=config.seed if data.seed is None else data.seed,
        mean=data.mean,
        std=data.std,
        **root,
        **data.params,
    )


def build_loader(config: Config, data: Dataset, part: Any, *, training: bool, batch_size: int | None = None) -> Loader:
    """Batches of a split: shuffled and augmented for training, in order and plain for evaluation. Training images are
    followed by their rotations where a term reads them."""
    return Loader(
        part,
        distributed.share(batch_size or config.training.batch_size),
        mean=data.mean,
        std=data.std,
        augment=config.data.augment if training else (),
        shuffle=training,
        seed=config.seed,
        drop_last=training and config.training.drop_last,
        device=device_of(config),
        channels_last=config.channels_last,
        workers=config.data.workers,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        rotations=training and any(LOSSES[term.loss].views > 1 for term in config.terms),  # type: ignore[attr-defined]
        augment_epochs=config.data.augment_epochs if training else None,
        num_classes=data.num_classes,
    )
