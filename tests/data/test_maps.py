"""Label maps: they move with their images, are void where nothing is shown, and go where one label cannot."""

import math

import pytest
import torch

from distpro.data import Loader, Split, build_augment, split
from distpro.data.augment import apply, draw_for
from distpro.data.splits import keep_classes, sample
from pathways.registry import UserError

CUTOUT, SCALE = {"cutout": {"size": 3}}, {"scale": {"range": [0.5, 2.0]}}


def source(name, augmentation, numbers, row, col, height, width):
    """The pixel of an image of height x width that pixel (row, col) of one augmentation's image shows."""
    if name == "crop":
        p, (h, w) = augmentation.padding, augmentation.size or (height, width)
        top, left = (
            n * (size + 2 * p - part + 1) // 2**31
            for n, size, part in zip(numbers, (height, width), (h, w), strict=True)
        )
        return row + top - p, col + left - p
    if name == "flip":
        return row, width - 1 - col if numbers[0] < 2**30 else col
    if name == "rotate90":
        last = height - 1
        return [(row, col), (col, last - row), (last - row, last - col), (last - col, row)][numbers[0] * 4 // 2**31]
    if name == "scale":
        steps = augmentation.low + numbers[0] * (augmentation.high - augmentation.low + 1) // 2**31
        about = numbers[1] * height // 2**31, numbers[2] * width // 2**31
        return tuple(a + math.floor((x - a) * 65536 / steps + 0.5) for a, x in zip(about, (row, col), strict=True))
    return row, col


def reference(augment, numbers, image, labels):
    """Image and map of one sample, pixel by pixel, from the last augmentation to the first."""
    sizes = [labels.shape]
    for a in augment.values():
        size = getattr(a, "size", None)
        sizes.append(size if isinstance(size, tuple) else sizes[-1])
    found, out = torch.zeros(3, *sizes[-1], dtype=torch.uint8), torch.full(sizes[-1], 255, dtype=torch.uint8)
    for row in range(sizes[-1][0]):
        for col in range(sizes[-1][1]):
            y, x, shown = row, col, True
            steps = zip(reversed(augment.items()), reversed(numbers), sizes[-2::-1], strict=True)
            for (name, a), drawn, (height, width) in steps:
                y, x = source(name, a, drawn, y, x, height, width)
                shown = shown and 0 <= y < height and 0 <= x < width
            if shown:
                found[:, row, col], out[row, col] = image[:, y, x], labels[y, x]
    return found, out


@pytest.mark.parametrize(
    "spec, size",
    [
        (["crop", "flip"], (6, 9)),
        ([SCALE], (7, 10)),
        ([SCALE, {"crop": {"size": [5, 6]}}, "flip"], (8, 9)),
        (["flip", {"crop": {"size": [10, 4], "padding": 2}}, SCALE], (8, 5)),
        (["rotate90", SCALE, {"crop": {"padding": 1}}], (7, 7)),
        ([{"crop": {"size": [5, 5]}}, "rotate90"], (6, 9)),
        (["flip", CUTOUT, {"crop": {"size": [4, 5]}}], (6, 9)),
    ],
)
def test_maps_and_images_move_alike(spec, size):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (40, 3, *size), dtype=torch.uint8, generator=generator)
    maps = torch.randint(0, 11, (40, *size), dtype=torch.uint8, generator=generator)
    augment = build_augment(spec)
    drawn = [draw_for(name, a, torch.arange(40), seed=1, epoch=2) for name, a in augment.items()]
    found, kept, labels = apply(list(augment.values()), images, drawn, maps)
    assert labels.dtype == torch.uint8
    for n in range(40):
        image, expected = reference(augment, [numbers[n].tolist() for numbers in drawn], images[n], maps[n])
        assert torch.equal(labels[n], expected)
        seen = torch.ones_like(expected, dtype=torch.bool) if kept is None else kept[n]
        assert torch.equal(found[n][:, seen], image[:, seen])


def test_what_is_not_shown_is_black_and_void_and_what_is_erased_keeps_its_label():
    whole = Split.of(torch.full((30, 3, 8, 8), 255, dtype=torch.uint8), torch.full((30, 8, 8), 4, dtype=torch.uint8))
    options = {"mean": [0.5] * 3, "std": [0.5] * 3, "shuffle": False, "drop_last": False}
    batch = next(Loader(whole, 30, augment=[{"crop": {"padding": 3}}], **options).epoch(0))
    assert batch.target.dtype == torch.int64 and batch.target.shape == (30, 8, 8) and batch.samples == 30
    assert torch.equal(batch.target == 255, batch.inputs[:, 0] == -1)
    assert 0 < (batch.target == 255).float().mean() < 0.6 and set(batch.target.unique().tolist()) == {4, 255}
    batch = next(Loader(whole, 30, augment=[{"cutout": {"size": 4}}], **options).epoch(0))
    assert (batch.inputs == 0).any() and (batch.target == 4).all()


