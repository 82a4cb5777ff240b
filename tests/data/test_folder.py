"""Image folders and archives, decoded into memory or streamed."""

import pickle
import shutil
import tarfile
import zipfile
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from distpro.data import Loader, build_augment, datasets, load_data, split
from distpro.data.augment import draw_for
from pathways.registry import UserError

SIZES = [(40, 30), (30, 40), (33, 33), (64, 20), (21, 50)]  # width, height
SIZE = 16


def write_images(root, sizes=SIZES):
    """train/{bee,ant} with 7 and 5 images, val/{ant,bee} with 3 each, smooth random colours."""
    rng = np.random.default_rng(0)
    for part, label, count in (("train", "bee", 7), ("train", "ant", 5), ("val", "ant", 3), ("val", "bee", 3)):
        folder = root / part / label
        folder.mkdir(parents=True)
        for n in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
            coarse.resize(sizes[n % len(sizes)], Image.Resampling.BICUBIC).save(folder / f"{n}.png")
    (root / "train" / "ant" / "notes.txt").write_text("not an image")
    (root / "train" / "ant" / "._0.png").write_text("left by an archiver")
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def pack(tree, path, below=""):
    files = [f for f in sorted(tree.rglob("*")) if f.is_file()]
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in files:
                archive.write(file, below + file.relative_to(tree).as_posix())
    else:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
            for file in files:
                archive.add(file, below + file.relative_to(tree).as_posix())
    return path


def load(root, **options):
    return load_data("folder", root, **{"image_size": SIZE, **options})


def loader(data, part="train", batch_size=4, **options):
    options = {"augment": ["resized_crop", "flip"], "shuffle": True, "drop_last": False, **options}
    return Loader(getattr(data, part), batch_size, mean=data.mean, std=data.std, **options)


def assert_same(found, expected):
    found, expected = list(found), list(expected)
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(getattr(ours, p), getattr(theirs, p)) for p in ("inputs", "target", "index"))


def test_labels_are_the_sorted_folder_names(tree):
    data = load(tree)
    assert data.names == ["ant", "bee"]
    assert data.train.labels.tolist() == [0] * 5 + [1] * 7
    assert data.test.labels.tolist() == [0] * 3 + [1] * 3
    assert data.image_shape == (3, SIZE, SIZE)


@pytest.mark.parametrize("resize", [None, 20])
def test_centres_are_those_of_torchvision(tree, resize):
    data = load(tree, resize=resize)
    centre = transforms.Compose([transforms.Resize(resize or SIZE), transforms.CenterCrop(SIZE)])
    files = sorted((tree / "train").rglob("[0-9].png"))
    expected = [np.asarray(centre(Image.open(file))).transpose(2, 0, 1) for file in files]
    assert np.array_equal(data.train.images.numpy(), np.stack(expected))


def test_images_of_one_size_are_taken_as_they_are(tmp_path):
    data = load_data("folder", write_images(tmp_path, sizes=[(24, 20)]))
    assert data.image_shape == (3, 20, 24)
    first = np.asarray(Image.open(tmp_path / "train" / "ant" / "0.png"))
    assert np.array_equal(data.train.images[0].permute(1, 2, 0).numpy(), first)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name, below", [("a.zip", ""), ("a.tar", ""), ("a.ZIP", "top/"), ("b.tar", "./")])
def test_archives_hold_what_the_folder_holds(tree, tmp_path, name, below, stream):
    path = pack(tree, tmp_path / name.lower(), below)
    path = path.rename(tmp_path / name)
    data, expected = load(path, stream=stream), load(tree)
    assert data.signature == expected.signature
    usual = {"augment": (), "shuffle": False}
    assert_same(loader(data, **usual).epoch(0), loader(load(tree, stream=stream), **usual).epoch(0))


@pytest.mark.parametrize("augment", [(), ["crop", "flip"]])
def test_streamed_batches_equal_those_in_memory(tree, augment):
    memory, stream = load(tree), load(tree, stream=True)
    assert stream.train.streamed and not memory.train.streamed
    assert stream.mean == memory.mean
    assert_same(loader(stream, augment=augment).epoch(1), loader(memory, augment=augment).epoch(1))


