"""Batches of somebody else's ``Dataset`` or ``DataLoader``, each a function of (seed, epoch, step) where it can be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_convert,
)
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data.distributed import DistributedSampler

from distpro.batch import Batch
from distpro.console import raised
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
from distpro.data.counter import make_generator
from distpro.data.foreign import ALLOWED, is_map_style
from distpro.data.order import BatchLoader, Plan
from pathways.call import tensors_in
from pathways.registry import UserError

TRIED = 4  # samples that are drawn twice
REPLAYED = (RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler, DistributedSampler)


class ForeignLoader(BatchLoader):
    """Batches of ``part``, of the kinds that `from_objects` takes.

    Of a map-style data set, batches of ``batch_size`` in an order that depends on (seed, epoch), as those of `Loader`.
    The random numbers of Python, numpy and PyTorch that a sample is drawn with depend on (seed, epoch, sample number),
    whatever the number of ``workers``, those of ``collate_fn`` on the samples of its batch; a generator that the data
    set keeps for itself is out of reach. ``batch.index`` is the sample's number in the data set, in the whole one if
    ``part`` is a ``Subset``. A process whose part of a smaller last batch is empty has one batch less than ``len()``
    says.

    A DataLoader's batches are as it makes them: batch_size, shuffle, drop_last and workers are its own, and in several
    processes its sampler must give each its share. It runs under random numbers that depend on (seed, epoch), its own
    generators among them, and is told the epoch (``set_epoch``) if it can be. ``start`` reads and leaves out batches.

    An iterable data set is put into a DataLoader. ``to_batch``: see `from_objects`.

    Raises UserError for a part of another type or without a length, and as the batches are read.
    """

    def __init__(
        self,
        part: Any,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        drop_last: bool = False,
        device: str | torch.device = "cpu",
        channels_last: bool = False,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        to_batch: Callable[[Any], Batch] | None = None,
    ):
        self.device, self.channels_last = torch.device(device), channels_last
        self._part, self._to_batch, self._seed = part, to_batch, seed
        self._source: _Drawn | _Given
        if isinstance(part, IterableDataset):
            collate = partial(collated, part)
            given = DataLoader(part, batch_size, drop_last=drop_last, num_workers=workers, collate_fn=collate)
            self._source = _Given(given, seed, world_size)
        elif isinstance(part, DataLoader):
            self._source = _Given(part, seed, world_size)
        elif is_map_style(part):
            plan = Plan(len(part), batch_size, shuffle, seed, drop_last, rank, world_size)
            self._source = _Drawn(part, plan, workers, self.device.type == "cuda")
        else:
            raise UserError(f"data: a part is {type_name(part)}; it must be {ALLOWED}")
        self.why_not = self._source.why_not or (_draws_by_itself(part, seed) if shuffle else "")
        self.replayable = not self.why_not

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self._source)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step ``start`` on."""
        for step, (value, index) in enumerate(self._source.values(epoch, start), start):
            with RandomState(self._seed, epoch, "to_batch", step):
                batch = as_batch(self._part, value, self._to_batch)
            if index is not None:
                if batch.samples != len(index):
                    raise UserError(
                        f"data: {len(index)} samples make a batch of {batch.samples}; give to_batch, a function that "
                        "makes a distpro.Batch of what collate_fn gives"
                    )
                batch = replace(batch, index=index)
            yield placed(batch, self.device, self.channels_last)


def _draws_by_itself(part: Any, seed: int) -> str:
    """Why samples do not come again, where some of the first ones, drawn twice, differ; else ""."""
    data: Any = part.dataset if isinstance(part, DataLoader) else part
    if not is_map_style(data):
        return ""
    rows = list(range(min(len(data), TRIED)))
    numbers = stored_numbers(data)[rows].tolist()
    try:
        first, second = (drawn_samples(data, rows, numbers, seed, 0) for _ in range(2))
    except UserError:  # is said, with its place, when the batch is read
        return ""
    if _same_values(first, second):
        return ""
    return (
        f"{type_name(root_of(data))} gives another sample each time it is asked for it: it keeps a generator of its own"
    )


def _same_values(one: Any, other: Any) -> bool:
    """Whether two samples are equal, as far as they hold tensors and arrays."""
    ours, theirs = (list(tensors_in(default_convert(x))) for x in (one, other))
    return len(ours) == len(theirs) and all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(ours, theirs, strict=True)
    )


