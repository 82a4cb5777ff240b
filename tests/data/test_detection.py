"""Data sets of images with boxes: raccoons as they are, and small folders and archives with every mistake."""

from __future__ import annotations

import csv
import json
import math
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from distpro.data import load_data, make_loader
from distpro.data.boxes import build_box_augment
from pathways.registry import UserError

SIZES = [(40, 30), (32, 32), (30, 44), (50, 20), (36, 28), (28, 36)]  # width, height
HEADER = ["file", "width", "height", "class", "xmin", "ymin", "xmax", "ymax"]
ROWS = [
    ["0.png", 40, 30, "cat", 2, 3, 20, 25],
    ["0.png", 40, 30, "dog", 10.5, 0, 40, 30],
    ["1.png", 32, 32, "dog", 0, 0, 16, 16],
    ["2.png", 30, 44, "", "", "", "", ""],
    ["3.png", 50, 20, "cat", 20, 2, 45, 19.25],
    ["4.png", 36, 28, "cat", 1, 1, 35, 27],
    ["5.png", 28, 36, "dog", 4, 8, 20, 30],
]


def pictures(folder):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for n, (width, height) in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{n}.png")


@pytest.fixture
def table(tmp_path):
    """A folder as `boxes_csv` reads it, and a function that writes its table."""
    pictures(tmp_path / "images")

    def write(rows=ROWS, header=HEADER):
        with open(tmp_path / "boxes.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
        return tmp_path

    write()
    return write


def load(root, name="boxes_csv", **options):
    return load_data(name, root, **options)


def everything(part):
    return [part[n] for n in range(len(part))]


def test_raccoons(data_folder, monkeypatch):
    monkeypatch.setenv("DISTPRO_DATA", str(data_folder))
    if not (data_folder / "detection").is_dir():
        pytest.skip(f"no raccoons in {data_folder}")
    data = load_data("raccoon", "detection/raccoon_192.zip")
    parts = [data.train, data.validation, data.test]
    assert [len(part) for part in parts] == [128, 32, 40] and data.names == ["raccoon"] and data.num_classes == 1
    samples = [sample for part in parts for sample in everything(part)]
    assert sum(len(target["boxes"]) for _, target in samples) == 217
    for image, target in samples:
        assert image.dtype == torch.float32 and max(image.shape[1:]) == 192 and 0 <= image.min() and image.max() <= 1
        width_height = torch.tensor([image.shape[2], image.shape[1]])
        boxes = target["boxes"]
        assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all() and (boxes[:, 2:] <= width_height).all()
        assert (target["labels"] == 1).all()
    names = [{image.file for image in part.images} for part in parts]
    assert len(set.union(*names)) == 200
    again, other = (load_data("raccoon", "detection/raccoon_192.zip", **{"seed": s}) for s in (0, 1))
    assert again.signature == data.signature and len(data.signature["sha256"]) == 64
    assert other.signature == data.signature  # data.seed draws samples; the split has its own seed, data.params.seed
    moved = load_data("raccoon", "detection/raccoon_192.zip", validation=0)
    assert len(moved.train) == 160 and moved.validation is None
    assert [image.file for image in moved.test.images] == [image.file for image in data.test.images]


def test_a_table_of_boxes(table):
    data = load(table(), test=1, validation=1)
    assert data.names == ["cat", "dog"] and len(data.train) == 4 and len(data.validation) == len(data.test) == 1
    samples = {}
    for part in (data.train, data.validation, data.test):
        samples |= {described.file: part[n] for n, described in enumerate(part.images)}
    image, target = samples["images/0.png"]
    stored = np.array(Image.open(table() / "images" / "0.png"))
    assert torch.equal((image * 255).round().byte(), torch.from_numpy(stored.transpose(2, 0, 1)))
    assert target["boxes"].tolist() == [[2, 3, 20, 25], [10.5, 0, 40, 30]] and target["labels"].tolist() == [1, 2]
    image, target = samples["images/2.png"]
    assert target["boxes"].shape == (0, 4) and target["labels"].dtype == torch.int64 and image.shape == (3, 44, 30)


def test_batches_are_lists_and_come_again(table):
    data = load(table(), test=1, augment=["flip", "crop", {"zoom_out": {"p": 0.5}}, "colour"])
    loader = make_loader(data, data.train, 2, training=True, seed=3)
    assert loader.replayable
    first, again, later = (list(loader.epoch(epoch)) for epoch in (0, 0, 1))
    for batch in first:
        assert batch.samples == len(batch.inputs) == len(batch.target) == len(batch.index)
        assert isinstance(batch.inputs, list) and {type(image) for image in batch.inputs} == {torch.Tensor}
        assert {type(value) for target in batch.target for value in target.values()} == {torch.Tensor}
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.inputs, other.inputs, strict=True))
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(one.target, other.target, strict=True))
    by_sample = [
        {int(i): x for b in batches for i, x in zip(b.index, b.inputs, strict=True)} for batches in (first, later)
    ]
    assert any(by_sample[0][i].shape != by_sample[1][i].shape for i in by_sample[0])
    resumed = list(loader.epoch(0, start=2))
    assert all(torch.equal(a, b) for a, b in zip(resumed[0].inputs, first[2].inputs, strict=True))
    evaluated = next(make_loader(data, data.test, 2, training=False).epoch(0))
    assert torch.equal(evaluated.inputs[0], data.test[0][0])