def test_a_factor_of_one_changes_nothing_and_others_show_what_they_say():
    images = torch.arange(400, dtype=torch.int64).view(1, 1, 20, 20).remainder(251).byte().repeat(50, 1, 1, 1)
    maps = torch.zeros(50, 20, 20, dtype=torch.uint8)
    for factor, shown in ((1.0, 400), (0.5, 100), (2.0, 400)):
        [(name, scale)] = build_augment([{"scale": {"range": [factor, factor]}}]).items()
        found, _, labels = apply([scale], images, [draw_for(name, scale, torch.arange(50), 0, 0)], maps)
        assert ((labels == 0).sum((1, 2)) == shown).all()
        assert torch.equal(found, images) == (factor == 1)


def test_scale_draws_its_whole_range():
    [(name, scale)] = build_augment(["scale"]).items()
    numbers = draw_for(name, scale, torch.arange(4000), 0, 0)[:, 0]
    factor = (scale.low + (numbers * (scale.high - scale.low + 1) >> 31)) / scale.unit
    assert factor.min() < 0.51 and factor.max() > 1.99 and abs(factor.mean() - 1.25) < 0.03


@pytest.mark.parametrize(
    "spec, message",
    [
        ([{"crop": {"size": 5}}], r"size must be \[height, width\]"),
        ([{"crop": {"size": [5, 0]}}], r"size must be \[height, width\]"),
        ([{"crop": {"size": [5, 5.5]}}], r"size must be \[height, width\]"),
        ([{"scale": {"range": [0, 1]}}], "range must be"),
        ([{"scale": {"range": [2, 1]}}], "range must be"),
    ],
)
def test_wrong_parameters(spec, message):
    with pytest.raises(UserError, match=message):
        build_augment(spec)


@pytest.fixture
def whole():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (41, 3, 6, 8), dtype=torch.uint8, generator=generator)
    return Split.of(images, torch.randint(0, 5, (41, 6, 8), dtype=torch.uint8, generator=generator))


def loader(part, **options):
    return Loader(part, 8, **{"mean": [0] * 3, "std": [1] * 3, "shuffle": True, "drop_last": True, **options})


def test_maps_belong_to_their_images(whole):
    for batch in loader(whole).epoch(1):
        assert torch.equal(batch.target, whole.labels[batch.index].long())
        assert torch.equal((batch.inputs * 255).round().byte(), whole.images[batch.index])


def test_a_crop_changes_the_size_of_both(whole):
    batch = next(loader(whole, augment=[{"crop": {"size": [4, 4]}}], channels_last=True).epoch(0))
    assert batch.inputs.shape == (8, 3, 4, 4) and batch.target.shape == (8, 4, 4)
    labelled = Split.of(whole.images, torch.zeros(41, dtype=torch.int64))
    turned = next(loader(labelled, augment=[{"crop": {"size": [4, 4]}}], expand="rotations").epoch(0))
    assert turned.inputs.shape == (32, 3, 4, 4) and (turned.samples, turned.rows_per_sample) == (8, 4)
    with pytest.raises(UserError, match="size 7x4 is larger than the images, 6x8 with padding 0"):
        loader(whole, augment=[{"crop": {"size": [7, 4]}}])


def test_sets_of_maps_are_split_at_random(whole):
    first, rest = split(whole, 0.3, seed=0)
    assert (len(first), len(rest)) == (12, 29)
    assert torch.equal(torch.cat([first.index, rest.index]).sort().values, torch.arange(41))
    assert torch.equal(first.labels, whole.labels[first.index])
    assert torch.equal(first.index, split(whole, 0.3, seed=0)[0].index)
    assert not torch.equal(first.index, split(whole, 0.3, seed=1)[0].index)
    assert len(sample(whole, 7, seed=0)) == 7


@pytest.mark.parametrize(
    "options, message",
    [
        ({"augment": ["mixup"], "num_classes": 5}, "'mixup' needs one label per image"),
        ({"augment": ["cutmix"], "num_classes": 5}, "'cutmix' needs one label per image"),
        ({"augment": ["resized_crop"]}, "needs a streamed data set"),
        ({"augment": [{"crop": {"size": [4, 4]}}], "expand": "rotations"}, "reads rotations needs one label per image"),
        ({"expand": "views"}, "expand must be '' or 'rotations', got 'views'"),
    ],
)
def test_what_needs_one_label_per_image(whole, options, message):
    with pytest.raises(UserError, match=message):
        loader(whole, **options)


def test_maps_of_other_sizes_and_kept_classes(whole):
    with pytest.raises(UserError, match=r"label maps \(41, 6, 7\) do not fit images of \(3, 6, 8\)"):
        loader(Split.of(whole.images, whole.labels[..., :7]))
    with pytest.raises(UserError, match="label maps cannot be cut down"):
        keep_classes(whole, [0, 1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_devices_agree(whole):
    augment = ["scale", {"crop": {"size": [5, 7], "padding": 1}}, "flip"]
    for ours, theirs in zip(
        loader(whole, augment=augment, device="cuda").epoch(1), loader(whole, augment=augment).epoch(1), strict=True
    ):
        assert ours.target.is_cuda and torch.equal(ours.target.cpu(), theirs.target)
        torch.testing.assert_close(ours.inputs.cpu(), theirs.inputs, rtol=1e-6, atol=1e-6)
