"""What every loader is to a trainer, and which samples make up which batch on which process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distpro.batch import Batch
from distpro.data.counter import make_generator
from pathways.registry import UserError


class BatchLoader:
    """Base. All that a trainer and a searcher ask of a loader is what stands here.

    Attributes:
        replayable: whether ``epoch(e, s)`` gives the same batches each time it is called with the same numbers. A
            search that looks back over past steps needs that, and so does a run that continues after a break.
        why_not: where it is not replayable, the reason in words, as the end of a sentence; else "".
    """

    replayable: bool = True
    why_not: str = ""

    def __len__(self) -> int:
        """Batches per epoch, the same on each rank."""
        raise NotImplementedError

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, counted from 0, from step ``start`` on."""
        raise NotImplementedError

    def endless(self, start: int = 0) -> Iterator[Batch]:
        """The batches of all epochs one after the other, from step ``start`` on."""
        epoch, step = divmod(start, len(self))
        while True:
            yield from self.epoch(epoch, step)
            epoch, step = epoch + 1, 0


@dataclass(frozen=True)
class Plan:
    """Which of ``samples`` positions are whose, a pure function of (seed, epoch, step, rank).

    Each step's batch of ``batch_size * world_size`` samples is cut into parts of ``batch_size``; a smaller last batch
    into parts that differ by at most one sample (shuffled: equal parts, up to world_size - 1 samples of an epoch are
    left out). Raises UserError where there is not one batch.

    With ``weights`` (samples,) a shuffled epoch draws its samples with replacement, in proportion to them; with ``repeats`` each
    comes so many times one after the other, and an epoch, which is no longer, has that much fewer of them.
    """

    samples: int
    batch_size: int
    shuffle: bool
    seed: int
    drop_last: bool
    rank: int = 0
    world_size: int = 1
    repeats: int = 1
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        size, rank, ranks = self.batch_size, self.rank, self.world_size
        if size < 1 or not 0 <= rank < ranks:
            raise UserError(f"need batch_size >= 1 and 0 <= rank < world_size, got {size}, {rank}, {ranks}")
        if self._used < (self.global_batch if self.drop_last else 1):
            raise UserError(f"the split has {self._used} samples, fewer than one batch of {self.global_batch}")

    @property
    def global_batch(self) -> int:
        """Samples per step, of all ranks together."""
        return self.batch_size * self.world_size

    @property
    def _used(self) -> int:
        return self.samples - self.samples % self.world_size if self.shuffle else self.samples

    def __len__(self) -> int:
        """Steps per epoch."""
        return self._used // self.global_batch if self.drop_last else -(-self._used // self.global_batch)

    def order(self, epoch: int) -> Tensor:
        """The positions in the order of an epoch, (samples,) int64 on the CPU."""
        if not self.shuffle:
            return torch.arange(self.samples)
        # always drawn on the CPU: the generators of other devices give other permutations
        generator = make_generator(self.seed, epoch, "order")
        if self.weights is not None:
            order = torch.multinomial(self.weights, self.samples, replacement=True, generator=generator)
        else:
            order = torch.randperm(self.samples, generator=generator)
        return order if self.repeats == 1 else order.repeat_interleave(self.repeats)[: self.samples]

    def part(self, step: int) -> slice:
        """Where this rank's part of a step's batch lies in the order of the epoch."""
        first = step * self.global_batch
        size = min(self.global_batch, self._used - first)
        return slice(first + size * self.rank // self.world_size, first + size * (self.rank + 1) // self.world_size)


def occurrences(order: Tensor) -> Tensor:
    """How many times each position has come before in an order (N,), (N,) int64."""
    places = order.argsort(stable=True)
    sorted_order = order[places]
    first = torch.searchsorted(sorted_order, sorted_order)
    return torch.empty_like(order).scatter_(0, places, torch.arange(len(order)) - first)