@pytest.mark.slow
def test_boxes_move_with_their_pixels():
    """A bright rectangle is its box, whatever is done to the image."""
    transform = build_box_augment([{"flip": {"p": 0.5}}, {"crop": {"min_scale": 0.5}}, {"zoom_out": {"p": 0.5}}])
    dropped = 0
    for seed in range(200):
        torch.manual_seed(seed)
        image = torch.zeros(3, 40, 60, dtype=torch.uint8)
        image[:, 10:20, 6:22] = 255
        target = {
            "boxes": torch.tensor([[6.0, 10, 22, 20], [40, 30, 60, 40]]),
            "labels": torch.tensor([3, 7]),
            "iscrowd": torch.tensor([0, 1]),
        }
        moved, found = transform(image, target)
        boxes, (height, width) = found["boxes"], moved.shape[1:]
        assert len(boxes) == len(found["labels"]) == len(found["iscrowd"])
        assert (boxes[:, 2:] - boxes[:, :2] >= 1).all() and (boxes >= 0).all()
        assert (boxes[:, 2:] <= torch.tensor([width, height])).all()
        assert torch.equal(found["labels"] == 7, found["iscrowd"] == 1)  # what belongs to a box goes with it
        dropped += 2 - len(boxes)
        bright = boxes[found["labels"] == 3]
        if len(bright):
            rows, columns = (moved[0] == 255).nonzero().unbind(1)
            left, top, right, bottom = bright[0].tolist()
            shown = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert [float(x) for x in shown] == pytest.approx([left, top, right, bottom], abs=1)
    assert dropped > 20


def test_a_fraction_and_some_samples(table):
    data = load(table(), test=1, samples=3)
    assert len(data.train) == 3 and data.signature["train"] == 3
    assert data.signature["sha256"] != load(table(), test=1).signature["sha256"]


@pytest.mark.parametrize("name", [".", "./set", "set"])
def test_tars_hold_what_their_folder_does(table, tmp_path, name):
    def content(data):
        samples = everything(data.train) + everything(data.test)
        return [(image.tolist(), target["boxes"].tolist()) for image, target in samples]

    folders = (table(), "boxes_csv", {"test": 2}), (coco_files(tmp_path.parent / f"{tmp_path.name}_coco"), "coco", {})
    for folder, kind, options in folders:
        tar = tmp_path.parent / f"{tmp_path.name}_{kind}.tar"
        with tarfile.open(tar, "w") as archive:
            archive.add(folder, name)  # as "tar cf TAR NAME" does
        assert content(load(tar, kind, **options)) == content(load(folder, kind, **options))