def test_large_sets_are_streamed(tree, monkeypatch):
    size = 18 * 3 * SIZE**2
    for limit, streamed in ((size, False), (size - 1, True)):
        monkeypatch.setattr(datasets, "MEMORY_LIMIT", limit)
        assert load(tree).train.streamed is streamed
        assert not load(tree, stream=False).train.streamed


def test_choices_from_a_streamed_set(tree):
    data = load(tree, stream=True, classes=["bee"], samples=4)
    train, val = split(data.train, 0.5, seed=0)
    whole = load(tree).train.images
    for part in (train, val):
        assert torch.equal(part.peek(9), whole[part.index])
    assert len(set(train.index.tolist()) | set(val.index.tolist())) == 4


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_streaming_has_no_state(tree, workers):
    data = load(pack(tree, tree.parent / f"workers{workers}.zip"), stream=True)
    before = torch.get_rng_state()
    plain = loader(data)
    row = [batch for epoch in range(2) for batch in plain.epoch(epoch)]
    assert_same(loader(data, workers=workers).epoch(1, 1), row[4:])
    assert_same(islice(loader(data, workers=workers).endless(2), 4), row[2:])
    assert torch.equal(torch.get_rng_state(), before)


def by_sample(batches):
    return {int(n): x for batch in batches for n, x in zip(batch.index, batch.inputs, strict=True)}


def test_a_streamed_sample_looks_the_same_in_any_batch_and_split(tree):
    data = load(tree, stream=True)
    usual = by_sample(loader(data).epoch(3))
    single = by_sample(loader(data, batch_size=1).epoch(3))
    part = by_sample(loader(replace(data, train=split(data.train, 0.5, seed=0)[1])).epoch(3))
    assert (len(usual), len(single), len(part)) == (12, 12, 6)
    assert all(torch.equal(x, usual[n]) for found in (single, part) for n, x in found.items())


def first_batch(data, augment, epoch=0):
    return next(loader(data, augment=augment, shuffle=False).epoch(epoch)).inputs


def test_the_largest_part_of_a_square_image_is_the_image(tree):
    data = load(tree, stream=True)
    largest = {"resized_crop": {"scale": [1, 1], "ratio": [1, 1]}}
    third = 2  # 33x33
    assert torch.equal(first_batch(data, [largest])[third], first_batch(data, [])[third])


def test_random_parts_change_with_the_epoch(tree):
    data = load(tree, stream=True)
    first, second = (first_batch(data, ["resized_crop"], epoch) for epoch in (0, 1))
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def boxes(crop, width, height, count=2000):
    drawn = draw_for("resized_crop", crop, torch.arange(count), seed=0, epoch=0).tolist()
    return np.array([crop.box(width, height, numbers) for numbers in drawn])


def test_random_parts_have_the_distribution_of_torchvision():
    crop = build_augment(["resized_crop"])["resized_crop"]
    left, top, right, bottom = boxes(crop, 120, 90).T
    assert left.min() >= 0 and top.min() >= 0 and right.max() <= 120 and bottom.max() <= 90
    torch.manual_seed(0)
    image = Image.new("RGB", (120, 90))
    reference = np.array(
        [transforms.RandomResizedCrop.get_params(image, [0.08, 1], [3 / 4, 4 / 3]) for _ in range(2000)]
    )
    for ours, theirs in zip((top, left, bottom - top, right - left), reference.T, strict=True):
        grid = np.arange(121)
        distance = abs(np.searchsorted(np.sort(ours), grid) - np.searchsorted(np.sort(theirs), grid)).max() / 2000
        assert distance < 1.95 * (2 / 2000) ** 0.5  # Kolmogorov-Smirnov at 0.1 %


