"""Data sets that somebody else has made: PyTorch's ``Dataset`` and ``DataLoader``, as they are.

What is random in them is a function of (seed, epoch, sample), as in the rest of the project, where PyTorch lets it be:
their code runs under random states of its own (Python's, numpy's, PyTorch's), and the process's are left as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from distpro.batch import Batch
from distpro.data.collating import (
    RandomState,
    as_batch,
    collated,
    drawn_samples,
    placed,
    root_of,
    stored_numbers,
    type_name,
    unlisted,
)
from distpro.data.splits import check_count, parted, stratified
from pathways.call import tensors_in
from pathways.registry import UserError, nearest

PARTS = ("train", "validation", "test")
ALLOWED = (
    "a torch.utils.data.Dataset or DataLoader, or an object with __len__ and __getitem__ whose samples are "
    "(inputs, target)"
)


@dataclass(frozen=True, eq=False)
class ForeignDataset:
    """A data set of `from_objects`. ``signature``: plain values that state what was given: types and lengths; the
    contents are not looked at. ``validation``, ``names``, ``classes``, ``to_batch``: None where not known."""

    train: Any
    validation: Any
    test: Any
    names: list[str] | None = None
    classes: int | None = None
    to_batch: Callable[[Any], Batch] | None = None

    mean = std = ()  # images come normalised, if they do

    @property
    def num_classes(self) -> int | None:
        return len(self.names) if self.names is not None else self.classes

    @property
    def signature(self) -> dict[str, Any]:
        parts = {part: getattr(self, part) for part in PARTS}
        said = {part: f"{type_name(x)}, {_length(x)} samples" for part, x in parts.items() if x is not None}
        return {"name": "objects", **said, "classes": self.num_classes, "note": "the contents are not hashed"}

    @property
    def facts(self) -> dict[str, Any]:
        """What is known of the data; how they are normalised is not."""
        return self.signature

    @cached_property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of the first sample's first tensor, None if that is no image."""
        inputs = self.example(1).inputs
        first = next(tensors_in(inputs), None)
        shape = () if first is None else tuple(first.shape if isinstance(inputs, list) else first.shape[1:])
        return (shape[0], shape[1], shape[2]) if len(shape) == 3 else None

    def example(self, n: int = 2, device: str | torch.device = "cpu", channels_last: bool = False) -> Batch:
        """``n`` training samples, evenly spaced, as a batch; fewer if there are fewer. Of an iterable data set they are
        the first ones, and a DataLoader that does not batch by itself gives its first batch, whatever its size."""
        part = self.train
        with RandomState(0, "example"):
            if isinstance(part, DataLoader):
                value = _first_of(part, n)
            else:
                value = collated(part, _spaced(part, n) if is_map_style(part) else list(islice(iter(part), n)))
            batch = as_batch(part, value, self.to_batch)
        return placed(batch, device, channels_last)


def from_objects(
    train: Any,
    validation: Any,
    test: Any,
    names: Sequence[str] | None = None,
    num_classes: int | None = None,
    to_batch: Callable[[Any], Batch] | None = None,
) -> ForeignDataset:
    """A data set of PyTorch's objects: each part a ``Dataset`` (map-style or iterable) or a ``DataLoader``.

    train, validation, test: ``validation`` may be None; a search then takes a fraction of a map-style training set.
    names: of the classes; default: the training set's attribute ``classes``. num_classes: without names; both may be
    unknown where the task needs none.
    to_batch: a `Batch` of what the collated samples are, where they are neither (inputs, target) nor a mapping with one
    of the keys label, labels, target, targets. A part's own attribute ``to_batch`` goes first.

    Raises UserError for a part of another type, an empty part, and names that do not fit ``num_classes``.
    """
    for part, value in zip(PARTS, (train, validation, test), strict=True):
        if value is None and part == "validation":
            continue
        if not (isinstance(value, DataLoader | IterableDataset) or is_map_style(value)):
            raise UserError(f"data: the {part} part is {type_name(value)}; it must be {ALLOWED}")
        try:
            length = len(value) if is_map_style(value) else _length(value)
        except Exception as error:  # a data set of the user's may fail in any way
            raise UserError(
                f"data: the {part} part, {type_name(value)}, has no length: {type(error).__name__}: {error}"
            ) from error
        if length == 0:
            raise UserError(f"data: the {part} part is empty")
    found = names if names is not None else _class_names(train)
    if num_classes is not None and found is not None and len(found) != num_classes:
        if names is not None:
            raise UserError(f"data: {len(found)} names, but num_classes is {num_classes}")
        found = None
    return ForeignDataset(train, validation, test, None if found is None else list(found), num_classes, to_batch)