# COCO's layout


def coco_files(root):
    """train2017 with three images and val2017 with two, categories 7 and 3."""
    content = {
        "images": [{"id": 10 + n, "file_name": f"{n}.png", "width": w, "height": h} for n, (w, h) in enumerate(SIZES)],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }
    boxes = [
        {"id": 1, "image_id": 10, "category_id": 7, "bbox": [2, 3, 18, 22], "iscrowd": 0},
        {"id": 2, "image_id": 10, "category_id": 3, "bbox": [0, 0, 39.5, 10], "iscrowd": 1},
        {"id": 3, "image_id": 12, "category_id": 3, "bbox": [5, 5, 10, 10]},
        {"id": 4, "image_id": 14, "category_id": 7, "bbox": [1, 1, 20, 20]},
    ]
    (root / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        pictures(root / split)
    for split, rows in (("train2017", slice(0, 4)), ("val2017", slice(4, 6))):
        images = content["images"][rows]
        ids = {image["id"] for image in images}
        part = {**content, "images": images, "annotations": [b for b in boxes if b["image_id"] in ids]}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(part))
    return root


def test_coco(tmp_path):
    data = load(coco_files(tmp_path), "coco")
    assert data.names == ["cat", "dog"] and (len(data.train), data.validation, len(data.test)) == (4, None, 2)
    _, target = data.train[0]
    assert target["boxes"].tolist() == [[2, 3, 20, 25], [0, 0, 39.5, 10]]
    assert target["labels"].tolist() == [2, 1] and target["iscrowd"].tolist() == [0, 1]
    assert data.train[1][1]["boxes"].shape == (0, 4) and data.test[0][1]["labels"].tolist() == [2]


def edited(change):
    """COCO's training file with something else in it."""

    def write(root):
        path = coco_files(root) / "annotations" / "instances_train2017.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return root

    return write


def damaged(root):
    (coco_files(root) / "annotations" / "instances_train2017.json").write_text('{"images": [')
    return root


def without_an_image(root):
    (coco_files(root) / "train2017" / "1.png").unlink()
    return root


