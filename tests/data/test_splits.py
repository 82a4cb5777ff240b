"""Seeded stratified choices."""

import pytest
import torch

from distpro.data.splits import Split, class_numbers, keep_classes, sample, split, stratified
from pathways.registry import UserError

NAMES = ["ant", "bee", "cat", "dog"]


def numbered(labels):
    """A split whose image n has the value n in each pixel."""
    labels = torch.as_tensor(labels)
    return Split.of(torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 2, 2), labels)


@pytest.fixture
def whole():
    return numbered(torch.randint(0, 4, (200,), generator=torch.Generator().manual_seed(0)))


def test_balanced_classes_give_equal_shares():
    labels = torch.arange(100).repeat(50)
    assert torch.equal(labels[stratified(labels, 1000, seed=0)].bincount(), torch.full((100,), 10))


@pytest.mark.parametrize("count", [1, 2, 3, 50, 119, 120])
def test_unbalanced_classes_keep_their_proportions(count):
    sizes = torch.tensor([70, 0, 30, 13, 7])
    labels = torch.repeat_interleave(torch.arange(5), sizes)
    rows = stratified(labels, count, seed=0)
    shares = labels[rows].bincount(minlength=5)
    assert shares.sum() == count
    assert len(rows.unique()) == count
    assert torch.equal(rows, rows.sort().values)
    assert ((shares - sizes * count / 120).abs() < 1).all()


@pytest.mark.slow
def test_each_sample_is_as_likely():
    labels = torch.arange(2).repeat(10)
    drawn = torch.cat([stratified(labels, 4, seed) for seed in range(2000)])
    hits = drawn.bincount(minlength=20)  # each in 1 of 5 choices: mean 400, standard deviation 17.9
    assert (hits - 400).abs().max() < 4 * (2000 * 0.2 * 0.8) ** 0.5


def test_split_is_a_stratified_partition(whole):
    train, val = split(whole, 0.8, seed=1)
    assert (len(train), len(val)) == (160, 40)
    assert torch.equal(torch.cat([train.index, val.index]).sort().values, torch.arange(200))
    for part, share in ((train, 0.8), (val, 0.2)):
        assert ((part.labels.bincount() - share * whole.labels.bincount()).abs() < 1).all()
        assert torch.equal(part.images[:, 0, 0, 0].long(), part.index)
        assert torch.equal(part.labels, whole.labels[part.index])


def test_split_follows_the_seed(whole):
    first, again, other = (split(whole, 0.8, seed)[0].index for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_parts_of_parts_keep_the_stored_numbers(whole):
    part = split(sample(whole, 100, seed=0), 0.5, seed=0)[1]
    assert torch.equal(part.images[:, 0, 0, 0].long(), part.index)


def test_the_global_random_numbers_are_left_alone(whole):
    before = torch.get_rng_state()
    split(sample(whole, 100, seed=0), 0.5, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_kept_classes_are_numbered_in_the_order_given(whole):
    part = keep_classes(whole, class_numbers(["dog", 1], NAMES))
    assert torch.equal(whole.labels[part.index], torch.tensor([3, 1])[part.labels])
    assert len(part) == ((whole.labels == 3) | (whole.labels == 1)).sum()


def test_a_number_of_classes_means_the_first():
    assert class_numbers(3, NAMES) == [0, 1, 2]


@pytest.mark.parametrize(
    "classes, message",
    [
        (5, "between 1 and 4, got 5"),
        (0, "between 1 and 4, got 0"),
        ([1, 4], "unknown class 4"),
        (["cad"], "did you mean 'cat'"),
        (["cat", 2], "different classes"),
        ([], "different classes"),
    ],
)
def test_wrong_classes(classes, message):
    with pytest.raises(UserError, match=message):
        class_numbers(classes, NAMES)


@pytest.mark.parametrize("count, expected", [(0, []), (4, [0, 50, 100, 150]), (200, range(200)), (999, range(200))])
def test_a_peek_is_evenly_spaced(whole, count, expected):
    assert whole.peek(count)[:, 0, 0, 0].tolist() == list(expected)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 0.001, 0.999])
def test_a_split_without_a_part_is_refused(whole, fraction):
    with pytest.raises(UserError, match="fraction"):
        split(whole, fraction, seed=0)


@pytest.mark.parametrize("count", [0, 201])
def test_more_samples_than_there_are(whole, count):
    with pytest.raises(UserError, match=f"between 1 and the 200 training images, got {count}"):
        sample(whole, count, seed=0)
