"""Data sets of images and annotations: CamVid as it is, and small folders and archives with every mistake."""

import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from distpro.data import Blank, Loader, load_data, make_loader
from pathways.registry import UserError

NAMES = ["sky", "road", "car"]
COUNTS = {"train": 4, "val": 2, "test": 3}


def write(root, size=(10, 6)):
    """{split}/N.png and {split}annot/N.png of values 0-2 and 7, and lists in reverse order."""
    rng = np.random.default_rng(0)
    for part, count in COUNTS.items():
        for folder in (part, part + "annot"):
            (root / folder).mkdir(parents=True)
        for n in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8))
            coarse.resize(size, Image.Resampling.BICUBIC).save(root / part / f"{n}.png")
            Image.fromarray(rng.choice([0, 1, 2, 7], size[::-1]).astype(np.uint8)).save(
                root / f"{part}annot" / f"{n}.png"
            )
        (root / f"{part}.txt").write_text("\n".join(str(n) for n in reversed(range(count))) + "\n")
    return root


@pytest.fixture
def tree(tmp_path):
    return write(tmp_path / "set")


def load(root, **options):
    return load_data("segmentation", root, **{"names": NAMES, "ignore": 7, **options})


@pytest.mark.slow
def test_camvid(data_folder, monkeypatch):
    monkeypatch.setenv("DISTPRO_DATA", str(data_folder))
    data = load_data("camvid", "camvid/camvid_160x120.zip")
    assert (len(data.train), len(data.validation), len(data.test)) == (367, 101, 233)
    assert data.num_classes == 11 and data.names[0] == "Sky" and data.names[-1] == "Bicyclist"
    assert data.image_shape == (3, 120, 160) and data.dense
    maps = torch.cat([part.labels for part in (data.train, data.validation, data.test)])
    assert maps.dtype == torch.uint8 and maps.shape == (701, 120, 160)
    counts = maps.flatten().bincount(minlength=256)
    assert counts[11:255].sum() == 0 and (counts[:11] > 0).all()
    assert float(counts[255] / counts.sum()) == pytest.approx(0.036, abs=0.001)
    assert {k: data.signature[k] for k in ("train", "validation", "test", "classes")} == {
        "train": 367, "validation": 101, "test": 233, "classes": 11,
    }  # fmt: skip
    with zipfile.ZipFile(data_folder / "camvid" / "camvid_160x120.zip") as archive:
        name = archive.read("val.txt").decode().split()[3]
        stored = np.asarray(Image.open(archive.open(f"valannot/{name}.png")))
    assert np.array_equal(np.where(stored == 11, 255, stored), data.validation.labels[3].numpy())
    example = data.example(3, channels_last=True)
    assert example.inputs.shape == (3, 3, 120, 160) and example.target.shape == (3, 120, 160)
    assert example.inputs.is_contiguous(memory_format=torch.channels_last)
    assert example.index.tolist() == [0, 122, 244]
    augment = ["scale", {"crop": {"size": [96, 96]}}, "flip"]
    batch = next(iter(make_loader(data, data.train, 8, training=True, augment=augment, drop_last=True).epoch(0)))
    assert batch.inputs.shape == (8, 3, 96, 96) and batch.target.shape == (8, 96, 96)
    assert set(batch.target.unique().tolist()) <= {*range(11), 255}


def pairs(root, part):
    order = [int(n) for n in (root / f"{part}.txt").read_text().split()]
    images = [np.asarray(Image.open(root / part / f"{n}.png")).transpose(2, 0, 1) for n in order]
    maps = [np.asarray(Image.open(root / f"{part}annot" / f"{n}.png")) for n in order]
    return np.stack(images), np.stack(maps)


def test_what_is_stored_is_read_in_the_order_of_the_lists(tree):
    data = load(tree)
    for part, found in (("train", data.train), ("val", data.validation), ("test", data.test)):
        images, maps = pairs(tree, part)
        assert np.array_equal(found.images.numpy(), images)
        assert np.array_equal(found.labels.numpy(), np.where(maps == 7, 255, maps))
    np.testing.assert_allclose(data.mean, pairs(tree, "train")[0].mean((0, 2, 3)) / 255, rtol=1e-12)
    assert load(tree, samples=2).train.labels.shape == (2, 6, 10)