COCO_MISTAKES = {
    "damaged": (damaged, "instances_train2017.json is not JSON (Expecting value"),
    "no list": (
        edited(lambda c: c.pop("categories")),
        "has no list 'categories' (needed: images, annotations, categories)",
    ),
    "no size": (edited(lambda c: c["images"][1].pop("width")), "images[1] has no 'width'"),
    "a category": (
        edited(lambda c: c["annotations"][0].update(category_id=9)),
        "annotation 1: its category_id 9 is none of the training part's 2 categories",
    ),
    "an image id": (edited(lambda c: c["annotations"][1].update(image_id=99)), "annotation 2: its image_id 99 is none"),
    "a crowd": (edited(lambda c: c["annotations"][0].update(iscrowd=2)), "annotation 1: iscrowd must be 0 or 1, got 2"),
    "no annotation": (
        edited(lambda c: c["annotations"].append(5)),
        "annotation 5: needs image_id, category_id and bbox",
    ),
    "a list as id": (edited(lambda c: c["annotations"][0].update(image_id=[1])), "annotation 1: needs image_id"),
    "a width": (
        edited(lambda c: c["images"][0].update(width="wide")),
        "width must be a whole number of pixels, got 'wide'",
    ),
    "an image id twice": (
        edited(lambda c: c["images"][3].update(id=11)),
        "instances_train2017.json: the images 1.png and 3.png have one id, 11",
    ),
    "nothing but a crowd": (
        edited(lambda c: c.update(annotations=c["annotations"][1:2])),
        "dataset 'coco': no image of the training part has a box (but around crowds): nothing to learn",
    ),
    "no box": (edited(lambda c: c["annotations"].clear()), "nothing to learn"),
    "a category twice": (edited(lambda c: c["categories"][1].update(id=7)), "two categories have the id 7"),
    "a name twice": (edited(lambda c: c["categories"][1].update(name="dog")), "two categories have the name 'dog'"),
    "no categories": (edited(lambda c: c["categories"].clear()), "no categories"),
    "other names": (
        edited(lambda c: [one.update(name=name) for one, name in zip(c["categories"], ("cat", "dog"), strict=True)]),
        "instances_val2017.json: category 3 is 'cat', but 'dog' in the training part",
    ),
    "a box": (
        edited(lambda c: c["annotations"][0].update(bbox=[1, 2])),
        "annotation 1: needs image_id, category_id and bbox",
    ),
    "outside": (
        edited(lambda c: c["annotations"][0].update(bbox=[30, 3, 18, 22])),
        "image 0.png: the box [30, 3, 48, 25] lies outside of its image, 40x30 (width x height) ('invalid: drop'",
    ),
    "no area": (
        edited(lambda c: c["annotations"][0].update(bbox=[3, 3, 0, 5])),
        "the box [3, 3, 3, 8] (left, top, right, bottom) has no area",
    ),
    "no area as stored": (
        edited(lambda c: c["annotations"][0].update(bbox=[30, 5, 1e-7, 10])),
        "image 0.png: the box [30, 5, 30, 15] (left, top, right, bottom) has no area",
    ),
    "too large to store": (
        edited(lambda c: c["annotations"][0].update(bbox=[3, 3, 1e39, 5])),
        "the box [3, 3, 1e+39, 8] lies outside of its image",
    ),
    "no file": (without_an_image, "there is no image train2017/1.png"),
    "no annotations": (
        lambda root: pictures(root / "train2017") or root,
        "no file annotations/instances_train2017.json",
    ),
}


@pytest.mark.parametrize("case", COCO_MISTAKES)
def test_mistakes_in_coco_s_layout(case, tmp_path):
    write, message = COCO_MISTAKES[case]
    with pytest.raises(UserError) as caught:
        load(write(tmp_path / "set"), "coco")
    assert message in str(caught.value) and len(str(caught.value).removeprefix(str(tmp_path))) < 300


@pytest.mark.parametrize(
    "options", [{"images": "images/{part}"}, {"annotations": "{splt}.json"}, {"images": "{}"}, {"images": "{split"}]
)
def test_unknown_placeholders_in_coco_s_paths(tmp_path, options):
    ((key, pattern),) = options.items()
    with pytest.raises(UserError) as caught:
        load(coco_files(tmp_path / "set"), "coco", **options)
    near = "; did you mean 'split'?" if "splt" in pattern else ""
    assert str(caught.value) == (
        f"dataset 'coco': {key} has a placeholder that is unknown, got '{pattern}'{near} (allowed: {{split}})"
    )


@pytest.mark.parametrize("width", [0, 1e-8])
def test_boxes_that_cannot_be_may_be_dropped(tmp_path, width):
    def spoil(content):
        content["annotations"][0]["bbox"] = [3, 3, width, 5]

    assert load(edited(spoil)(tmp_path / "set"), "coco", invalid="drop").train[0][1]["labels"].tolist() == [1]


# Mistakes in a table


def changed(row, column, value):
    rows = [list(r) for r in ROWS]
    rows[row][HEADER.index(column)] = value
    return rows


