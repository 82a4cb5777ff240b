"""What a loader gives and a training step takes. Nothing here knows of images or labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pathways.call import Call, map_tensors, tensors_in
from pathways.registry import UserError


@dataclass(frozen=True)
class Batch:
    """One batch of samples, all tensors on one device.

    Attributes:
        inputs: what the models are called with: a tensor, a tuple of positional arguments, a list (one argument, as
            detection models take it), a mapping of keyword arguments, or a `Call`.
        target: what the task compares with: labels (N,) int64, or (N, K) probabilities where augmentation mixes
            samples; label maps (N, H, W) int64; a list of mappings; ...
        samples: N. It is stated by who makes the batch and never guessed from a tensor.
        index: (N,) int64 sample numbers in the set as stored, or None.
        rows_per_sample: rows of the inputs (and so of taps) per sample, those of a sample one after the other: 4 where
            each image is followed by its rotations.
    """

    inputs: Any
    target: Any
    samples: int
    index: Tensor | None = None
    rows_per_sample: int = 1

    @property
    def call(self) -> Call:
        """The arguments of a model's forward pass, without what a task may add."""
        return Call.of(self.inputs)

    def to(self, place: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with ``place`` of every tensor, for instance on another device."""
        return Batch(
            map_tensors(place, self.inputs),
            map_tensors(place, self.target),
            self.samples,
            None if self.index is None else place(self.index),
            self.rows_per_sample,
        )


class Unstacked(list):
    """The inputs of a batch, one item a sample, that are no tensor because their sizes differ."""


def stacked_call(task: str, batch: Batch) -> Call:
    """The arguments of a model that takes a batch as one tensor. Raises UserError, with the name of the ``task``, for images of
    several sizes, of which the data set's own code has not made one."""
    if isinstance(batch.inputs, Unstacked):
        sizes = " and ".join(str(size) for size in sorted({tuple(image.shape) for image in batch.inputs})[:2])
        raise UserError(
            f"{task}: samples of a batch differ in size, {sizes}: resize them in the data set, or give it a collate_fn"
        )
    return batch.call


def batch_of(inputs: Any, target: Any = None, index: Tensor | None = None) -> Batch:
    """A batch with one row per sample: as many samples as the first tensor of the inputs has rows, or a list items.

    Raises UserError where there is no such tensor, or a number (): a graph, an object."""
    first = Call.of(inputs)
    values = [*first.args, *first.kwargs.values()]
    if values and isinstance(values[0], list):
        return Batch(inputs, target, len(values[0]), index)
    tensor = next(tensors_in(values), None)
    if tensor is None or tensor.dim() == 0:
        found = (
            f"no tensor in {type(inputs).__name__}" if tensor is None else "their first tensor is a number, shape ()"
        )
        raise UserError(
            f"inputs: how many samples they hold cannot be told ({found}); give distpro.batch.Batch(inputs, target, samples=N) in "
            "their place"
        )
    return Batch(inputs, target, len(tensor), index)


def not_empty(batch: Batch) -> Batch:
    """The batch. Raises UserError for one without samples, whose mean loss is no number."""
    if batch.samples == 0:
        raise UserError("inputs: a batch without samples has no loss; leave it out")
    return batch