def test_archives_and_folders_within_hold_the_same(tree, tmp_path):
    expected = load(tree).signature
    for kind in ("zip", "tar"):
        shutil.make_archive(tmp_path / "flat", kind, tree)
        shutil.make_archive(tmp_path / "inner", kind, tree.parent, "set")
        assert load(tmp_path / f"flat.{kind}").signature == load(tmp_path / f"inner.{kind}").signature == expected


def test_other_layouts(tree):
    """As of PASCAL VOC: one folder for all parts, no test part of its own, palettes; and lists with paths."""
    (tree / "JPEGImages").mkdir()
    (tree / "Class").mkdir()
    (tree / "Sets").mkdir()
    for part in COUNTS:
        for n in range(COUNTS[part]):
            shutil.copy(tree / part / f"{n}.png", tree / "JPEGImages" / f"{part}{n}.png")
            image = Image.open(tree / f"{part}annot" / f"{n}.png")
            image.putpalette([9, 9, 9, 200, 0, 0, 0, 200, 0] * 3)
            assert image.mode == "P"
            image.save(tree / "Class" / f"{part}{n}.png")
        lines = [f"JPEGImages/{part}{n}.png Class/{part}{n}.png" for n in reversed(range(COUNTS[part]))]
        (tree / "Sets" / f"{part}.txt").write_text("\n".join(lines))
    splits = {"test": "val", "validation": None}
    data = load(tree, images="JPEGImages", annotations="Class", lists="Sets/{split}.txt", splits=splits)
    usual = load(tree)
    assert data.validation is None and "validation" not in data.signature
    assert torch.equal(data.train.labels, usual.train.labels) and torch.equal(data.test.images, usual.validation.images)
    unlisted = load(tree, lists=None)
    assert torch.equal(unlisted.train.labels, usual.train.labels.flip(0))


