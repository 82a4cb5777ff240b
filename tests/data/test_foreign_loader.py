"""Batches of somebody else's Datasets and DataLoaders can be replayed, whatever is random in them."""

import random
import re
from itertools import islice

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

from distpro.batch import Batch
from distpro.data import from_objects, make_loader, split
from pathways.registry import UserError
from tests.data.foreign_sets import Boxes, Noisy, Stream, Texts, assert_same, foreign, states


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_replayed_exactly(workers):
    usual = list(foreign(Noisy()).epoch(4))
    before = states()
    assert_same(foreign(Noisy(), workers=workers).epoch(4), usual)
    assert_same(foreign(Noisy(), workers=workers).epoch(4, 3), usual[3:])
    assert states() == before
    torch.manual_seed(77)
    random.seed(77)
    assert_same(foreign(Noisy(), workers=workers).epoch(4), usual)
    loader = foreign(Noisy(), workers=workers)
    assert (len(loader), loader.replayable, loader.why_not) == (5, True, "")
    assert_same(islice(loader.endless(23), 3), [*usual[3:], next(loader.epoch(5))])


def by_sample(batches):
    return {int(n): x for batch in batches for n, x in zip(batch.index, batch.inputs, strict=True)}


def test_samples_are_their_own_and_change_with_epoch_and_seed():
    usual = by_sample(foreign(Noisy()).epoch(0))
    assert sorted(usual) == list(range(23)) and all(int(x[0]) == n for n, x in usual.items())
    assert all(len({float(x[k]) for x in usual.values()}) == 23 for k in (1, 2, 3))
    for other in (foreign(Noisy()).epoch(1), foreign(Noisy(), seed=4).epoch(0)):
        found = by_sample(other)
        assert list(found) != list(usual) and all(not (found[n][1:] == usual[n][1:]).any() for n in usual)
    for options in ({"batch_size": 23}, {"shuffle": False}, {"rank": 1, "world_size": 2}):
        found = by_sample(foreign(Noisy(), **options).epoch(0))
        assert all(torch.equal(x, usual[n]) for n, x in found.items())
    part = split(Noisy(), 0.5, seed=0)[1]
    found = by_sample(foreign(part).epoch(0))
    assert len(found) == 11 and all(torch.equal(x, usual[n]) for n, x in found.items())


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_batches_of_one_process(world_size):
    ranks = [
        list(foreign(Noisy(), 3, rank=r, world_size=world_size, drop_last=True).epoch(1)) for r in range(world_size)
    ]
    whole = list(foreign(Noisy(), 3 * world_size, drop_last=True).epoch(1))
    assert len(whole) == len(ranks[0])
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([rank[step].inputs for rank in ranks]), batch.inputs)
    plain = [list(foreign(Noisy(), 5, shuffle=False, rank=r, world_size=4).epoch(0)) for r in range(4)]
    assert [sum(b.samples for b in rank) for rank in plain] == [5, 6, 6, 6]
    assert torch.equal(torch.cat([b.index for rank in plain for b in rank]).sort().values, torch.arange(23))
    one = [list(foreign(Noisy(7), 2, shuffle=False, rank=r, world_size=3).epoch(0)) for r in range(3)]
    assert [len(r) for r in one] == [1, 1, 2]  # the seventh sample is one rank's


def test_mappings_tuples_and_batches():
    batch = next(foreign(Texts(), shuffle=False).epoch(0))
    assert set(batch.inputs) == {"input_ids", "attention_mask"} and batch.samples == 5
    assert torch.equal(batch.inputs["input_ids"][:, 0], torch.arange(5))
    assert torch.equal(batch.target, torch.arange(5) % 2)
    pair = [((torch.ones(2), torch.zeros(3)), n) for n in range(6)]
    for part in (pair, DataLoader(pair, 3)):
        batch = next(foreign(part, 3).epoch(0))
        assert isinstance(batch.inputs, tuple) and [x.shape for x in batch.inputs] == [(3, 2), (3, 3)]
    own = DataLoader(pair, 3, collate_fn=lambda samples: Batch(torch.ones(6, 2), None, 3, rows_per_sample=2))
    assert next(foreign(own).epoch(0)).rows_per_sample == 2


