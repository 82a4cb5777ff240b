"""Batches of images in memory."""

from itertools import islice

import pytest
import torch

from distpro.data import Batch, Loader, Split, split
from pathways.registry import UserError
from tests.conftest import DEVICE

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PARTS = ("inputs", "target", "index")
AUGMENT = ["crop", "flip", {"cutout": {"size": 4}}]


@pytest.fixture
def whole():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (103, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return Split.of(images, torch.randint(0, 5, (103,), generator=generator))


def training(part, batch_size=10, **options):
    return Loader(
        part, batch_size, mean=MEAN, std=STD, **{"augment": AUGMENT, "shuffle": True, "drop_last": True, **options}
    )


def evaluation(part, batch_size=10, **options):
    return Loader(part, batch_size, mean=MEAN, std=STD, shuffle=False, drop_last=False, **options)


def assert_same(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.samples == theirs.samples == len(ours.target)
        assert all(torch.equal(getattr(ours, part), getattr(theirs, part)) for part in PARTS)


def by_sample(batches):
    return {int(n): x for batch in batches for n, x in zip(batch.index, batch.inputs, strict=True)}


def test_values_are_normalised(whole):
    batch = next(evaluation(whole, 103).epoch(0))
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    expected = (whole.images.double() / 255 - mean) / std
    torch.testing.assert_close(batch.inputs.double(), expected, rtol=1e-6, atol=1e-6)
    assert batch.inputs.dtype == torch.float32
    assert torch.equal(batch.target, whole.labels)


def test_padding_is_black_and_cutout_is_the_mean(whole):
    black = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)])
    white = Split.of(torch.full_like(whole.images, 255), whole.labels)
    colours = (
        next(training(white, 103, drop_last=False).epoch(0)).inputs.permute(0, 2, 3, 1).reshape(-1, 3).unique(dim=0)
    )
    expected = torch.stack([black, torch.zeros(3), torch.tensor([2.5, 2.4, 7 / 3])])
    torch.testing.assert_close(colours, expected)


def test_evaluation_passes_once_in_order(whole):
    loader = evaluation(whole)
    batches = list(loader.epoch(0))
    assert [len(b.target) for b in batches] == [10] * 10 + [3]
    assert len(loader) == 11
    assert torch.equal(torch.cat([b.index for b in batches]), torch.arange(103))


def test_training_passes_at_most_once_in_a_new_order_each_epoch(whole):
    loader = training(whole)
    first, second = (torch.cat([b.index for b in loader.epoch(e)]) for e in (0, 1))
    assert len(first) == len(first.unique()) == 100 == 10 * len(loader)
    assert not torch.equal(first, second)
    assert not torch.equal(first, first.sort().values)


def test_labels_and_numbers_belong_to_the_images(whole):
    part = split(whole, 0.5, seed=0)[1]
    scale, shift = (torch.tensor(v).view(3, 1, 1) for v in (STD, MEAN))
    for batch in training(part, 7, augment=()).epoch(3):
        assert torch.equal(whole.labels[batch.index], batch.target)
        pixels = ((batch.inputs * scale + shift) * 255).round().to(torch.uint8)
        assert torch.equal(pixels, whole.images[batch.index])


@pytest.mark.parametrize("start", [0, 4, 9])
def test_an_epoch_from_the_middle_is_its_tail(whole, start):
    loader = training(whole)
    assert_same(loader.epoch(2, start), list(loader.epoch(2))[start:])
    assert_same(training(whole).epoch(2, start), list(loader.epoch(2))[start:])


def test_an_epoch_from_its_end_is_empty(whole):
    assert list(training(whole).epoch(0, 10)) == []


@pytest.mark.parametrize("start", [0, 7, 10, 23])
def test_endless_is_all_epochs_in_a_row(whole, start):
    loader = training(whole)
    row = [batch for epoch in range(4) for batch in loader.epoch(epoch)]
    assert_same(islice(loader.endless(start), 15), row[start : start + 15])


