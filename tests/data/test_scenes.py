"""Cityscapes and Pascal VOC as their authors lay them out, in small trees that are made up."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from distpro.data import load_data
from distpro.data.scenes import LABEL_IDS
from distpro.tasks.segmentation import palette
from pathways.registry import UserError

SCENES = {
    "train": ["aachen_000000_000019", "aachen_000001_000019", "bochum_000000_000313"],
    "val": ["lindau_000000_000019"],
}


@pytest.fixture
def streets(tmp_path):
    """Cityscapes with every label id and the 255 of what was cut out; polygons and instances lie beside them."""
    rng = np.random.default_rng(0)
    for split, scenes in SCENES.items():
        for scene in scenes:
            city = scene.partition("_")[0]
            folders = [tmp_path / "cs" / top / split / city for top in ("leftImg8bit", "gtFine")]
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (5, 7, 3), np.uint8)).save(folders[0] / f"{scene}_leftImg8bit.png")
            ids = rng.permutation([*range(34), 255]).astype(np.uint8).reshape(5, 7)
            Image.fromarray(ids).save(folders[1] / f"{scene}_gtFine_labelIds.png")
            (folders[1] / f"{scene}_gtFine_polygons.json").write_text("{}")
            Image.fromarray(ids.astype(np.uint16)).save(folders[1] / f"{scene}_gtFine_instanceIds.png")
    return tmp_path / "cs"


# name, id and trainId of cityscapesscripts/helpers/labels.py, copied by hand
TRAIN_IDS = """road 7 0, sidewalk 8 1, building 11 2, wall 12 3, fence 13 4, pole 17 5, traffic light 19 6, traffic sign 20 7,
vegetation 21 8, terrain 22 9, sky 23 10, person 24 11, rider 25 12, car 26 13, truck 27 14, bus 28 15, train 31 16,
motorcycle 32 17, bicycle 33 18"""


def test_label_ids_become_train_ids(streets):
    data = load_data("cityscapes", streets)
    rows = [entry.strip().rsplit(" ", 2) for entry in TRAIN_IDS.replace("\n", " ").split(",")]
    assert data.names == [name for name, _, _ in rows]
    assert list(LABEL_IDS) == [int(number) for _, number, _ in rows]
    train_id = {int(number): int(train) for _, number, train in rows}
    assert (len(data.train), data.validation, len(data.test)) == (3, None, 1)
    for split, part in (("train", data.train), ("val", data.test)):
        for n, scene in enumerate(sorted(SCENES[split])):
            city = scene.partition("_")[0]
            image = np.asarray(Image.open(streets / "leftImg8bit" / split / city / f"{scene}_leftImg8bit.png"))
            ids = np.asarray(Image.open(streets / "gtFine" / split / city / f"{scene}_gtFine_labelIds.png"))
            assert np.array_equal(part.images[n].numpy(), image.transpose(2, 0, 1))
            expected = [train_id.get(number, 255) for number in ids.flatten().tolist()]
            assert part.labels[n].flatten().tolist() == expected and len(set(expected)) == 20


def test_cityscapes_in_an_archive_and_at_another_size(streets, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "all"), "zip", streets.parent, "cs")
    assert load_data("cityscapes", archive).signature == load_data("cityscapes", streets).signature
    assert load_data("cityscapes", streets, image_size=[10, 14]).image_shape == (3, 10, 14)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (
            "no image",
            r"no file leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png, of which there is the annotation",
        ),
        (
            "no labels",
            r"no file gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png, of which there is the image",
        ),
        ("no part", r"no files leftImg8bit/val/CITY/\*_leftImg8bit.png"),
        ("value", r"labelIds.png holds the value 34, .* \(allowed: 0 to 33, 255\)"),
        ("size", r"labelIds.png is 4x7, but its image .* is 5x7"),
        ("no picture", "aachen_000000_000019_leftImg8bit.png .*is not a readable image|cannot identify"),
    ],
)
def test_a_spoiled_cityscapes(streets, spoil, message):
    image = streets / "leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png"
    labels = streets / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png"
    if spoil == "no image":
        image.unlink()
    elif spoil == "no labels":
        labels.unlink()
    elif spoil == "no part":
        shutil.rmtree(streets / "leftImg8bit" / "val")
    elif spoil == "value":
        Image.fromarray(np.full((5, 7), 34, np.uint8)).save(labels)
    elif spoil == "size":
        Image.fromarray(np.full((4, 7), 7, np.uint8)).save(labels)
    else:
        image.write_text("a page that says 404")
    with pytest.raises(UserError, match=message):
        load_data("cityscapes", streets)


def test_what_does_not_fit_into_memory_is_refused(streets):
    with pytest.raises(UserError, match=r"GB of 900000x900000 images do not fit into .*: give a smaller image_size"):
        load_data("cityscapes", streets, image_size=900000)


SIZES = {"2007_000032": (9, 6), "2007_000039": (6, 11), "2007_000063": (12, 12), "2007_000121": (5, 5)}


@pytest.fixture
def voc(tmp_path):
    """VOCdevkit/VOC2012: images of several sizes, palette annotations with a border, lists, and images of no list."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationObject", "ImageSets/Segmentation", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, (width, height) in {**SIZES, "2008_000001": (4, 4)}.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(root / "JPEGImages" / f"{name}.jpg")
        labels = Image.fromarray(rng.choice([*range(21), 255], (height, width)).astype(np.uint8))
        labels.putpalette(palette(256).flatten().tolist())
        if name in SIZES:
            labels.save(root / "SegmentationClass" / f"{name}.png")
            labels.save(root / "SegmentationObject" / f"{name}.png")
    lists = root / "ImageSets" / "Segmentation"
    (lists / "train.txt").write_text("2007_000039\n2007_000032\n2007_000063\n")
    (lists / "val.txt").write_text("2007_000121\n")
    return root