def test_images_are_laid_out_as_asked():
    part = TensorDataset(torch.rand(6, 3, 4, 4), torch.arange(6), torch.rand(6, 1))
    part.to_batch = lambda value: Batch((value[0], value[2]), value[1], len(value[1]))
    batch = next(foreign(part, channels_last=True).epoch(0))
    assert batch.inputs[0].is_contiguous(memory_format=torch.channels_last)
    plain = next(foreign(part).epoch(0))
    assert torch.equal(batch.inputs[0], plain.inputs[0]) and plain.inputs[0].is_contiguous()


@pytest.mark.parametrize("workers", [0, 2])
def test_detection_samples_become_lists(workers):
    batch = next(foreign(Boxes(), shuffle=False, workers=workers).epoch(0))
    assert [tuple(x.shape) for x in batch.inputs] == [(3, 8, 8 + n % 2) for n in range(5)] and batch.samples == 5
    assert [len(t["boxes"]) for t in batch.target] == [0, 1, 2, 0, 1]
    assert all(isinstance(t["boxes"], torch.Tensor) for t in batch.target)
    single = next(foreign(Subset(Boxes(), [1, 7]), shuffle=False).epoch(0))  # of one size, and one box each
    assert isinstance(single.inputs, list) and isinstance(single.target, list)
    loader = DataLoader(Boxes(), 3, collate_fn=lambda samples: tuple(zip(*samples, strict=True)))
    batch = next(foreign(loader).epoch(0))
    assert isinstance(batch.inputs, list) and batch.samples == 3 and isinstance(batch.target[0], dict)


def test_images_of_several_sizes_become_lists_and_words_do_not():
    batch = next(foreign([(torch.ones(3, 4, 4 + n), n) for n in range(5)], shuffle=False).epoch(0))
    assert len(batch.inputs) == batch.samples == 5 and torch.equal(batch.target, torch.arange(5))
    words = [{"input_ids": torch.ones(n + 1), "label": n} for n in range(5)]
    with pytest.raises(
        UserError, match="samples of list cannot be stacked .*equal size.*bring them to one size, or give"
    ):
        next(foreign(words).epoch(0))
    with pytest.raises(UserError, match="return tensors, arrays or numbers"):
        next(foreign([(object(), n) for n in range(5)]).epoch(0))


def test_a_collate_fn_of_the_data_set_is_used():
    part = Noisy()
    part.collate_fn = lambda samples: {
        "x": torch.stack([s[0] for s in samples]) + 1,
        "target": torch.ones(len(samples)),
    }
    batch = next(foreign(split(part, 0.5, 0)[0]).epoch(0))
    assert set(batch.inputs) == {"x"} and torch.equal(batch.inputs["x"][:, 0], batch.index + 1.0)


@pytest.mark.parametrize("workers", [0, 2])
def test_random_numbers_of_collate_fn_and_to_batch_are_replayed(workers):
    part = Noisy()
    part.collate_fn = lambda samples: (torch.rand(len(samples), 2), torch.full((len(samples),), np.random.rand()))
    part.to_batch = lambda value: Batch(value[0] + torch.rand(()), value[1], len(value[0]))
    before = states()
    usual = list(foreign(part).epoch(1))
    assert_same(foreign(part, workers=workers).epoch(1, 1), usual[1:])
    assert len({float(b.inputs[0, 0]) for b in [*usual, *foreign(part).epoch(2)]}) == 10
    assert torch.equal(
        from_objects(part, None, part).example(3).inputs, from_objects(part, None, part).example(3).inputs
    )
    assert states() == before


@pytest.mark.parametrize("name", ["collate_fn", "to_batch"])
def test_functions_that_fail_are_named(name):
    part = Noisy()
    setattr(part, name, lambda value: 1 / 0)
    for workers in (0, 1):
        with pytest.raises(UserError, match=f"^data: {name} failed: ZeroDivisionError: division by zero"):
            next(foreign(part, workers=workers).epoch(0))


