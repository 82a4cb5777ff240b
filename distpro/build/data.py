"""From a config to its data set and loaders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distpro.batch import Batch
from distpro.build.device import device_of
from distpro.build.given import Given, refuse_object
from distpro.build.task import build_task
from distpro.config.schema import Config
from distpro.data import Blank, build_augment, load_data, split
from distpro.data.augment import Crop
from distpro.data.foreign import ForeignDataset
from distpro.data.loading import make_loader
from distpro.data.statistics import stated_by, stored_facts
from distpro.data.tokens import as_trained
from distpro.losses import LOSSES
from distpro.models import MODELS
from distpro.tasks import Classification
from distpro.train import distributed
from pathways.registry import UserError, is_code

IMAGE_SETS = {"cifar10": (10, (3, 32, 32), 50000), "cifar100": (100, (3, 32, 32), 50000)}
"""Classes, image shape and training samples of sets that need not be there for a dry run."""


def build_data(config: Config, given: Given | None = None) -> Any:
    """The config's data set, or the one that was handed over."""
    if given is not None and given.data is not None:
        return _with_classes(config, given.data, given)
    data = config.data
    refuse_object("data", data.name)
    root = {} if data.root is None else {"root": data.root}
    found = load_data(
        data.name,
        samples=data.samples,
        classes=data.classes,
        seed=config.seed if data.seed is None else data.seed,
        mean=data.mean,
        std=data.std,
        **root,
        **data.params,
    )
    return _with_classes(config, found, given)


def _with_classes(config: Config, data: Any, given: Given | None) -> Any:
    """The data with the number of classes that the config states, which objects of somebody else may not know. Raises UserError
    where data that know it have another, and where a model would get a number of its own."""
    stated, known = config.data.num_classes, data.num_classes
    if not isinstance(data, ForeignDataset):
        if None not in (stated, known) and stated != known:
            raise UserError(f"data.num_classes: {stated} are stated, '{config.data.name}' has {known}")
        return data
    if stated is not None:
        return data if known == stated else replace(data, names=None, classes=stated)
    if known is not None:
        return data
    task = build_task(config, given)
    named = [m for m in (config.student, config.teacher, *config.teachers.values()) if m is not None]
    boxes = getattr(task, "targets", "classes") == "boxes"  # whose labels a detector takes as row numbers, unchecked
    of_model = config.student.params.get("num_classes")
    if boxes and isinstance(of_model, int) and of_model > 1:
        return replace(data, classes=of_model - 1)  # the background is one of them
    built = [m.model for m in named if _asks_classes(m.model) and "num_classes" not in m.params]
    if built and (boxes or type(task) is Classification):
        raise UserError(
            f"data.num_classes: how many classes {built[0]} answers with is not known: state it, or give the training set an "
            "attribute classes, the list of their names"
        )
    return data


def _asks_classes(model: str) -> bool:
    return model in MODELS or model.startswith(("torchvision:", "timm:"))


def as_stored(config: Config, folder: Path | None, facts: Mapping[str, Any] | None = None) -> Config:
    """The config with the mean and std, or the tokenizer, that a run has used: those of its ``folder``, or among the ``facts``
    of its data. What the config says itself goes first, and a data set of another person's code may be normalised already."""
    facts = (stored_facts(folder) if folder is not None else {}) if facts is None else facts
    if "tokenizer" in facts and config.data.name == facts.get("name"):
        tokenizer = as_trained(config.data.params.get("tokenizer"), facts)
        params = {**config.data.params, "tokenizer": tokenizer}
        return config.model_copy(update={"data": config.data.model_copy(update={"params": params})})
    stored, data = stated_by(facts), config.data
    if stored is None or (is_code(data.name) and data.name != facts.get("name")):
        return config
    mean, std = (list(own if said is None else said) for own, said in zip(stored, (data.mean, data.std), strict=True))
    return config.model_copy(update={"data": data.model_copy(update={"mean": mean, "std": std})})


def blank_data(config: Config, given: Given | None = None) -> tuple[Any, int | None]:
    """A stand-in with the shapes of the config's data and the number of training samples (None if unknown); the data
    themselves only where nothing else says how many classes there are and how large the images are."""
    classes, shape, samples = IMAGE_SETS.get(config.data.name, (None, None, None))
    kept = config.data.classes
    classes = config.data.num_classes or (len(kept) if isinstance(kept, list) else kept) or classes
    shape = config.data.image_shape or shape
    targets = getattr(
        given.task if given is not None and given.task is not None else build_task(config), "targets", "classes"
    )
    unknown = shape is None or (classes is None and targets != "depths")
    if unknown or (given is not None and given.data is not None):
        data = build_data(config, given)
        try:
            return data, len(data.train)
        except TypeError:  # an iterable data set
            return data, None
    assert shape is not None
    return Blank(classes, shape, targets), config.data.samples or samples


def example_of(config: Config, data: Any) -> Batch:
    """Two samples of the training data on the device, at the size that the augmentation gives them."""
    example: Batch = data.example(2, device_of(config), config.channels_last)
    sizes = crops(config)
    if not sizes:
        return example
    height, width = sizes[-1]
    target = example.target[..., :height, :width] if example.target.dim() == 3 else example.target
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return replace(example, inputs=example.inputs[..., :height, :width].contiguous(memory_format=layout), target=target)


def crops(config: Config) -> list[tuple[int, int]]:
    """The sizes to which the augmentation crops images."""
    return [a.size for a in build_augment(config.data.augment).values() if isinstance(a, Crop) and a.size is not None]


def build_loader(
    config: Config, data: Any, part: Any, *, training: bool, batch_size: int | None = None, plain_order: bool = False
) -> Any:
    """Batches of a part of the data: shuffled and augmented for training, in order and plain for evaluation. Training
    samples are followed by more rows where a loss asks for them (`DistillationLoss.expand`).

    ``plain_order``: each sample once in an epoch, whatever the config's sampler.
    """
    resampled = training and not plain_order and (config.data.repeats > 1 or config.data.sampler is not None)
    by_sample = next((t.loss for t in config.terms if resampled and LOSSES[t.loss].needs_index), "")  # type: ignore[attr-defined]
    if by_sample:
        key = "repeats" if config.data.repeats > 1 else "sampler"
        raise UserError(f"data.{key}: {by_sample} keeps something of every sample, which may not come twice in a batch")
    asked = {LOSSES[term.loss].expand for term in config.terms} - {""} if training else set()  # type: ignore[attr-defined]
    if len(asked) > 1:
        raise UserError(f"terms: their losses want different rows of each sample ({', '.join(sorted(asked))})")
    return make_loader(
        data,
        part,
        distributed.share(batch_size or config.training.batch_size),
        training=training,
        seed=config.seed,
        augment=config.data.augment if training else (),
        drop_last=training and config.training.drop_last,
        device=device_of(config),
        channels_last=config.channels_last,
        workers=config.data.workers,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        expand=next(iter(asked), ""),
        augment_epochs=config.data.augment_epochs if training else None,
        repeats=config.data.repeats if resampled else 1,
        sampler=config.data.sampler if resampled else None,
    )


def search_parts(config: Config, data: Any) -> tuple[Any, Any]:
    """(validation, training) parts of a search: the data set's own validation part if it has one, else a fraction of
    the training part."""
    if data.validation is not None:
        return data.validation, data.train
    try:
        samples = len(data.train)
    except TypeError:  # a DataLoader of a data set that has none
        raise UserError("data: the training part has no length and cannot be split: give a validation set") from None
    return split(data.train, config.search.fraction_of(samples), config.seed)