@pytest.mark.parametrize("width, height", [(100, 10), (10, 100), (100, 90)])
def test_where_no_part_fits_the_centre_is_taken(width, height):
    crop = build_augment(["resized_crop"])["resized_crop"]
    left, top, right, bottom = crop.box(width, height, [0, 0])  # no numbers for a try
    image = Image.new("RGB", (width, height))
    expected = transforms.RandomResizedCrop.get_params(image, [100, 100], [3 / 4, 4 / 3])  # never fits
    assert (top, left, bottom - top, right - left) == expected


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "folder"])
def test_streamed_splits_travel_to_other_processes(tree, tmp_path, name):
    part = load(tree if name == "folder" else pack(tree, tmp_path / name), stream=True).train
    assert torch.equal(pickle.loads(pickle.dumps(part)).peek(12), part.peek(12))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(tmp_path, workers):
    data = load(write_images(tmp_path), stream=True)
    file = tmp_path / "train" / "ant" / "1.png"
    file.write_bytes(file.read_bytes()[:80])
    message = "^[^\n]*: train/ant/1.png is not a readable image[^\n]*$"
    with pytest.raises(UserError, match=message):
        list(loader(data, workers=workers).epoch(0))
    with pytest.raises(UserError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"no image at all", b""])
def test_what_is_no_image_is_named_without_an_objects_address(content, tmp_path):
    write_images(tmp_path)
    (tmp_path / "train" / "ant" / "1.png").write_bytes(content)
    with pytest.raises(UserError, match="train/ant/1.png is not a readable image") as error:
        load(tmp_path)
    assert "0x" not in str(error.value) and "BytesIO" not in str(error.value)


def test_wrong_trees(tree, tmp_path):
    for stream in (None, True):
        with pytest.raises(UserError, match="but others are .*: give image_size"):
            load_data("folder", tree, stream=stream)
    with pytest.raises(UserError, match="resize needs image_size"):
        load_data("folder", tree, resize=20)
    with pytest.raises(UserError, match="1 <= image_size <= resize, got 16 and 10"):
        load(tree, resize=10)
    with pytest.raises(UserError, match="no image files in train/<class>/"):
        load(tmp_path)
    write_images(tmp_path / "x")
    (tmp_path / "x" / "val" / "bee").rename(tmp_path / "x" / "val" / "bees")
    with pytest.raises(UserError, match="test class 'bees' is not a training class; did you mean 'bee'"):
        load(tmp_path / "x")
    (tmp_path / "x" / "val").rename(tmp_path / "x" / "held_out")
    with pytest.raises(UserError, match="no image files in test/<class>/ or val/<class>/"):
        load(tmp_path / "x")


@pytest.mark.parametrize(
    ("train", "test"), [("Train", "Test"), ("training", "TESTING"), ("TRAIN", "Valid"), ("train", "validation")]
)
@pytest.mark.parametrize("fraction", [None, 0.5])
def test_parts_go_by_several_names(tree, tmp_path, train, test, fraction):
    shutil.copytree(tree / "train", tmp_path / train)
    shutil.copytree(tree / "val", tmp_path / test)
    data, expected = load(tmp_path, test_fraction=fraction), load(tree)
    assert data.names == ["ant", "bee"]
    assert torch.equal(data.train.images, expected.train.images) and torch.equal(data.test.images, expected.test.images)


def test_what_is_called_like_parts_is_no_class(tree, tmp_path):
    for part in ("train", "val"):
        shutil.copytree(tree / part / "bee", tmp_path / "a" / part.title())
    with pytest.raises(UserError, match=r"a: Train/ has no folder for each class: Train/<class>/$"):
        load(tmp_path / "a", test_fraction=0.5)
    shutil.copytree(tree / "train" / "bee", tmp_path / "c" / "bee")
    with pytest.raises(UserError, match="c: only one class: bee$"):
        load(tmp_path / "c", test_fraction=0.5)
    for part, name in (("train", "train"), ("val", "val"), ("val", "Validation")):
        shutil.copytree(tree / part, tmp_path / "b" / name)
    with pytest.raises(UserError, match=r"b: Validation/ and val/ are both the val part; rename one of them$"):
        load(tmp_path / "b")


