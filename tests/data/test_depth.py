"""Data sets of images and depth maps: 7-Scenes as it is, and small folders and archives with every mistake."""

import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from distpro.data import Blank, load_data, make_loader
from pathways.registry import UserError

COUNTS = {"train": 4, "test": 3}


def write(root, size=(10, 6), counts=COUNTS):
    """{split}/N.jpg and, in millimetres, {split}/N.png; depths of up to 65.535 m, and pixels without any."""
    rng = np.random.default_rng(0)
    for part, count in counts.items():
        (root / part).mkdir(parents=True)
        for n in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8))
            coarse.resize(size, Image.Resampling.BICUBIC).save(root / part / f"{n}.jpg")
            depth = rng.integers(1, 65536, size[::-1]).astype(np.uint16)
            depth[0, 0], depth[1, 1] = 0, 65535
            Image.fromarray(depth).save(root / part / f"{n}.png")
    return root


@pytest.fixture
def tree(tmp_path):
    return write(tmp_path / "set")


def stored(root, part, count):
    images = [np.asarray(Image.open(root / part / f"{n}.jpg")).transpose(2, 0, 1) for n in range(count)]
    return np.stack(images), np.stack([np.asarray(Image.open(root / part / f"{n}.png")) for n in range(count)])


def test_sevenscenes(data_folder, monkeypatch):
    archive = data_folder / "depth7scenes" / "sevenscenes_128x96.zip"
    if not archive.is_file():
        pytest.skip(f"no {archive}")
    monkeypatch.setenv("DISTPRO_DATA", str(data_folder))
    data = load_data("sevenscenes", "depth7scenes/sevenscenes_128x96.zip")
    assert (len(data.train), data.validation, len(data.test)) == (160, None, 40)
    assert data.num_classes is None and data.names == [] and data.image_shape == (3, 96, 128) and data.dense
    assert data.train.labels.dtype == torch.uint16 and data.train.metres == 0.001
    depth = data.train.labels.numpy()
    quantiles = np.percentile(depth[depth > 0], [1, 50, 99])
    assert quantiles == pytest.approx([822, 1809, 2930], abs=1)  # as the pack's description says
    with zipfile.ZipFile(archive) as files:
        raw = np.asarray(Image.open(files.open("train/000005.png")))
    assert np.array_equal(depth[1], raw)
    example = data.example(3, channels_last=True)
    assert example.target.dtype == torch.float32 and example.target.shape == (3, 96, 128)
    assert torch.equal(example.target[0], torch.from_numpy(depth[0].astype(np.float32)) * 0.001)
    assert make_loader(data, data.train, 8, training=True, augment=["scale", "flip"]).epoch(0).__next__().samples == 8


def test_what_is_stored_is_read_whole(tree):
    """Values beyond 32767, which is where 16 bits with a sign end, among it."""
    data = load_data("depth", tree)
    for part, found in (("train", data.train), ("test", data.test)):
        images, maps = stored(tree, part, COUNTS[part])
        assert np.array_equal(found.images.numpy(), images) and np.array_equal(found.labels.numpy(), maps)
    target = data.example(4).target
    assert target.max() > 33 and target.numpy() == pytest.approx(stored(tree, "train", 4)[1] * 0.001, rel=1e-6)
    assert load_data("depth", tree, samples=2).train.metres == 0.001
    halves = load_data("depth", tree, scale=0.5)
    assert torch.equal(halves.example(4).target, torch.from_numpy(stored(tree, "train", 4)[1].astype(np.float32)) / 2)
    assert halves.signature["sha256"] != data.signature["sha256"]


def test_archives_and_folders_within_hold_the_same(tree, tmp_path):
    expected = load_data("depth", tree).signature
    for kind in ("zip", "tar"):
        shutil.make_archive(tmp_path / "flat", kind, tree)
        shutil.make_archive(tmp_path / "inner", kind, tree.parent, "set")
        for name in ("flat", "inner"):
            assert load_data("depth", tmp_path / f"{name}.{kind}").signature == expected


