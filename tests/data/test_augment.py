"""Batched augmentations against the same steps done image by image with plain slicing."""

import pytest
import torch
import torch.nn.functional as F

from distpro.data.augment import apply, build_augment, draw_for
from pathways.registry import UserError

CROP, CUTOUT = {"crop": {"padding": 3}}, {"cutout": {"size": 5}}


def naive(name, augmentation, numbers, image, kept):
    """One step on one image (C, H, W) and its mask (H, W)."""
    height, width = kept.shape
    if name == "crop":
        p = augmentation.padding
        top, left = (n * (2 * p + 1) // 2**31 for n in numbers)
        window = (..., slice(top, top + height), slice(left, left + width))
        return F.pad(image, (p, p, p, p))[window], F.pad(kept, (p, p, p, p), value=True)[window]
    if name == "flip":
        return (image.flip(-1), kept.flip(-1)) if numbers[0] < 2**30 else (image, kept)
    if name == "rotate90":
        turns = numbers[0] * 4 // 2**31
        return tuple(torch.rot90(x, turns, (-2, -1)) for x in (image, kept))
    side, kept = augmentation.size, kept.clone()
    top, left = (n * size // 2**31 - side // 2 for n, size in zip(numbers, (height, width), strict=True))
    kept[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = False
    return image, kept


@pytest.mark.parametrize(
    "spec, size",
    [
        (["crop", "flip"], (12, 12)),
        ([CROP, "flip"], (8, 12)),
        (["flip", CROP], (8, 12)),
        (["rotate90"], (9, 9)),
        ([CROP, "rotate90", "flip"], (9, 9)),
        (["rotate90", CROP], (8, 8)),
        ([CUTOUT], (8, 12)),
        ([CROP, CUTOUT], (8, 12)),
        ([CUTOUT, CROP], (8, 12)),
        (["flip", CUTOUT, "rotate90", CROP], (10, 10)),
    ],
)
def test_batch_equals_image_by_image(spec, size):
    images = torch.randint(1, 256, (200, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augment = build_augment(spec)
    drawn = [draw_for(name, a, torch.arange(200), seed=1, epoch=2) for name, a in augment.items()]
    found, kept, _ = apply(list(augment.values()), images, drawn)
    kept = torch.ones(200, *size, dtype=torch.bool) if kept is None else kept
    for n in range(200):
        image, mask = images[n], torch.ones(size, dtype=torch.bool)
        for (name, a), numbers in zip(augment.items(), drawn, strict=True):
            image, mask = naive(name, a, numbers[n].tolist(), image, mask)
        assert torch.equal(kept[n], mask)
        assert torch.equal(found[n][:, mask], image[:, mask])  # a pixel that is not kept has no colour


def test_all_outcomes_occur():
    index = torch.arange(4000)
    flips = draw_for("flip", build_augment(["flip"])["flip"], index, 0, 0) < 2**30
    turns = draw_for("rotate90", build_augment(["rotate90"])["rotate90"], index, 0, 0) * 4 >> 31
    assert abs(flips.double().mean().item() - 0.5) < 4 * 0.5 / 4000**0.5
    assert (turns.flatten().bincount() - 1000).abs().max() < 4 * (4000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize("p, mirrored", [(0.0, False), (1.0, True)])
def test_flip_probability(p, mirrored):
    images = torch.arange(48, dtype=torch.uint8).view(4, 1, 3, 4)
    flip = build_augment([{"flip": {"p": p}}])["flip"]
    found, _, _ = apply([flip], images, [draw_for("flip", flip, torch.arange(4), 0, 0)])
    assert torch.equal(found, images.flip(-1) if mirrored else images)


def test_an_augmentation_does_not_depend_on_the_others():
    index = torch.arange(50)
    alone, among = build_augment(["flip"])["flip"], build_augment([CROP, "rotate90", "flip"])["flip"]
    assert torch.equal(draw_for("flip", alone, index, 0, 1), draw_for("flip", among, index, 0, 1))


def test_input_images_stay_as_they_are():
    images = torch.full((4, 3, 8, 8), 200, dtype=torch.uint8)
    augment = build_augment(["crop"])
    apply(list(augment.values()), images, [draw_for("crop", augment["crop"], torch.arange(4), 0, 0)])
    assert (images == 200).all()


@pytest.mark.parametrize(
    "spec, message",
    [
        (["crp"], "did you mean 'crop'"),
        ([{"crop": {"pading": 4}}], "did you mean 'padding'"),
        ([{"crop": {"padding": -1}}], "padding must be"),
        ([{"flip": {"p": 2}}], "p must be"),
        ([{"cutout": {"size": 0}}], "size must be"),
        ([{"resized_crop": {"scale": [0.5, 2]}}], "scale must be"),
        ([{"crop": 4}], "must be a name or"),
        ([{"crop": {}, "flip": {}}], "must be a name or"),
        (["flip", "flip"], "given twice"),
        ("flip", "must be a list"),
        ({"crop": {}}, "must be a list"),
    ],
)
def test_wrong_specs_say_what_is_wrong(spec, message):
    with pytest.raises(UserError, match=message):
        build_augment(spec)


def test_rotation_of_oblong_images_is_refused():
    turn = build_augment(["rotate90"])["rotate90"]
    with pytest.raises(UserError, match="square images, got 4x6"):
        apply([turn], torch.zeros(1, 3, 4, 6, dtype=torch.uint8), [torch.zeros(1, 1, dtype=torch.int64)])
