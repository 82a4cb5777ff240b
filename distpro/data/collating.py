"""From the samples of somebody's data set to a `Batch`: drawn under a random state of their own, stacked, and read."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, default_collate, default_convert

from distpro.batch import Batch, Unstacked
from distpro.console import raised
from distpro.data.counter import make_key
from pathways.call import Call, map_tensors
from pathways.registry import UserError

TARGETS = ("labels", "label", "target", "targets")
READABLE = (
    f"(inputs, target), a mapping with one of the keys {', '.join(TARGETS)}, or a distpro.Batch; for anything else "
    "give to_batch, a function that makes a distpro.Batch of it"
)


class RandomState:
    """The random numbers of Python, numpy and PyTorch on the CPU as they are after seeding with ``parts``, and with
    them those of ``generators``. They are the process's inside of ``with state:``, and go on where they were at the
    next; outside nothing changes."""

    def __init__(self, *parts: int | str, generators: Sequence[torch.Generator] = ()):
        self._generators = generators
        outer = self._states()
        seed_process(*parts)
        for generator in generators:
            generator.manual_seed(make_key(*parts, "own"))
        self._inner = self._states()
        self._set(outer)

    def __enter__(self) -> None:
        self._outer = self._states()
        self._set(self._inner)

    def __exit__(self, *_: object) -> None:
        self._inner = self._states()
        self._set(self._outer)

    def _states(self) -> list[Any]:
        own = [generator.get_state() for generator in self._generators]
        return [torch.get_rng_state(), random.getstate(), np.random.get_state(), *own]

    def _set(self, states: list[Any]) -> None:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
        for generator, state in zip(self._generators, states[3:], strict=True):
            generator.set_state(state)


def seed_process(*parts: int | str) -> None:
    """Seed the random numbers of Python, numpy and PyTorch on the CPU."""
    key = make_key(*parts) % 2**63
    torch.default_generator.manual_seed(key)
    random.seed(key)
    np.random.seed(key % 2**32)


def type_name(value: Any) -> str:
    """``package.Type`` of a value, short for what is built in."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def stored_numbers(part: Any) -> Tensor:
    """The numbers of a map-style data set's samples, (N,) int64: those in the set that it is a ``Subset`` of."""
    if isinstance(part, Subset):
        return stored_numbers(part.dataset)[torch.as_tensor(part.indices, dtype=torch.int64)]
    return torch.arange(len(part))


def drawn_samples(part: Any, rows: Sequence[int], numbers: Sequence[int], seed: int, epoch: int) -> list[Any]:
    """The samples ``rows``, the random numbers of each a function of (seed, epoch, its stored number); the process's
    stay as they were. Raises UserError that names the sample where the data set fails."""
    samples = []
    with RandomState(seed, epoch):
        for row, number in zip(rows, numbers, strict=True):
            seed_process(seed, epoch, "sample", number)
            try:
                samples.append(part[row])
            except UserError:
                raise
            except Exception as error:  # a data set of the user's may fail in any way
                raise UserError(
                    f"data: sample {number} of {type_name(root_of(part))} failed: {raised(error)}"
                ) from error
    return samples


def root_of(part: Any) -> Any:
    """What a data set is a ``Subset`` of, or itself."""
    return root_of(part.dataset) if isinstance(part, Subset) else part


def collated(part: Any, samples: Sequence[Any]) -> Any:
    """Samples as one batch: by the data set's own ``collate_fn`` if it has one, else stacked as PyTorch does.

    Tuples stay tuples. Of pairs (inputs, target) that cannot be stacked because their sizes differ, and of all whose
    target is a mapping with ``boxes``, the inputs and the targets become lists, as detection models take them.
    Raises UserError for samples of other sizes, for what is no tensor, array or number, and where ``collate_fn`` fails.
    """
    own = getattr(part, "collate_fn", None) or getattr(root_of(part), "collate_fn", None)
    if callable(own):
        return _answer("collate_fn", own, samples)
    try:
        if not _is_pair(samples[0]):
            return _stacked(samples)
        inputs, targets = [s[0] for s in samples], [s[1] for s in samples]
        if _has_boxes(targets[0]):
            return default_convert(inputs), default_convert(targets)
        stacked = _stacked_or_list(inputs, Tensor | np.ndarray)
        return Unstacked(stacked) if isinstance(stacked, list) else stacked, _stacked_or_list(targets, object)
    except (TypeError, KeyError, RuntimeError, ValueError) as error:
        rule = "bring them to one size" if _sizes_differ(error) else "return tensors, arrays or numbers"
        why = " ".join(str(error).split())
        raise UserError(
            f"data: samples of {type_name(root_of(part))} cannot be stacked ({why}): {rule}, or give the data set an "
            "attribute collate_fn"
        ) from None


