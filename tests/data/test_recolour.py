"""Augmentations by torchvision's transforms, and random erasing, against torchvision itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torchvision.transforms import v2

from distpro.data import Loader, Split
from distpro.data.augment import apply, build_augment, draw_for
from distpro.data.boxes import build_box_augment
from pathways.registry import UserError
from tests.conftest import DEVICE
from tests.data.test_folder import assert_same, load, loader, tree  # noqa: F401

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
KINDS = {
    "rand_augment": lambda: v2.RandAugment(num_ops=3, magnitude=20),
    "trivial_augment": v2.TrivialAugmentWide,
    "colour_jitter": lambda: v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
}
PARAMS = {"rand_augment": {"num_ops": 3, "magnitude": 20}, "trivial_augment": {}, "colour_jitter": {"hue": 0.1}}


def images(count=12, channels=3, size=(10, 14)):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, *size), dtype=torch.uint8, generator=generator)


def whole(**options):
    found = images(**options)
    return Split.of(found, torch.arange(len(found)) % 3)


def training(part, augment, **options):
    options = {"mean": MEAN, "std": STD, "shuffle": True, "drop_last": False, **options}
    return Loader(part, options.pop("batch_size", 4), augment=augment, **options)


@pytest.mark.parametrize("name", KINDS)
def test_each_image_is_torchvisions_under_its_own_seed(name):
    part, transform = images(), KINDS[name]()
    augment = build_augment([{name: PARAMS[name]}])
    drawn = draw_for(name, augment[name], torch.arange(12), seed=3, epoch=1)
    before = torch.get_rng_state()
    found, kept, _ = apply(list(augment.values()), part, [drawn])
    assert torch.equal(before, torch.get_rng_state()) and kept is None
    for image, changed, seed in zip(part, found, drawn[:, 0].tolist(), strict=True):
        torch.manual_seed(seed)
        assert torch.equal(transform(image), changed)
    assert not torch.equal(part, found) and torch.equal(part, images())


@pytest.mark.parametrize("name", KINDS)
def test_one_channel(name):
    found = next(training(whole(channels=1), [{name: PARAMS[name]}], mean=(0.5,), std=(0.2,)).epoch(0)).inputs
    assert found.shape == (4, 1, 10, 14) and found.isfinite().all()


AUGMENT = ["flip", {"rand_augment": {"magnitude": 20}}, {"crop": {"padding": 2}}, "colour_jitter", "random_erasing"]


def test_a_sample_looks_the_same_in_any_batch_from_any_start_on_any_rank():
    part = whole()
    batches = list(training(part, AUGMENT).epoch(2))
    assert_same(training(part, AUGMENT).epoch(2, start=1), batches[1:])
    known = {int(n): x for batch in batches for n, x in zip(batch.index, batch.inputs, strict=True)}
    for rank in (0, 1):
        for batch in training(part, AUGMENT, batch_size=3, rank=rank, world_size=2).epoch(2):
            assert all(torch.equal(known[int(n)], x) for n, x in zip(batch.index, batch.inputs, strict=True))
    other = next(training(part, AUGMENT).epoch(3))
    assert any(not torch.equal(known[int(n)], x) for n, x in zip(other.index, other.inputs, strict=True))


def test_the_order_is_that_of_the_list():
    part, names = images(), ["flip", "rand_augment", "crop"]
    augment = build_augment(names)
    drawn = [draw_for(name, a, torch.arange(12), 0, 0) for name, a in augment.items()]
    found = apply(list(augment.values()), part, drawn)[0]
    for a, numbers in zip(augment.values(), drawn, strict=True):
        part = apply([a], part, [numbers])[0]
    assert torch.equal(found, part)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_streamed_images_are_augmented_as_those_in_memory(tree, workers):  # noqa: F811
    """In the workers, after the crop of the file."""
    stream = load(tree, stream=True)
    memory = replace(stream, train=stream.train.decoded())
    assert_same(loader(stream, augment=AUGMENT, workers=workers).epoch(1), loader(memory, augment=AUGMENT).epoch(1))
    both = next(loader(stream, augment=["resized_crop", *AUGMENT]).epoch(0)).inputs
    alone = next(loader(stream, augment=["resized_crop"]).epoch(0)).inputs
    assert both.shape == alone.shape and not torch.equal(both, alone)


def test_label_maps_stay_where_they_are():
    part = replace(whole(), labels=torch.arange(140).view(1, 10, 14).repeat(12, 1, 1).to(torch.uint8))
    batch = next(training(part, ["colour_jitter"]).epoch(0))
    assert torch.equal(batch.target, part.labels[batch.index].long())
    plain = next(training(part, []).epoch(0))
    assert torch.equal(plain.target, batch.target) and not torch.equal(plain.inputs, batch.inputs)
    erased = next(training(part, [{"random_erasing": {"p": 1}}]).epoch(0))
    assert torch.equal(erased.target, batch.target) and (erased.inputs == 0).any()
    for name in ("rand_augment", "trivial_augment"):
        with pytest.raises(UserError, match=f"'{name}' moves pixels, and label maps would not follow"):
            training(part, [name])
        with pytest.raises(UserError, match=f"unknown augmentation of boxes '{name}'"):
            build_box_augment([name])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"rand_augment": {"magnitude": 31}}, "magnitude must be a whole number from 0 to 30, got 31"),
        ({"rand_augment": {"num_ops": 0}}, "num_ops must be a whole number of at least 1, got 0"),
        ({"colour_jitter": {"hue": 0.7}}, "augmentation 'colour_jitter': hue values should be between"),
        ({"random_erasing": {"p": 2}}, "p must be a probability between 0 and 1, got 2"),
        ({"random_erasing": {"scale": [0, 1]}}, "scale must be .* with 0 < low"),
        ({"trivial_augment": {"magnitude": 3}}, "has no parameter 'magnitude'"),
    ],
)
def test_bad_values(spec, message):
    with pytest.raises(UserError, match=message):
        build_augment([spec])


def test_what_blanks_comes_last():
    with pytest.raises(UserError, match="'rand_augment' must come before 'cutout'"):
        build_augment(["cutout", "rand_augment"])
    with pytest.raises(UserError, match="for images of 1 or 3 channels, got 4"):
        training(whole(channels=4), ["rand_augment"], mean=[0.5] * 4, std=[0.5] * 4)


# Random erasing

COUNT = 4000


def rectangles(size, **params):
    """(top, left, height, width) of each sample that is erased."""
    erasing = build_augment([{"random_erasing": params}])["random_erasing"]
    drawn = draw_for("random_erasing", erasing, torch.arange(COUNT), 0, 0)
    kept = apply([erasing], torch.zeros(COUNT, 1, *size, dtype=torch.uint8), [drawn])[1].expand(COUNT, *size)
    found = []
    for mask in ~kept[~kept.flatten(1).all(1)]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        box = (int(rows[0]), int(columns[0]), len(rows), len(columns))
        assert mask.sum() == len(rows) * len(columns)  # one rectangle
        assert rows[-1] - rows[0] + 1 == len(rows) and columns[-1] - columns[0] + 1 == len(columns)
        found.append(box)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
def test_the_rectangles_have_the_distribution_of_torchvisions(size):
    found = rectangles(size, p=0.7)
    assert abs(len(found) / COUNT - 0.7) < 3 * (0.7 * 0.3 / COUNT) ** 0.5
    torch.manual_seed(0)
    theirs = v2.RandomErasing(p=1)
    image, boxes = torch.zeros(1, *size), []
    for _ in range(COUNT):
        params = theirs.make_params([image])
        if params["v"] is not None:
            boxes.append([params[key] for key in "ijhw"])
    truth = torch.tensor(boxes, dtype=torch.float64)
    for value in (
        lambda b: b[:, 2] * b[:, 3],
        lambda b: (b[:, 2] / b[:, 3]).log(),
        lambda b: b[:, 0],
        lambda b: b[:, 1],
    ):
        ours, other = value(found), value(truth)
        error = (ours.var() / len(ours) + other.var() / len(other)).sqrt()
        assert abs(ours.mean() - other.mean()) < 3.5 * error
        assert ours.std() == pytest.approx(other.std().item(), rel=0.06)


def test_what_is_erased_is_the_mean_colour_as_torchvisions():
    part = whole()
    batch = next(training(part, [{"random_erasing": {"p": 1}}], batch_size=12).epoch(0))
    plain = next(training(part, [], batch_size=12).epoch(0))
    for erased, image in zip(batch.inputs, plain.inputs, strict=True):
        mask = (erased == 0).all(0)
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        if len(rows):
            box = (int(rows[0]), int(columns[0]), len(rows), len(columns))
            assert torch.equal(erased, v2.functional.erase(image, *box, torch.zeros(3, 1, 1)))
    assert (batch.inputs == 0).any()


# Copies and weights


def test_repeated_augmentation_is_copies_in_a_row_each_its_own():
    part = whole(count=20)
    plain = torch.cat([batch.index for batch in training(part, AUGMENT).epoch(0)])
    batches = list(training(part, AUGMENT, repeats=3).epoch(0))
    order = torch.cat([batch.index for batch in batches])
    assert torch.equal(order, plain[:7].repeat_interleave(3)[:20])
    known = {int(n): x for b in training(part, AUGMENT).epoch(0) for n, x in zip(b.index, b.inputs, strict=True)}
    found = torch.cat([batch.inputs for batch in batches])
    for n in range(0, 18, 3):
        assert torch.equal(found[n], known[int(order[n])])  # the first copy is the sample as it was
        assert not torch.equal(found[n], found[n + 1]) and not torch.equal(found[n + 1], found[n + 2])
    assert_same(training(part, AUGMENT, repeats=3).epoch(0, start=2), batches[2:])


def test_a_balanced_epoch_has_each_class_as_often():
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    part = Split.of(torch.zeros(1000, 3, 4, 4, dtype=torch.uint8), labels)
    counts = torch.zeros(3)
    for epoch in range(9):
        drawn = torch.cat(
            [batch.target for batch in training(part, [], batch_size=100, sampler="balanced").epoch(epoch)]
        )
        assert len(drawn) == 1000
        counts += torch.bincount(drawn, minlength=3)
    assert ((counts / 9000 - 1 / 3).abs() < 4 * (2 / 9 / 9000) ** 0.5).all()
    said = torch.cat([b.target for b in training(part, [], batch_size=100, sampler=[0, 1, 0]).epoch(0)])
    assert (said == 1).all()


def test_a_sample_that_is_drawn_again_is_augmented_in_another_way():
    loaded = training(whole(count=3), AUGMENT, batch_size=12, sampler="balanced", shuffle=True)
    seen: dict[int, list[torch.Tensor]] = {}
    for epoch in range(4):
        for n, x in zip(*(lambda b: (b.index.tolist(), b.inputs))(next(loaded.epoch(epoch))), strict=True):
            seen.setdefault((epoch, n), []).append(x)
    several = [views for views in seen.values() if len(views) > 1]
    assert several and all(not torch.equal(views[0], views[1]) for views in several)


@pytest.mark.cuda
def test_another_device_gives_the_same_batches():
    options = {"repeats": 2, "sampler": "balanced"}
    augment = ["flip", "random_erasing"]
    for ours, theirs in zip(
        training(whole(), augment, **options, device=DEVICE).epoch(1),
        training(whole(), augment, **options).epoch(1),
        strict=True,
    ):
        assert torch.equal(ours.index.cpu(), theirs.index) and torch.allclose(
            ours.inputs.cpu(), theirs.inputs, atol=1e-6
        )
    found = next(training(whole(), ["rand_augment", "colour_jitter"], device=DEVICE).epoch(0)).inputs
    assert found.isfinite().all() and found.device.type == torch.device(DEVICE).type


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ("even", "'balanced' or a weight per class, got 'even'"),
        ([1.0], "one weight of at least 0 per class, not all 0, for 3 classes"),
        ([0, 0, 0], "not all 0"),
        ([1, -1, 1], "at least 0"),
    ],
)
def test_wrong_weights_are_said(sampler, message):
    with pytest.raises(UserError, match=message):
        training(whole(), [], sampler=sampler)