def test_the_global_random_numbers_are_neither_read_nor_changed(whole):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = list(training(whole).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert_same(training(whole).epoch(0), first)


def test_seeds_and_epochs_differ(whole):
    draws = [by_sample(training(whole, seed=s, drop_last=False).epoch(e)) for s, e in ((0, 0), (0, 1), (1, 0))]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        same = sum(torch.equal(draws[one][n], draws[other][n]) for n in range(103))
        assert same < 10  # by chance 1 in 81 * 2 * 64


@pytest.mark.parametrize(
    "options", [{"batch_size": 1}, {"batch_size": 64}, {"shuffle": False}, {"rank": 1, "world_size": 2}]
)
def test_a_sample_looks_the_same_in_any_batch(whole, options):
    usual = by_sample(training(whole, drop_last=False).epoch(5))
    found = by_sample(training(whole, **{"drop_last": False, **options}).epoch(5))
    assert len(found) in (103, 51, 52)
    assert all(torch.equal(x, usual[n]) for n, x in found.items())


def test_a_sample_looks_the_same_in_any_split(whole):
    usual = by_sample(training(whole, drop_last=False).epoch(5))
    part = by_sample(training(split(whole, 0.5, seed=0)[1], drop_last=False).epoch(5))
    assert all(torch.equal(x, usual[n]) for n, x in part.items())


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_batches_of_one_process(whole, world_size):
    ranks = [list(training(whole, 6, rank=r, world_size=world_size).epoch(1)) for r in range(world_size)]
    parts = zip(*ranks, strict=True)
    joined = [
        Batch(
            *(torch.cat([getattr(part, p) for part in step]) for p in PARTS[:2]),
            6 * world_size,
            torch.cat([b.index for b in step]),
        )
        for step in parts
    ]
    assert_same(joined, training(whole, 6 * world_size).epoch(1))


def test_ranks_share_the_last_small_batch(whole):
    last = [list(evaluation(whole, 10, rank=r, world_size=4).epoch(0))[-1] for r in range(4)]
    assert [len(b.target) for b in last] == [5, 6, 6, 6]  # 103 - 2 * 40
    assert torch.equal(torch.cat([b.index for b in last]), torch.arange(80, 103))


def test_channels_last_changes_the_layout_alone(whole):
    plain, other = (list(training(whole, channels_last=flag).epoch(0)) for flag in (False, True))
    assert_same(other, plain)
    assert other[0].inputs.is_contiguous(memory_format=torch.channels_last)
    assert plain[0].inputs.is_contiguous()


def test_batches_do_not_share_memory_with_the_split(whole):
    stored = whole.images.clone()
    for batch in evaluation(whole).epoch(0):
        batch.inputs.zero_()
    assert torch.equal(whole.images, stored)


@pytest.mark.cuda
def test_devices_agree(whole):
    for ours, theirs in zip(training(whole, device=DEVICE).epoch(1), training(whole).epoch(1), strict=True):
        assert {t.device.type for t in (ours.inputs, ours.target, ours.index)} == {torch.device(DEVICE).type}
        assert torch.equal(ours.index.cpu(), theirs.index)
        torch.testing.assert_close(ours.inputs.cpu(), theirs.inputs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 104}, "103 samples, fewer than one batch of 104"),
        ({"batch_size": 60, "world_size": 2}, "fewer than one batch of 120"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"rank": 1}, "rank < world_size"),
        ({"augment": ["resized_crop"]}, "needs a streamed data set"),
        ({"augment": ["flp"]}, "did you mean 'flip'"),
    ],
)
def test_wrong_options(whole, options, message):
    with pytest.raises(UserError, match=message):
        training(whole, **options)


@pytest.mark.parametrize("mean, std", [((0.5,), STD), (MEAN, (0.2,)), (MEAN, (0.2, 0.2, 0.0))])
def test_wrong_mean_and_std(whole, mean, std):
    with pytest.raises(UserError, match="mean and std must be 3 numbers each"):
        Loader(whole, 10, mean=mean, std=std, shuffle=False, drop_last=False)