def _answer(name: str, function: Callable[[Any], Any], value: Any) -> Any:
    """``function(value)``. Raises UserError where it fails."""
    try:
        return function(value)
    except UserError:
        raise
    except Exception as error:  # somebody's code may fail in any way
        raise UserError(f"data: {name} failed: {raised(error)}") from error


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def _has_boxes(target: Any) -> bool:
    return isinstance(target, Mapping) and "boxes" in target


def _sizes_differ(error: Exception) -> bool:
    return "equal size" in str(error)


def _stacked(values: Sequence[Any]) -> Any:
    if isinstance(values[0], tuple) and not hasattr(values[0], "_fields"):
        return tuple(_stacked(column) for column in zip(*values, strict=True))
    return default_collate(list(values))


def _stacked_or_list(values: list[Any], kind: Any) -> Any:
    """Values stacked; a list of them if their sizes differ and they are of ``kind``."""
    try:
        return _stacked(values)
    except RuntimeError as error:
        if _sizes_differ(error) and isinstance(values[0], kind):
            return default_convert(values)
        raise


def as_batch(part: Any, value: Any, to_batch: Callable[[Any], Batch] | None = None) -> Batch:
    """What a data set or DataLoader gives for several samples, as a `Batch` where it lies.

    ``value``: a `Batch`; a pair (inputs, target); a mapping with one of `TARGETS`, of which the rest are the inputs.
    Anything else is read by ``to_batch``, or by an attribute of that name of the part. Inputs of which the targets are
    several mappings are a list, one per sample. Raises UserError for what cannot be read.
    """
    for owner in (part, getattr(part, "dataset", None), root_of(part)):
        own = getattr(owner, "to_batch", None)
        if callable(own):
            to_batch = own
            break
    if isinstance(value, Batch):
        return value
    if to_batch is not None:
        batch = _answer("to_batch", to_batch, value)
        if not isinstance(batch, Batch):
            raise UserError(f"data: to_batch gave {type_name(batch)}, not a distpro.Batch")
        return batch
    inputs, target = _halves(value)
    if isinstance(inputs, tuple) and isinstance(target, tuple | list) and all(isinstance(t, Mapping) for t in target):
        inputs, target = list(inputs), list(target)
    samples = _count(inputs)
    check_targets(samples, target)
    return Batch(inputs, target, samples)


def _halves(value: Any) -> tuple[Any, Any]:
    if _is_pair(value):
        return value[0], value[1]
    if isinstance(value, Mapping):
        found = [key for key in TARGETS if key in value]
        if len(found) == 1:
            return {key: inner for key, inner in value.items() if key != found[0]}, value[found[0]]
        what = f"a mapping with the keys {', '.join(map(str, value))}"
    else:
        what = f"a {type(value).__name__} of {len(value)}" if isinstance(value, tuple | list) else type_name(value)
    raise UserError(f"data: a batch is {what}; it must be {READABLE}")


def _count(inputs: Any) -> int:
    """Samples of a batch's inputs: the length of a list, the first size of the first tensor of anything else."""
    if isinstance(inputs, list) and inputs:
        return len(inputs)
    first = next(Call.of(inputs).tensors(), None)
    if first is None or first.ndim == 0:
        raise UserError(
            f"data: the inputs of a batch hold no tensor whose first size is the samples ({type_name(inputs)})"
        )
    return len(first)


def check_targets(samples: int, target: Any) -> None:
    """Raise UserError where a batch's target is a tensor with another number of rows than there are samples."""
    if isinstance(target, Tensor) and target.ndim and len(target) != samples:
        raise UserError(
            f"data: the first tensor of a batch's inputs has {samples} rows, but there are {len(target)} targets; "
            "give whole Batches, or a to_batch function"
        )


def placed(batch: Batch, device: str | torch.device, channels_last: bool) -> Batch:
    """The batch on a device; with ``channels_last`` its images, the float inputs of four dimensions, in that layout."""
    device = torch.device(device)

    def image(tensor: Tensor) -> Tensor:
        laid = channels_last and tensor.ndim == 4 and tensor.is_floating_point()
        return tensor.contiguous(memory_format=torch.channels_last) if laid else tensor

    batch = batch.to(lambda tensor: tensor.to(device, non_blocking=True))
    return replace(batch, inputs=map_tensors(image, batch.inputs))


def unlisted(loader: DataLoader, value: Any) -> Any:
    """What a DataLoader gives, with the inputs of a pair as a tuple again: PyTorch stacks tuples to lists, but a list
    stands for one argument of a model."""
    if loader.collate_fn is default_collate and _is_pair(value) and isinstance(value[0], list):
        return tuple(value[0]), value[1]
    return value