def test_voc_pads_its_images(voc):
    data = load_data("voc_segmentation", voc, image_size=12)
    assert data.num_classes == 21 and data.names[0] == "background" and data.names[-1] == "tvmonitor"
    assert (len(data.train), data.validation, len(data.test)) == (3, None, 1)
    for n, name in enumerate(["2007_000039", "2007_000032", "2007_000063"]):
        width, height = SIZES[name]
        image, labels = data.train.images[n], data.train.labels[n]
        stored = np.asarray(Image.open(voc / "SegmentationClass" / f"{name}.png"))
        shown = np.asarray(Image.open(voc / "JPEGImages" / f"{name}.jpg")).transpose(2, 0, 1)
        assert np.array_equal(labels[:height, :width].numpy(), stored)
        assert np.array_equal(image[:, :height, :width].numpy(), shown)
        rest = torch.ones(12, 12, dtype=torch.bool)
        rest[:height, :width] = False
        assert (labels[rest] == 255).all()
        assert (image[:, rest] == torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None]).all()


def test_voc_stretched_from_an_archive_and_with_other_lists(voc, tmp_path):
    (voc / "ImageSets" / "Segmentation" / "all.txt").write_text("\n".join(SIZES))
    archive = shutil.make_archive(str(tmp_path / "voc"), "tar", tmp_path, "VOCdevkit")
    options = {"image_size": [8, 10], "fit": "stretch", "train": "all"}
    data = load_data("voc_segmentation", archive, **options)
    assert data.image_shape == (3, 8, 10) and len(data.train) == 4
    assert load_data("voc_segmentation", voc, **options).signature == data.signature


@pytest.mark.parametrize(
    "spoil, message",
    [
        ("image", r"no file JPEGImages/2007_000032\.\* for '2007_000032' of split 'train'"),
        ("labels", r"no file SegmentationClass/2007_000032\.\* for '2007_000032' of split 'train'"),
        ("size", r"2007_000032.png is 3x9, but its image .* is 6x9"),
        ("value", r"holds the value 21, .*\(allowed: 0 to 20, 255\)"),
        ("colour", "has pixels of mode RGB; an annotation is 8-bit grey or palette"),
        ("large", r"JPEGImages/2007_000063.jpg is 12x12, larger than the image_size 11x11"),
        ("list", "no list ImageSets/Segmentation/trainaug.txt"),
        ("fit", "fit must be stretch, or pad with an image_size, got 'crop'"),
    ],
)
def test_a_spoiled_voc(voc, spoil, message):
    options = {"large": {"image_size": 11}, "list": {"train": "trainaug"}, "fit": {"fit": "crop"}}.get(spoil, {})
    labels = voc / "SegmentationClass" / "2007_000032.png"
    if spoil == "image":
        (voc / "JPEGImages" / "2007_000032.jpg").unlink()
    elif spoil == "labels":
        labels.unlink()
    elif spoil == "size":
        Image.fromarray(np.zeros((3, 9), np.uint8)).save(labels)
    elif spoil == "value":
        Image.fromarray(np.full((6, 9), 21, np.uint8)).save(labels)
    elif spoil == "colour":
        Image.open(labels).convert("RGB").save(labels)
    with pytest.raises(UserError, match=message):
        load_data("voc_segmentation", voc, **{"image_size": 12, **options})