MISTAKES = {
    "outside": (changed(0, "xmax", 43), "boxes.csv, line 2: the box [2, 3, 43, 25] lies outside of its image, 40x30"),
    "no area": (
        changed(2, "xmax", 0),
        "boxes.csv, line 4: the box [0, 0, 0, 16] (left, top, right, bottom) has no area",
    ),
    "not a number": (changed(2, "ymin", "x"), "boxes.csv, line 4: ymin must be a number, got 'x'"),
    "nan": (changed(2, "ymin", "nan"), "line 4: the box [0, nan, 16, 16] (left, top, right, bottom) has no area"),
    "half a pixel": (changed(0, "width", 40.5), "line 2: width must be a whole number of pixels, got '40.5'"),
    "no width": (changed(0, "width", "nan"), "line 2: width must be a whole number of pixels, got 'nan'"),
    "no image": (changed(3, "file", "22.png"), "line 5: there is no image images/22.png; did you mean '2.png'?"),
    "a class": (changed(0, "class", "catt"), "line 2: class 'catt' is none of the classes; did you mean 'cat'?"),
    "no class": (changed(0, "class", " "), "boxes.csv, line 2: the class of the box is empty"),
    "half a row": (changed(0, "ymax", ""), "line 2: ymax must be a number, got ''"),
    "two sizes": (changed(1, "width", 41), "line 3: 0.png is 41x30 here, but 40x30 before"),
    "no rows": ([], "boxes.csv has no rows"),
    "too many columns": ([[*row, 1] for row in ROWS], "line 2: has another number of columns than the first line's 8"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_in_a_table(case, table):
    rows, message = MISTAKES[case]
    with pytest.raises(UserError) as caught:
        load(table(rows), names=["cat", "dog"], test=1)
    assert message in str(caught.value) and len(str(caught.value)) < 400


def test_other_mistakes(table, tmp_path):
    for names, message in ((["dog", "dog"], "names has 'dog' twice"), ("dog", "must be a list"), (5, "must be a list")):
        with pytest.raises(UserError, match=message):
            load(table(), names=names)
    with pytest.raises(UserError, match="its first line has no column xmin; did you mean 'x_min'"):
        load(table(header=[c.replace("xmin", "x_min") for c in HEADER]))
    (tmp_path / "boxes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not a table of comma-separated values"):
        load(tmp_path)
    with pytest.raises(UserError, match="leave none of 6 to train on"):
        load(table(), test=4, validation=2)
    with pytest.raises(UserError, match="no image of the training part has a box .*: nothing to learn"):
        load(table([[*row[:3], *[""] * 5] for row in ROWS]), names=["cat"])
    with pytest.raises(UserError, match="no files in pictures/"):
        load(table(), images="pictures")
    (tmp_path / "images" / "0.png").write_text("no picture")
    data = load(table(), test=1)
    with pytest.raises(UserError, match=r"0\.png is not a readable image"):
        everything(data.train) + everything(data.test)
    Image.new("RGB", (8, 9)).save(tmp_path / "images" / "0.png")
    with pytest.raises(UserError, match=r"0\.png is 8x9 \(width x height\), but its annotations say 40x30"):
        everything(data.train) + everything(data.test)
    with pytest.raises(UserError, match="unknown augmentation of boxes 'flipp'; did you mean 'flip'"):
        load(table(), augment=["flipp"])
    with pytest.raises(UserError, match="augmentation 'crop'.*min_scal"):
        load(table(), augment=[{"crop": {"min_scal": 0.5}}])
    with pytest.raises(UserError, match="invalid must be refuse or drop, got 'keep'"):
        load(table(), invalid="keep")


def test_blanks_around_a_class_are_left_out(table):
    expected, rows = load(table(), test=1).signature, changed(0, "class", " cat ")
    rows[3][3:] = [" "] * 5
    for names in (None, ["cat ", "dog"]):
        assert load(table(rows), names=names, test=1).signature == expected


def test_a_box_by_a_rounding_beyond_its_image_is_cut(table):
    data = load(table(changed(0, "xmax", 40.6)), test=1)
    boxes = [t["boxes"] for _, t in everything(data.train) + everything(data.test) if len(t["boxes"]) == 2]
    assert math.isclose(boxes[0][0, 2], 40.0)