@pytest.mark.parametrize("image_size, shape", [(4, (4, 4)), ([3, 20], (3, 20))])
def test_images_are_scaled_smoothly_and_annotations_are_not(tree, image_size, shape):
    data = load(tree, image_size=image_size)
    assert data.image_shape == (3, *shape) and data.train.labels.shape == (4, *shape)
    first, usual = Image.open(tree / "train" / "3.png"), load(tree).train.labels[0].numpy()
    scaled = np.asarray(first.resize(shape[::-1], Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(data.train.images[0].numpy(), scaled)
    rows, cols = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(shape, (6, 10), strict=True))
    assert np.array_equal(data.train.labels[0].numpy(), usual[rows][:, cols])


def spoil(tree, what):
    place = tree / "trainannot" / "1.png"
    if what == "missing":
        place.unlink()
    elif what == "image":
        (tree / "train" / "1.png").unlink()
    elif what == "list":
        (tree / "test.txt").unlink()
    elif what == "empty":
        (tree / "val.txt").write_text("\n")
    elif what == "size":
        Image.open(place).resize((5, 6)).save(place)
    elif what == "sizes":
        for folder in ("train", "trainannot"):
            Image.open(tree / folder / "1.png").resize((5, 6), 0).save(tree / folder / "1.png")
    elif what == "value":
        pixels = np.array(Image.open(place))
        pixels[2, 3] = 4
        Image.fromarray(pixels).save(place)
    elif what == "colour":
        Image.open(place).convert("RGB").save(place)
    elif what == "deep":
        Image.fromarray(np.zeros((6, 10), np.uint16)).save(place)
    elif what == "damaged":
        place.write_bytes(place.read_bytes()[:40])
    elif what == "text":
        place.write_text("not an image")
    elif what == "void":
        for place in (tree / "trainannot").iterdir():
            Image.fromarray(np.full((6, 10), 255 if place.stem == "1" else 7, np.uint8)).save(place)
    elif what == "double":
        shutil.copy(tree / "train" / "1.png", tree / "train" / "1.bmp")


@pytest.mark.parametrize(
    "what, message",
    [
        ("missing", r"set: no file trainannot/1\.\* for '1' of split 'train'"),
        ("image", r"set: no file train/1\.\* for '1'"),
        ("list", r"no list test.txt \(lists: null takes all"),
        ("empty", "split 'val' is empty"),
        ("size", "trainannot/1.png is 6x5, but its image train/1.png is 6x10"),
        ("sizes", "train/1.png is 6x5, but others are 6x10: give image_size"),
        (
            "value",
            r"trainannot/1.png holds the value 4, which is neither a class nor ignored \(allowed: 0 to 2, 7, 255\)",
        ),
        ("colour", "trainannot/1.png has pixels of mode RGB; an annotation is 8-bit"),
        ("deep", "trainannot/1.png has pixels of mode I"),
        ("damaged", "trainannot/1.png is not a readable image"),
        ("text", r"trainannot/1.png is not a readable image \(none of a kind that is known\)$"),
        ("void", "dataset 'segmentation': every pixel of the training part is void: nothing to learn"),
        ("double", "are of one name"),
    ],
)
def test_spoiled_sets_are_named(tree, what, message):
    spoil(tree, what)
    with pytest.raises(UserError, match=message):
        load(tree)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"names": []}, "names must be a list of 1 to 255 class names"),
        ({"names": "sky"}, "names must be a list"),
        ({"ignore": 300}, "ignore must be null or a whole number from 0 to 255, got 300"),
        ({"ignore": None}, "holds the value 7, which is neither a class"),
        ({"splits": {"valdation": "val"}}, "did you mean 'validation'"),
        ({"splits": {"test": None}}, "splits.test must be a name, got None"),
        ({"splits": {"test": "tst"}}, "no image files in tst/"),
        ({"image_size": 0}, "image_size must be"),
        ({"image_size": [4]}, "image_size must be"),
        ({"images": "all", "lists": None}, "with lists null, images needs '{split}'"),
        ({"annotations": "{part}"}, "annotations has a placeholder that is unknown, got '{part}' .allowed: {split}."),
        ({"lists": "{}.txt"}, "lists has a placeholder that is unknown, got '{}.txt'"),
        ({"classes": 2}, "label maps cannot be cut down"),
        ({"stream": True}, "has no parameter 'stream'"),
        ({"root": None}, "needs 'root'"),
    ],
)
def test_wrong_options(tree, options, message):
    with pytest.raises(UserError, match=message):
        load(**{"root": tree, **options})


def test_a_missing_camvid():
    with pytest.raises(UserError, match="dataset 'camvid' needs 'root'"):
        load_data("camvid")


@pytest.mark.parametrize("stream", [False, True])
def test_examples_are_plain_normalised_training_images(tmp_path, stream):
    for part, count in (("train", 7), ("test", 2)):
        for label in "ab":
            (tmp_path / part / label).mkdir(parents=True)
            for n in range(count):
                Image.new("RGB", (8, 8), (n * 30, n * 9, 99 - n)).save(tmp_path / part / label / f"{n}.png")
    data = load_data("folder", tmp_path, stream=stream)
    example = data.example(4)
    whole = next(Loader(data.train, 14, mean=data.mean, std=data.std, shuffle=False, drop_last=False).epoch(0))
    assert example.index.tolist() == [0, 3, 7, 10] and example.samples == 4
    assert torch.equal(example.inputs, whole.inputs[example.index])
    assert torch.equal(example.target, data.train.labels[example.index])
    assert data.example(99).samples == 14


@pytest.mark.parametrize("dense", [False, True])
def test_a_blank_has_the_facts_and_no_data(dense):
    blank = Blank(4, (3, 6, 8), "maps" if dense else "classes")
    example = blank.example(3)
    assert (blank.num_classes, blank.names, blank.image_shape) == (4, ["0", "1", "2", "3"], (3, 6, 8))
    assert (blank.mean, blank.std) == ((), ())
    assert example.inputs.shape == (3, 3, 6, 8) and not example.inputs.any() and example.samples == 3
    assert example.target.shape == ((3, 6, 8) if dense else (3,)) and example.target.dtype == torch.int64