def test_what_is_left_out_is_said(tree, tmp_path, capsys):
    load(tree)
    assert capsys.readouterr().out == ""
    for part, name in (("train", "train"), ("val", "Valid"), ("val", "test")):
        shutil.copytree(tree / part, tmp_path / "a" / name)
    (tmp_path / "a" / "train" / "cow").mkdir()
    assert load(tmp_path / "a").names == ["ant", "bee"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("a: Valid/ is not used: the test part is test/")
    assert lines[1:] == [f"{tmp_path / 'a'}: train/cow/ holds no image: it is left out of the 2 classes"]
    shutil.copytree(tree / "train", tmp_path / "b")
    (tmp_path / "b" / "cow").mkdir()
    load(tmp_path / "b", test_fraction=0.5)
    assert capsys.readouterr().out == f"{tmp_path / 'b'}: cow/ holds no image: it is left out of the 2 classes\n"


def test_wrong_archives(tree, tmp_path):
    with pytest.raises(UserError, match="expected a folder, a .zip or an uncompressed .tar"):
        load(pack(tree, tmp_path / "a.tar.gz"))
    for name in ("a.zip", "a.tar"):
        (tmp_path / name).write_bytes(b"no archive")
        with pytest.raises(UserError, match=f"{name}: not a readable"):
            load(tmp_path / name)


def test_the_random_part_comes_first_of_the_augmentations(tree):
    with pytest.raises(UserError, match="'resized_crop' must be the first"):
        loader(load(tree, stream=True), augment=["flip", "resized_crop"])


# Depths of colour


def saved(folder, values, name="0.png", **options):
    """A folder whose every image is the one of these values."""
    for part in ("train", "val"):
        for label in ("a", "b"):
            place = folder / part / label
            place.mkdir(parents=True, exist_ok=True)
            (values if isinstance(values, Image.Image) else Image.fromarray(values)).save(place / name, **options)
    return folder


@pytest.mark.parametrize("name", ["0.png", "0.tif"])
def test_16_bits_are_rounded_to_8(tmp_path, name):
    """Every value of 16 bits, in a square of 256: v / 65535 as the nearest n / 255."""
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    images = load_data("folder", saved(tmp_path, values, name)).train.images
    expected = [round(v * 255 / 65535) for v in range(65536)]  # of no v is it half-way, as 65535 = 255 * 257
    assert torch.equal(images[0], torch.tensor(expected, dtype=torch.uint8).view(1, 256, 256).expand(3, -1, -1))
    assert images.float().mean() == 127.5


def test_16_bits_in_a_pgm(tmp_path):
    values = np.array([[0, 257, 65535], [514, 32896, 129]], np.uint16)
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        content = b"P5 3 2 65535 " + values.astype(">u2").tobytes()
        (tmp_path / part / "a" / "0.ppm").write_bytes(content)
    found = load_data("folder", tmp_path).train.images[0, 0]
    assert found.tolist() == [[0, 1, 255], [2, 128, 1]]


def test_16_bits_resized_and_streamed(tmp_path):
    """As the same image of 8 bits."""
    rng = np.random.default_rng(0)
    eight = rng.integers(0, 256, (20, 30), np.uint8)
    deep, plain = saved(tmp_path / "deep", eight.astype(np.uint16) * 257), saved(tmp_path / "plain", eight)
    for stream in (False, True):
        images = [
            next(loader(load_data("folder", root, image_size=8, stream=stream), augment=[]).epoch(0)).inputs
            for root in (deep, plain)
        ]
        assert torch.equal(*images)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 4), 0.5, np.float32), "0.tif has floating-point pixels, of which no value is known to be white"),
        (np.full((4, 4), 70000, np.int32), "0.tif has 32-bit pixels"),
    ],
)
def test_where_white_is_not_known(tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        load_data("folder", saved(tmp_path, values, "0.tif"))


def test_grey_palette_and_black_and_white(tmp_path):
    values = np.array([[0, 255], [255, 0]], np.uint8)
    for mode in ("L", "LA", "P", "1"):
        image = Image.fromarray(values).convert(mode)
        images = load_data("folder", saved(tmp_path / mode, image)).train.images
        assert torch.equal(images[0], torch.tensor(values).expand(3, 2, 2)), mode
