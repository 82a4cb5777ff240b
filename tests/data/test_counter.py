"""Counter-based random numbers: against published values, and their uniformity."""

import pytest
import torch

from distpro.data.augment import Crop, Cutout, draw_for
from distpro.data.counter import below, chance, draw, splitmix64

# First outputs of the reference SplitMix64 seeded with 1234567 (Vigna's splitmix64.c).
REFERENCE = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]


def test_splitmix64_gives_the_published_outputs():
    found = splitmix64(1234567, torch.arange(1, 6))
    assert [value % 2**64 for value in found.tolist()] == REFERENCE


def test_draws_are_the_top_bits():
    found = draw(1234567, torch.arange(1, 6))
    assert found.tolist() == [value >> 33 for value in REFERENCE]


def test_below_and_chance_cover_their_ranges():
    ends = torch.tensor([0, 2**31 - 1])
    assert below(ends, 9).tolist() == [0, 8]
    assert chance(ends, 0.0).tolist() == [False, False]
    assert chance(ends, 1.0).tolist() == [True, True]
    assert chance(torch.tensor([2**30 - 1, 2**30]), 0.5).tolist() == [True, False]


def offsets(index, epoch):
    return below(draw_for("crop", Crop(4), index, seed=3, epoch=epoch), 9)


def pairs(of):
    """Two numbers in 0..8 that ought to be independent, 40000 times."""
    index = torch.arange(40000)
    if of == "top and left of a sample":
        return offsets(index, 0).unbind(1)
    if of == "a sample in two epochs":
        return offsets(index, 0)[:, 0], offsets(index, 1)[:, 0]
    if of == "neighbouring samples":
        return offsets(index, 0)[:, 0], offsets(index + 1, 0)[:, 0]
    if of == "two augmentations":
        return offsets(index, 0)[:, 0], below(draw_for("cutout", Cutout(), index, seed=3, epoch=0), 9)[:, 0]
    return tuple(torch.stack([offsets(torch.tensor([7]), e)[0] for e in range(4000)]).unbind(1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "of",
    [
        "top and left of a sample",
        "a sample in two epochs",
        "neighbouring samples",
        "two augmentations",
        "epochs of one sample",
    ],
)
def test_draws_are_uniform_and_independent(of):
    first, second = pairs(of)
    counts = torch.bincount(9 * first + second, minlength=81).double()
    expected = len(first) / 81
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert 46.52 < chi_square < 124.84  # 0.1 % and 99.9 % quantiles for 80 degrees of freedom