def test_nyuv2_s_layout_and_its_lists(tree, tmp_path):
    """Scenes, of which two have images of one number; the lists name them in any order, with the focal length."""
    root = tmp_path / "nyu"
    lines = {"train": [], "test": []}
    for part, folder in (("train", "sync"), ("test", "official_splits/test")):
        for n in range(COUNTS[part]):
            scene = f"{folder}/kitchen_{n % 2}"
            (root / scene).mkdir(parents=True, exist_ok=True)
            shutil.copy(tree / part / f"{n}.jpg", root / scene / f"rgb_{n // 2:05}.jpg")
            shutil.copy(tree / part / f"{n}.png", root / scene / f"sync_depth_{n // 2:05}.png")
            lines[part].insert(0, f"/{scene}/rgb_{n // 2:05}.jpg /{scene}/sync_depth_{n // 2:05}.png 518.8579")
    data, usual = load_data("nyuv2", root), load_data("depth", tree)
    by_scene = torch.tensor([0, 2, 1, 3])
    assert np.array_equal(data.train.labels, usual.train.select(by_scene).labels)
    assert torch.equal(data.train.images, usual.train.images[by_scene]) and len(data.test) == 3
    for part, found in lines.items():
        (root / f"{part}.txt").write_text("\n".join(found) + "\n\n")
    listed = load_data("depth", root, lists="{split}.txt")
    assert np.array_equal(listed.train.labels.numpy(), usual.train.labels.numpy()[::-1])
    (root / "test.txt").write_text("sync/kitchen_0/rgb_00000.jpg sync/kitchen_0/sync_depth_00009.png")
    with pytest.raises(UserError, match=r"test.txt, line 1: there is no file sync/kitchen_0/sync_depth_00009.png; did"):
        load_data("depth", root, lists="{split}.txt")
    for text, message in (("a.jpg", "line 1: expected an image and its depth map, found 'a.jpg'"), ("\n", "is empty")):
        (root / "test.txt").write_text(text)
        with pytest.raises(UserError, match=message):
            load_data("depth", root, lists="{split}.txt")


def test_a_validation_part(tree):
    shutil.copytree(tree / "test", tree / "val")
    data = load_data("depth", tree, splits={"validation": "val"})
    assert len(data.validation) == 3 and data.validation.metres == 0.001


def test_what_is_too_far_is_no_measurement(tree):
    maps = stored(tree, "train", 4)[1]
    found = load_data("depth", tree, most=40).train.labels.numpy()
    assert np.array_equal(found, np.where(maps > 40000, 0, maps)) and (maps > 40000).any()
    seven = load_data("sevenscenes", tree).train.labels.numpy()
    assert np.array_equal(seven, np.where(maps == 65535, 0, maps))


def test_other_kinds_of_grey(tree):
    """8 bits, and 32 bits of which 16 are used."""
    small = np.arange(60, dtype=np.uint8).reshape(6, 10)
    Image.fromarray(small).save(tree / "train" / "1.png")
    assert np.array_equal(load_data("depth", tree).train.labels[1].numpy(), small)
    image = Image.fromarray(small.astype(np.int32) * 1000)
    assert image.mode == "I"
    image.save(tree / "train" / "1.png", format="TIFF")  # a reader goes by the content
    assert np.array_equal(load_data("depth", tree).train.labels[1].numpy(), small.astype(np.uint16) * 1000)


@pytest.mark.parametrize("image_size, shape", [(4, (4, 4)), ([3, 20], (3, 20))])
def test_images_are_scaled_smoothly_and_depth_is_not(tree, image_size, shape):
    data = load_data("depth", tree, image_size=image_size)
    assert data.image_shape == (3, *shape) and data.train.labels.shape == (4, *shape)
    image = Image.open(tree / "train" / "0.jpg").resize(shape[::-1], Image.Resampling.BILINEAR)
    assert np.array_equal(data.train.images[0].numpy(), np.asarray(image).transpose(2, 0, 1))
    depth = Image.open(tree / "train" / "0.png").resize(shape[::-1], Image.Resampling.NEAREST)
    assert np.array_equal(data.train.labels[0].numpy(), np.asarray(depth))