def loaders():
    generator = torch.Generator().manual_seed(8)
    weights = [1.0] * 23
    return {
        "shuffle": lambda: DataLoader(Noisy(), 5, shuffle=True),
        "in order": lambda: DataLoader(Noisy(), 5),
        "workers": lambda: DataLoader(Noisy(), 5, shuffle=True, num_workers=2),
        "own generator": lambda: DataLoader(Noisy(), 5, shuffle=True, generator=generator),
        "own sampler": lambda: DataLoader(Noisy(), 5, sampler=RandomSampler(Noisy(), True, 23, generator=generator)),
        "weights": lambda: DataLoader(Noisy(), 5, sampler=WeightedRandomSampler(weights, 23)),
        "batches": lambda: DataLoader(Noisy(), batch_sampler=BatchSampler(RandomSampler(Noisy()), 5, False)),
        "distributed": lambda: DataLoader(Noisy(), 5, sampler=DistributedSampler(Noisy(), 1, 0)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", list(loaders()))
def test_a_dataloader_is_replayed_exactly(name):
    part = loaders()[name]()
    loader = foreign(part)
    assert loader.replayable, loader.why_not
    usual, before = list(loader.epoch(1)), states()
    torch.manual_seed(12)
    assert len(usual) == len(loader) == 5 and [b.samples for b in usual] == [5, 5, 5, 5, 3]
    assert_same(loader.epoch(1), usual)
    assert_same(foreign(part).epoch(1, 2), usual[2:])
    assert_same(foreign(loaders()[name]()).epoch(1), usual)
    other = list(loader.epoch(2))
    assert (name == "in order") == all(
        torch.equal(a.inputs[:, 0], b.inputs[:, 0]) for a, b in zip(usual, other, strict=True)
    )
    assert not any((a.inputs[:, 1] == b.inputs[:, 1]).any() for a, b in zip(usual, other, strict=True))
    torch.set_rng_state(torch.tensor(before[0], dtype=torch.uint8))
    assert states() == before


def test_interleaved_epochs_of_a_dataloader_do_not_disturb_each_other():
    own = torch.Generator().manual_seed(0)
    part = DataLoader(Noisy(), 5, sampler=RandomSampler(Noisy(), replacement=True, num_samples=60, generator=own))
    loader = foreign(part)
    first, second, state = list(loader.epoch(0)), list(loader.epoch(1)), own.get_state()
    mixed = list(zip(loader.epoch(0), loader.epoch(1), strict=True))
    assert_same([m[0] for m in mixed], first)
    assert_same([m[1] for m in mixed], second)
    assert torch.equal(own.get_state(), state)


class Odd(RandomSampler):
    pass


@pytest.mark.parametrize(
    "part, why",
    [
        (Stream(), "iterable data set"),
        (DataLoader(Stream(), 5), "iterable data set"),
        (DataLoader(Noisy(), 5, sampler=Odd(Noisy())), r"order comes from .*Odd"),
        (DataLoader(Noisy(), batch_sampler=[[0, 1], [2, 3]]), "order comes from list"),
        (DataLoader(Noisy(), 5, num_workers=1, persistent_workers=True), "persistent_workers"),
    ],
)
def test_what_cannot_be_replayed_says_why(part, why):
    loader = foreign(part)
    assert not loader.replayable
    assert re.search(why, loader.why_not)
    assert len(list(loader.epoch(0))) == len(loader) in (2, 5)
    assert len(list(loader.epoch(0, 1))) == len(loader) - 1
    assert next(loader.epoch(0)).index is None


@pytest.mark.parametrize(
    "part, message",
    [
        (Stream(length=None), "Stream has no length: give it a __len__"),
        (DataLoader(Noisy(2), 5, drop_last=True), "has no batch"),
        (torch.rand(5, 3), "a part is torch.Tensor; it must be a torch.utils.data.Dataset or DataLoader"),
        ({"a": 1}, "a part is dict"),
        (Noisy(0), "the split has 0 samples, fewer than one batch of 5"),
    ],
)
def test_wrong_parts(part, message):
    with pytest.raises(UserError, match=message):
        foreign(part)


def test_an_iterable_that_ends_early_is_named():
    with pytest.raises(UserError, match=r"gave 1 batches, but its len\(\) is 2"):
        list(foreign(Stream(count=5)).epoch(0))


class Broken(Noisy):
    def __getitem__(self, n):
        if n == 7:
            raise OSError("no such file")
        return super().__getitem__(n)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_fails_is_named(workers):
    message = r"^data: sample 7 of .*Broken failed: OSError: no such file \(.*test_foreign_loader.py, line \d+\)$"
    for part in (Broken(), Subset(Broken(), [3, 7])):
        with pytest.raises(UserError, match=message):
            list(foreign(part, workers=workers).epoch(0))
    with pytest.raises(UserError, match="a DataLoader failed at batch 1: OSError: .*no such file"):
        list(foreign(DataLoader(Broken(), 5, num_workers=workers)).epoch(0))


@pytest.mark.parametrize(
    "sample, message",
    [
        ((torch.ones(2), 1, 2), r"a batch is a (list|tuple) of 3; it must be \(inputs, target\), .* give to_batch"),
        ({"x": torch.ones(2), "y": 1}, "a batch is a mapping with the keys x, y; it must be"),
        ({"x": torch.ones(2), "label": 1, "labels": 1}, "a batch is a mapping with the keys x, label, labels"),
        (torch.ones(2), "a batch is torch.Tensor; it must be"),
        (({"word": "a"}, 1), "hold no tensor whose first size is the samples"),
    ],
)
def test_batches_that_cannot_be_read(sample, message):
    with pytest.raises(UserError, match=message):
        next(foreign([sample] * 6).epoch(0))


@pytest.mark.slow
def test_to_batch_reads_what_nothing_else_can():
    part = TensorDataset(torch.rand(6, 2), torch.arange(6), torch.arange(6))

    def to_batch(value):
        return Batch(value[0], value[1], len(value[0]))

    assert next(foreign(part, to_batch=to_batch).epoch(0)).samples == 5
    data = from_objects(part, None, part, to_batch=to_batch)
    assert data.example(3).target.tolist() == [0, 2, 4]
    batch = next(make_loader(data, data.test, 4, training=False).epoch(0))
    assert batch.target.tolist() == batch.index.tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match="to_batch gave int, not a distpro.Batch"):
        next(foreign(part, to_batch=lambda value: 3).epoch(0))
    with pytest.raises(UserError, match="5 samples make a batch of 2"):
        next(foreign(part, to_batch=lambda value: Batch(value[0], value[1], 2)).epoch(0))


def test_processes_need_a_distributed_sampler():
    with pytest.raises(UserError, match="in 2 processes a DataLoader needs a DistributedSampler, not .*RandomSampler"):
        foreign(DataLoader(Noisy(), 5, shuffle=True), world_size=2)
    parts = [DataLoader(Noisy(22), 5, sampler=DistributedSampler(Noisy(22), 2, rank, seed=1)) for rank in range(2)]
    found = [by_number(foreign(part, rank=rank, world_size=2).epoch(3)) for rank, part in enumerate(parts)]
    assert sorted(found[0] + found[1]) == list(range(22))
    assert found[0] != by_number(foreign(parts[0], world_size=2).epoch(2))  # it has been told the epoch


def by_number(batches):
    return [int(x[0]) for batch in batches for x in batch.inputs]


class OwnGenerator(Noisy):
    """``kind``: whose generator draws."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.torch, self.numpy = kind, torch.Generator().manual_seed(0), np.random.default_rng(0)
        self.python = random.Random(0)

    def __getitem__(self, n):
        drawn = {
            "torch": lambda: torch.rand((), generator=self.torch),
            "numpy": lambda: self.numpy.random(2),
            "python": lambda: torch.tensor(self.python.random()),
            "none": lambda: torch.rand(()),
        }
        return drawn[self.kind](), n % 2


@pytest.mark.parametrize("wrap", [lambda part: part, lambda part: Subset(part, [3, 1, 7]), DataLoader])
@pytest.mark.parametrize("kind", ["torch", "numpy", "python", "none"])
def test_a_generator_of_its_own_is_found_out(kind, wrap):
    loader = foreign(wrap(OwnGenerator(kind)))
    assert loader.replayable == (kind == "none")
    assert ("OwnGenerator gives another sample each time" in loader.why_not) == (kind != "none")
    assert foreign(wrap(OwnGenerator(kind)), shuffle=False).replayable  # evaluation reads it once an epoch, as it comes