class _Drawn:
    """Collated samples of a map-style data set, with their stored numbers."""

    why_not = ""

    def __init__(self, part: Any, plan: Plan, workers: int, pin_memory: bool):
        self.part, self.plan, self.workers, self.pin_memory = part, plan, workers, pin_memory
        self.numbers = stored_numbers(part)

    def __len__(self) -> int:
        return len(self.plan)

    def values(self, epoch: int, start: int) -> Iterator[tuple[Any, Tensor]]:
        order = self.plan.order(epoch)
        arrange = getattr(root_of(self.part), "arrange", None)  # of a set that puts samples of like length together
        if arrange is not None and self.plan.shuffle:
            order = order[arrange(self.numbers[order], self.plan, epoch)]
        batches = [order[self.plan.part(step)] for step in range(start, len(self.plan))]
        batches = [rows for rows in batches if len(rows)]
        ahead = DataLoader(
            _Drawing(self.part, self.numbers, self.plan.seed, epoch),
            batch_size=None,
            sampler=[rows.tolist() for rows in batches],  # type: ignore[arg-type]  # a sampler of whole batches
            num_workers=self.workers,
            collate_fn=_same,
            pin_memory=self.pin_memory,
            generator=make_generator(self.plan.seed, epoch, "workers"),  # else it would draw from the global one
        )
        for rows, value in zip(batches, ahead, strict=True):
            if isinstance(value, UserError):
                raise value
            yield value, self.numbers[rows]


class _Drawing(TorchDataset):
    """Draws and collates a batch of samples, in a worker process."""

    def __init__(self, part: Any, numbers: Tensor, seed: int, epoch: int):
        self.part, self.numbers, self.seed, self.epoch = part, numbers, seed, epoch

    def __getitem__(self, rows: list[int]) -> Any:
        try:
            numbers = self.numbers[rows].tolist()
            samples = drawn_samples(self.part, rows, numbers, self.seed, self.epoch)
            with RandomState(self.seed, self.epoch, "batch", *numbers):
                return collated(self.part, samples)
        except UserError as error:  # raised here it would reach the user as a worker's traceback
            return error


def _same(value: Any) -> Any:
    return value


class _Given:
    """The batches of a DataLoader."""

    def __init__(self, loader: DataLoader, seed: int, world_size: int):
        self.loader, self.seed = loader, seed
        self.batches, self.sampler = loader.batch_sampler, loader.sampler
        if type(self.batches) is BatchSampler:
            self.sampler = self.batches.sampler  # type: ignore[assignment]
        try:
            self.length = len(loader)
        except (TypeError, NotImplementedError):
            raise UserError(f"data: {type_name(loader.dataset)} has no length: give it a __len__") from None
        if self.length == 0:
            raise UserError(f"data: a DataLoader of {type_name(loader.dataset)} has no batch")
        alone = self._known and not isinstance(self.sampler, DistributedSampler)
        if world_size > 1 and alone:
            raise UserError(
                f"data: in {world_size} processes a DataLoader needs a DistributedSampler, not "
                f"{type_name(self.sampler)}; or give its Dataset"
            )
        self.why_not = self._why_not()

    @property
    def _known(self) -> bool:
        """Whether the order is made by a sampler whose random numbers are all within reach."""
        iterable = isinstance(self.loader.dataset, IterableDataset)
        return not iterable and type(self.batches) in (BatchSampler, type(None)) and type(self.sampler) in REPLAYED

    def _why_not(self) -> str:
        loader = self.loader
        if isinstance(loader.dataset, IterableDataset):
            return f"{type_name(loader.dataset)} is an iterable data set, which gives its samples as it likes"
        if not self._known:
            own = self.sampler if type(self.batches) in (BatchSampler, type(None)) else self.batches
            return f"the order comes from {type_name(own)}, which may differ from one pass to the next"
        if loader.num_workers and loader.persistent_workers:
            return "the DataLoader's persistent_workers draw their random numbers on from epoch to epoch"
        if loader.num_workers and not loader.in_order:
            return "the DataLoader's in_order is false, so its batches come as they are ready"
        return ""

    def __len__(self) -> int:
        return self.length

    def values(self, epoch: int, start: int) -> Iterator[tuple[Any, None]]:
        owners = (self.loader, self.sampler, self.batches, self.loader.dataset)
        found = [getattr(owner, "generator", None) for owner in owners[:3]]
        generators = list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
        for owner in owners[1:]:
            if callable(getattr(owner, "set_epoch", None)):
                owner.set_epoch(epoch)  # type: ignore[union-attr]
        state, iterator = RandomState(self.seed, epoch, "loader", generators=generators), None
        for step in range(self.length):
            with state:
                try:
                    iterator = iter(self.loader) if iterator is None else iterator
                    value = next(iterator)
                except StopIteration:
                    raise UserError(f"data: a DataLoader gave {step} batches, but its len() is {self.length}") from None
                except UserError:
                    raise
                except Exception as error:  # somebody's code may fail in any way
                    raise UserError(f"data: a DataLoader failed at batch {step}: {raised(error)}") from error
            if step >= start:
                yield unlisted(self.loader, value), None