# Augmentation


def augmented(tree, augment, epoch=0):
    """Images whose grey is their depth in units: of what is shown, one says the other."""
    for n in range(4):
        depth = np.random.default_rng(n).integers(1, 255, (6, 10)).astype(np.uint8)
        Image.fromarray(depth).convert("RGB").save(tree / "train" / f"{n}.bmp")
        Image.fromarray(depth.astype(np.uint16)).save(tree / "train" / f"{n}.png")
    for n in range(3):
        Image.open(tree / "test" / f"{n}.jpg").save(tree / "test" / f"{n}.bmp")
    data = load_data("depth", tree, images="{split}/*.bmp", scale=1.0, mean=[0, 0, 0], std=[1, 1, 1])
    batch = next(iter(make_loader(data, data.train, 4, training=True, augment=augment).epoch(epoch)))
    return (255 * batch.inputs[:, 0]).round(), batch


@pytest.mark.parametrize("augment", [["flip"], [{"crop": {"padding": 3}}, "flip"], [{"crop": {"size": [4, 5]}}]])
def test_depth_moves_with_its_image_and_is_0_outside(tree, augment):
    grey, batch = augmented(tree, augment)
    assert torch.equal(grey, batch.target)
    assert bool((batch.target == 0).any()) == (augment[0] == {"crop": {"padding": 3}})


def test_what_is_enlarged_is_nearer(tree):
    """Depth is the grey value divided by the factor, one factor a sample, from those that the scale may draw."""
    factors = []
    for epoch in range(8):
        grey, batch = augmented(tree, [{"scale": {"range": [0.5, 2.0]}}, "flip"], epoch)
        shown = batch.target > 0
        assert torch.equal(shown, grey > 0)
        for image, depth in zip(grey, batch.target, strict=True):
            ratio = (image / depth)[depth > 0]
            assert ratio.max() - ratio.min() < 1e-4
            factors.append(ratio.mean().item())
    assert 0.5 <= min(factors) < 0.8 and 1.6 < max(factors) <= 2.0 and len(set(factors)) == 32
    grey, batch = augmented(tree, [{"scale": {"range": [2, 2]}}])
    assert torch.equal(batch.target, grey / 2)


def test_the_same_whatever_the_batch_size(tree):
    data = load_data("depth", tree)
    augment = [{"scale": {"range": [0.5, 2.0]}}, {"crop": {"padding": 2}}, "flip"]
    one, four = (make_loader(data, data.train, n, training=True, augment=augment) for n in (1, 4))
    whole = next(iter(four.epoch(3)))
    assert torch.equal(torch.cat([batch.target for batch in one.epoch(3)]), whole.target)


# Mistakes


def spoil(tree, what):
    place = tree / "train" / "1.png"
    if what == "missing":
        place.unlink()
    elif what == "image":
        (tree / "train" / "1.jpg").unlink()
    elif what == "part":
        shutil.rmtree(tree / "test")
    elif what == "size":
        Image.fromarray(np.ones((5, 6), np.uint16)).save(place)
    elif what == "sizes":
        Image.open(tree / "train" / "1.jpg").resize((5, 6)).save(tree / "train" / "1.jpg")
        Image.fromarray(np.ones((6, 5), np.uint16)).save(place)
    elif what == "colour":
        Image.open(tree / "train" / "1.jpg").save(place)
    elif what == "empty":
        Image.fromarray(np.zeros((6, 10), np.uint16)).save(place)
    elif what in ("negative", "large", "nan"):
        values = {"negative": np.int32(-3), "large": np.int32(70000), "nan": np.float32("nan")}[what]
        Image.fromarray(np.full((6, 10), values)).save(place, format="TIFF")
    elif what == "damaged":
        place.write_bytes(place.read_bytes()[:40])
    elif what == "text":
        place.write_text("not an image")
    elif what == "picture":
        (tree / "train" / "1.jpg").write_text("not an image")


