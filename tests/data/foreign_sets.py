"""Data sets as somebody else would write them, shared by the tests of foreign data."""

import random

import numpy as np
import torch
from torch.utils.data import (
    Dataset,
    IterableDataset,
)

from distpro.data import ForeignLoader


class Noisy(Dataset):
    """Sample n is n and three random numbers, of each generator there is."""

    classes = ["even", "odd"]

    def __init__(self, count=23):
        self.targets = [n % 2 for n in range(count)]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, n):
        return torch.tensor([n, torch.rand(()), np.random.rand(), random.random()]), self.targets[n]


class Texts(Noisy):
    def __getitem__(self, n):
        return {"input_ids": np.full(5, n), "attention_mask": torch.ones(5), "label": n % 2}


class Boxes(Noisy):
    def __getitem__(self, n):
        return torch.rand(3, 8, 8 + n % 2), {"boxes": np.ones((n % 3, 4), np.float32), "labels": torch.ones(n % 3)}


class Stream(IterableDataset):
    def __init__(self, count=10, length=10):
        self.count, self.length = count, length

    def __iter__(self):
        return iter(Noisy()[n] for n in range(self.count))

    def __len__(self):
        if self.length is None:
            raise TypeError
        return self.length


def foreign(part, batch_size=5, **options):
    return ForeignLoader(part, batch_size, **{"shuffle": True, "seed": 3, "drop_last": False, **options})


def same(ours, theirs):
    assert torch.equal(ours.inputs, theirs.inputs) and torch.equal(ours.target, theirs.target)
    assert ours.samples == theirs.samples
    assert (ours.index is None and theirs.index is None) or torch.equal(ours.index, theirs.index)


def assert_same(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        same(ours, theirs)


def states():
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
