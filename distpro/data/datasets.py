"""Data sets by name: where they lie, what they hold, and a signature of what was loaded."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from distpro.batch import Batch
from distpro.data.foreign import ForeignDataset, adopt, take
from distpro.data.loader import Loader
from distpro.data.splits import Split, class_numbers, keep_classes, sample
from distpro.data.statistics import check_statistics, statistics
from pathways.registry import Registry, UserError

DATASETS = Registry("dataset", takes_code=True)

MEMORY_LIMIT = 2 * 2**30  # bytes of decoded images; larger folders are streamed


class Source(NamedTuple):
    """What a builder of ``DATASETS`` returns. ``mean`` and ``std`` are computed where they are None. ``stream``: keep
    image files encoded (True), decode them all (False), or decide by ``MEMORY_LIMIT`` (None). ``validation``: where the
    data set has such a part of its own."""

    train: Split
    test: Split
    names: list[str]
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    stream: bool | None = False
    validation: Split | None = None


@dataclass(frozen=True, eq=False)
class Dataset:
    """A loaded data set. ``mean`` and ``std``: per channel, for images in 0-1. ``signature``: plain values that state
    what was loaded: name, sizes, and the sha256 of ``fingerprint``. ``validation``: None where the data set has no such
    part, so that a search takes a fraction of the training set."""

    train: Split
    test: Split
    names: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    signature: dict[str, Any]
    validation: Split | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """The signature, and the mean and std that a model trained on the data needs wherever it is used."""
        return {**self.signature, "mean": list(self.mean), "std": list(self.std)}

    @property
    def num_classes(self) -> int | None:
        """None of data without classes."""
        return len(self.names) or None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return self.train.image_shape

    @property
    def dense(self) -> bool:
        """Whether each pixel has a label, or a depth."""
        return self.train.dense

    def example(self, n: int = 2, device: str | torch.device = "cpu", channels_last: bool = False) -> Batch:
        """``n`` training images, evenly spaced, normalised and not augmented; fewer if there are fewer."""
        few = self.train.select(self.train.spaced(n))
        loader = Loader(
            few,
            len(few),
            mean=self.mean,
            std=self.std,
            shuffle=False,
            drop_last=False,
            device=device,
            channels_last=channels_last,
        )
        return next(loader.epoch(0))


@dataclass(frozen=True)
class Blank:
    """The facts of a data set that is not there, for a dry run: black images (C, H, W) with ``targets`` as a task has them: of
    class 0, all pixels of class 0 (``maps``), 1 m away (``depths``), or without any object (``boxes``, of a list of images)."""

    num_classes: int | None
    image_shape: tuple[int, int, int]
    targets: str = "classes"

    mean: ClassVar[tuple[float, ...]] = ()
    std: ClassVar[tuple[float, ...]] = ()

    @property
    def names(self) -> list[str]:
        return [str(label) for label in range(self.num_classes or 0)]

    def example(self, n: int = 2, device: str | torch.device = "cpu", channels_last: bool = False) -> Batch:
        """``n`` of its images."""
        images, index = torch.zeros(n, *self.image_shape, device=device), torch.arange(n, device=device)
        if self.targets == "boxes":
            none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
            return Batch(list(images), [none] * n, n, index).to(lambda tensor: tensor.to(device))
        size = self.image_shape[1:] if self.targets in ("maps", "depths") else ()
        target = torch.ones(n, *size, device=device)
        target = target if self.targets == "depths" else torch.zeros_like(target, dtype=torch.int64)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return Batch(images.contiguous(memory_format=layout), target, n, index)


def load_data(
    name: str,
    root: str | os.PathLike[str] | None = None,
    samples: int | None = None,
    classes: int | Sequence[int | str] | None = None,
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **params: Any,
) -> Dataset | ForeignDataset:
    """A data set of ``DATASETS``, or what ``package.module:function`` returns: a `Source`, or what `adopt` takes.

    root: file or folder; a relative one is looked for as given, then under ``$DISTPRO_DATA``.
    classes: the first so many classes, or a list of labels or names, which become labels 0, 1, ... in that order.
    samples: so many training samples, drawn with ``seed``, stratified where each has one label.
    mean, std: per channel, for images in 0-1; default: of the data set's protocol, else those of the whole training part,
    whatever ``samples`` and ``classes`` leave of it: a teacher of the whole set and a student of a part of it see a
    sample alike.
    params: options of the data set.

    Raises UserError for an unknown name or option, and for data that are absent, damaged, or fewer than asked for.
    """
    if root is not None:
        params["root"] = os.fspath(root)
    source = DATASETS.build(name, **params)
    if isinstance(source, Dataset):
        kept = source.train.streamed
        source = Source(source.train, source.test, source.names, source.mean, source.std, kept, source.validation)
    if not isinstance(source, Source):
        for key, value in (("classes", classes), ("mean", mean), ("std", std)):
            if value is not None:
                raise UserError(f"{key}: dataset '{name}' brings its own samples as they are, this cannot change them")
        data = adopt(source, f"dataset '{name}'")
        return data if samples is None else replace(data, train=take(data.train, samples, seed))
    if mean is None or std is None:
        found = (source.mean, source.std) if source.mean and source.std else statistics(source.train)
        mean, std = mean or found[0], std or found[1]
    check_statistics(mean, std)
    source = source if classes is None else _with_classes(source, classes)
    source = source if samples is None else source._replace(train=sample(source.train, samples, seed))
    source = _decoded(source)
    signature = _signature(name, source)
    return Dataset(source.train, source.test, source.names, tuple(mean), tuple(std), signature, source.validation)


def _with_classes(source: Source, classes: int | Sequence[int | str]) -> Source:
    if not source.names:
        raise UserError("classes: the data set has none")
    chosen = class_numbers(classes, source.names)
    source = _each(source, lambda part: keep_classes(part, chosen))
    return source._replace(names=[source.names[c] for c in chosen])


def _parts(source: Source) -> dict[str, Split]:
    """The parts that there are, by name."""
    parts = {"train": source.train, "validation": source.validation, "test": source.test}
    return {name: part for name, part in parts.items() if part is not None}


def _each(source: Source, change: Callable[[Split], Split]) -> Source:
    validation = None if source.validation is None else change(source.validation)
    return source._replace(train=change(source.train), test=change(source.test), validation=validation)


def _decoded(source: Source) -> Source:
    parts, stream = _parts(source), source.stream
    if stream is None:
        size = sum(len(part) for part in parts.values()) * math.prod(source.train.image_shape)
        stream = size > MEMORY_LIMIT
    return source if stream else _each(source, Split.decoded)


def _signature(name: str, source: Source) -> dict[str, Any]:
    parts = _parts(source)
    return {
        "name": name,
        **{part: len(samples) for part, samples in parts.items()},
        "classes": len(source.names),
        "image_shape": list(source.train.image_shape),
        "sha256": fingerprint(parts.values(), source.names),
    }


def fingerprint(parts: Iterable[Split], names: Sequence[str]) -> str:
    """sha256 over the class names and, for each split, all labels, all sample numbers, and 64 images evenly spaced."""
    digest = hashlib.sha256("\n".join(names).encode())
    for part in parts:
        for tensor in (part.labels, part.index, part.peek(64)):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        if part.metres is not None:
            digest.update(str(part.metres).encode())
    return digest.hexdigest()


def locate(what: str, root: str | os.PathLike[str] | None, below: str = "", hint: str = "") -> Path:
    """``root/below`` as given, else under ``$DISTPRO_DATA``. Raises UserError, which begins with ``what`` and ends
    with ``hint``, if neither exists."""
    if root is None and not below:
        raise UserError(f"{what} needs 'root', the path of its data")
    path = Path(root or ".").expanduser() / below
    tried = [path]
    if not path.is_absolute() and os.environ.get("DISTPRO_DATA"):
        tried.append(Path(os.environ["DISTPRO_DATA"]) / path)
    for place in tried:
        if place.exists():
            return place
    aside = "" if path.is_absolute() or len(tried) > 1 else "; $DISTPRO_DATA is not set"
    raise UserError(f"{what}: nothing at {' or at '.join(map(str, tried))}{aside}{hint}")