@pytest.mark.parametrize(
    "what, message",
    [
        ("missing", r"set: train/1\.jpg has no counterpart train/1\.png"),
        ("image", r"set: train/1\.png has no counterpart train/1\.jpg"),
        ("part", r"no files test/\*\.jpg"),
        ("size", r"train/1\.png is 5x6, but its image train/1\.jpg is 6x10"),
        ("sizes", r"train/1\.jpg is 6x5, but others are 6x10: give image_size"),
        ("colour", r"train/1\.png has pixels of mode RGB; a depth map is grey, whole numbers"),
        ("empty", r"train/1\.png holds no measurement: every pixel is 0$"),
        ("negative", r"train/1\.png holds a depth of -3 \(allowed: 0, not measured, to 65535\)"),
        ("large", r"train/1\.png holds a depth of 70000"),
        ("nan", r"train/1\.png has pixels of mode F; a depth map is grey, whole numbers"),
        ("damaged", r"train/1\.png is not a readable image"),
        ("text", r"train/1\.png is not a readable image \(none of a kind that is known\)"),
        ("picture", r"train/1\.jpg is not a readable image"),
    ],
)
def test_spoiled_sets_are_named(tree, what, message):
    spoil(tree, what)
    with pytest.raises(UserError, match=message) as error:
        load_data("depth", tree)
    assert "\n" not in str(error.value) and "object at" not in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scale": 0}, "scale must be a number of metres above 0, got 0"),
        ({"scale": "mm"}, "parameter 'scale' is 'mm', expected float"),
        ({"most": -1}, "most must be a number of metres above 0"),
        ({"most": 0.0005}, r"every pixel is 0, or beyond 0 m"),
        ({"images": "rgb/*.jpg"}, r"images needs '\{split\}' to tell the parts apart, got 'rgb/\*.jpg'"),
        ({"lists": "all.txt"}, r"lists needs '\{split\}'"),
        ({"lists": "{split}.txt"}, "no list train.txt"),
        (
            {"images": "{split}/{scene}/*.jpg"},
            "images has a placeholder that is unknown, got '{split}/{scene}/[*].jpg' ",
        ),
        ({"depths": "{split}/{}/*.png"}, "depths has a placeholder that is unknown"),
        ({"lists": "{split}{0}.txt"}, r"lists has a placeholder .* \(allowed: \{split\}\)"),
        ({"depths": "{split}/*/*.png"}, r"images and depths must have as many \*"),
        ({"splits": {"tests": "val"}}, "did you mean 'test'"),
        ({"splits": {"test": None}}, "splits.test must be a name, got None"),
        ({"splits": [1]}, "splits must be a mapping"),
        ({"image_size": 0}, "image_size must be"),
        ({"classes": 2}, "classes: the data set has none"),
        ({"stream": True}, "has no parameter 'stream'"),
        ({"root": None}, "needs 'root'"),
    ],
)
def test_wrong_options(tree, options, message):
    with pytest.raises(UserError, match=message):
        load_data("depth", **{"root": tree, **options})


def test_augmentations_that_mix_samples_are_refused(tree):
    data = load_data("depth", tree)
    with pytest.raises(UserError, match="needs one label per image, but the data set has label maps"):
        make_loader(data, data.train, 2, training=True, augment=["mixup"])


def test_a_blank_without_classes_has_depth():
    example = Blank(None, (3, 6, 8), "depths").example(3)
    assert example.target.dtype == torch.float32 and example.target.shape == (3, 6, 8) and example.target.eq(1).all()
    assert Blank(None, (3, 6, 8), "depths").names == []