def adopt(value: Any, what: str = "data") -> ForeignDataset:
    """The data set that somebody hands over as a `ForeignDataset`, a tuple (train, test) or (train, validation, test),
    or a mapping of arguments of `from_objects`. Raises UserError, beginning with ``what``, for anything else."""
    if isinstance(value, ForeignDataset):
        return value
    if isinstance(value, tuple) and len(value) in (2, 3):
        return from_objects(value[0], value[1] if len(value) == 3 else None, value[-1])
    if isinstance(value, Mapping):
        allowed = (*PARTS, "names", "num_classes", "to_batch")
        for key in value:
            if key not in allowed:
                raise UserError(f"{what}: unknown part '{key}'{nearest(key, allowed)} (allowed: {', '.join(allowed)})")
        for key in ("train", "test"):
            if key not in value:
                raise UserError(f"{what}: there is no '{key}' part (given: {', '.join(map(str, value)) or 'none'})")
        return from_objects(**{"validation": None, **value})
    raise UserError(
        f"{what}: got {type_name(value)}; it must be (train, test), (train, validation, test), or a mapping of these, "
        f"each {ALLOWED}"
    )


def is_map_style(part: Any) -> bool:
    """Whether samples can be had by number."""
    wrong = str | bytes | Mapping | Tensor | np.ndarray | IterableDataset | DataLoader
    return not isinstance(part, wrong) and hasattr(part, "__getitem__") and hasattr(part, "__len__")


def split(part: Any, fraction: float, seed: int) -> tuple[Subset, Subset]:
    """Two parts of a map-style data set, ``fraction`` and the rest, seeded; the order of the samples is kept.
    Stratified where the data set has its labels as ``targets`` or ``labels``, a flat sequence of whole numbers. Raises
    UserError for anything else, and for a fraction that is not between 0 and 1 or leaves a part empty."""
    first, rest = parted(_strata(part, "cannot be split: give a validation set"), fraction, seed)
    return Subset(part, first.tolist()), Subset(part, rest.tolist())


def take(part: Any, count: int, seed: int) -> Subset:
    """``count`` samples of a map-style data set, stratified as by `split`. Raises UserError as that does."""
    strata = _strata(part, "gives its samples as it likes: leave out samples")
    check_count(count, len(strata))
    return Subset(part, stratified(strata, count, seed).tolist())


def labels_of(part: Any) -> Tensor | None:
    """The labels of a map-style data set's samples, (N,) int64, where it has them as ``targets`` or ``labels``, a flat sequence of
    whole numbers; else None."""
    if not is_map_style(part):
        return None
    root, numbers = root_of(part), stored_numbers(part)
    for name in ("targets", "labels"):
        try:
            labels = torch.as_tensor(np.asarray(getattr(root, name, None)))
        except (TypeError, ValueError):  # objects, or rows of different lengths
            continue
        if labels.shape == (len(root),) and not labels.is_floating_point() and not labels.is_complex():
            return labels[numbers].long()
    return None


def _strata(part: Any, otherwise: str) -> Tensor:
    """A class number per sample, (N,) int64, all 0 where they are not known without reading the samples."""
    if not is_map_style(part):
        raise UserError(f"data: {type_name(part)} {otherwise}")
    labels = labels_of(part)
    return torch.zeros(len(part), dtype=torch.int64) if labels is None else torch.unique(labels, return_inverse=True)[1]


def _class_names(part: Any) -> list[str] | None:
    """The attribute ``classes`` of a data set, below loaders and subsets, where it is a list of words."""
    while part is not None:
        names = getattr(part, "classes", None)
        if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
            return list(names)
        part = getattr(part, "dataset", None)
    return None


def _length(part: Any) -> int | None:
    """Samples, of a DataLoader those of its data set; None if not known."""
    part = part.dataset if isinstance(part, DataLoader) else part
    try:
        return len(part) if isinstance(part, Sized) else None
    except (TypeError, NotImplementedError):  # what a data set of unknown length raises
        return None


def _spaced(part: Any, n: int) -> list[Any]:
    """At most ``n`` samples of a map-style data set, evenly spaced."""
    n = min(n, len(part))
    rows = [row * len(part) // n for row in range(n)]
    return drawn_samples(part, rows, stored_numbers(part)[rows].tolist(), 0, 0)


def _first_of(loader: DataLoader, n: int) -> Any:
    """``n`` samples of what a DataLoader reads, collated as it does, without its processes."""
    data, batches = loader.dataset, loader.batch_sampler is not None
    if isinstance(data, IterableDataset):
        samples = list(islice(iter(data), n if batches else 1))
    else:
        samples = _spaced(data, n) if batches else [data[key] for key in islice(loader.sampler, 1)]
    if not samples:
        raise UserError("data: the training set is empty")
    return unlisted(loader, loader.collate_fn(samples if batches else samples[0]))
