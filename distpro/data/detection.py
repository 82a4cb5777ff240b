"""Data sets of images of any size with boxes around the objects in them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Subset

from distpro.data.augment import AugmentSpec
from distpro.data.boxes import Boxes, Described, Invalid, Target, build_box_augment, check_boxes
from distpro.data.counter import make_generator
from distpro.data.datasets import DATASETS, locate
from distpro.data.files import ImageFiles, Store, open_store
from distpro.data.foreign import ForeignDataset
from distpro.data.trees import file_of, files_below, filled, split_names
from pathways.registry import UserError, nearest

COLUMNS = ("file", "width", "height", "class", "xmin", "ymin", "xmax", "ymax")
COCO_SPLITS = {"train": "train2017", "validation": None, "test": "val2017"}


class BoxedImages(TorchDataset):
    """Images (3, H, W) float32 in 0-1, each of its own size, with ``boxes`` (n, 4) float32 as (left, top, right, bottom) in
    pixels, ``labels`` (n,) int64 from 1 on (0 is the background, as torchvision's detectors have it), and ``iscrowd`` (n,)
    int64, 1 for a box around a crowd, which counts in evaluation alone. n may be 0.

    A file is read each time that its sample is asked for.
    """

    def __init__(self, store: Store, images: Sequence[Described], classes: Sequence[str], augment: AugmentSpec = ()):
        self.images, self.classes = list(images), list(classes)
        self.files = ImageFiles(store, [image.file for image in self.images], (0, 0), None)
        self.transform = build_box_augment(augment)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, Target]:
        described, picture = self.images[row], self.files.open(row)
        if picture.size != described.size:
            place = f"{self.files.store.path}: {described.file}"
            found, said = (f"{width}x{height}" for width, height in (picture.size, described.size))
            raise UserError(f"{place} is {found} (width x height), but its annotations say {said}")
        image = torch.from_numpy(np.array(picture)).movedim(-1, 0)
        boxes, labels, crowd = described.boxes
        target = {"boxes": boxes, "labels": labels, "iscrowd": crowd}
        if self.transform is not None:
            image, target = self.transform(image, target)
        return image.float() / 255, target

    def digest(self) -> str:
        """sha256 of classes, file names, sizes, boxes and labels, and of 64 files evenly spaced."""
        whole = hashlib.sha256("\n".join(self.classes).encode())
        for image in self.images:
            whole.update(f"{image.file} {image.size}".encode())
            for tensor in (image.boxes.boxes, image.boxes.labels, image.boxes.crowd):
                whole.update(tensor.numpy().tobytes())
        count = min(64, len(self))
        for row in range(count):
            whole.update(self.files.store.read(self.images[row * len(self) // count].file))
        return whole.hexdigest()


@dataclass(frozen=True, eq=False)
class BoxedDataset(ForeignDataset):
    """Parts of `BoxedImages`, and a signature of their contents."""

    @property
    def signature(self) -> dict[str, Any]:
        parts = {part: getattr(self, part) for part in ("train", "validation", "test")}
        known = {part: value for part, value in parts.items() if value is not None}
        digests = "".join(_whole(value).digest() for value in known.values())
        return {
            "name": "boxes",
            **{part: len(value) for part, value in known.items()},
            "classes": self.num_classes,
            "sha256": hashlib.sha256(digests.encode()).hexdigest(),
        }


def _whole(part: Any) -> BoxedImages:
    """The samples of a part, those of a ``Subset`` alone."""
    if not isinstance(part, Subset):
        return part  # type: ignore[no-any-return]
    inner = _whole(part.dataset)
    return BoxedImages(inner.files.store, [inner.images[row] for row in part.indices], inner.classes)


@DATASETS.register("boxes_csv")
def boxes_csv(
    root: str | None = None,
    names: Sequence[str] | None = None,
    images: str = "images",
    annotations: str = "boxes.csv",
    test: int = 0,
    validation: int = 0,
    seed: int = 0,
    augment: AugmentSpec = (),
    invalid: Literal["refuse", "drop"] = "refuse",
) -> BoxedDataset:
    """Images in a folder, a .zip or a .tar, and one table of their boxes, a row each, with the columns file, width, height,
    class, xmin, ymin, xmax, ymax; an image without objects has one row whose last five are empty.

    names: of the classes 1, 2, ...; by default all that occur, sorted.
    test, validation: so many images, drawn with ``seed``, are the test and the validation part; by default a fifth are the
    test part. With a validation part of 0 a search takes a fraction of the training part.
    augment: of the training part, see `build_box_augment`.
    invalid: drop boxes that lie outside of their image or have no area, in place of refusing them.

    Raises UserError for what is missing or damaged, and for a training part without a box.
    """
    what = "dataset 'boxes_csv'"
    store = open_store(locate(what, root))
    files, table = files_below(store, images), file_of(store, annotations)
    rows = _table(store, table)
    classes = sorted({row["class"] for row in rows} - {""}) if names is None else _names(what, names)
    found: dict[str, Described] = {}
    for number, row in enumerate(rows, 2):
        place = f"{store.path}: {table}, line {number}"
        name = row["file"]
        if name not in files:
            raise UserError(f"{place}: there is no image {images}/{name}{nearest(name, list(files))}")
        size = (_side(place, row, "width"), _side(place, row, "height"))
        known = found.setdefault(name, Described(files[name], size, Boxes.none()))
        if known.size != size:
            raise UserError(f"{place}: {name} is {size[0]}x{size[1]} here, but {known.size[0]}x{known.size[1]} before")
        if not any(row[column] for column in COLUMNS[3:]):
            continue
        if not row["class"]:
            raise UserError(f"{place}: the class of the box is empty")
        label = _label(place, row["class"], classes)
        corners = [_number(place, row, column) for column in COLUMNS[4:]]
        boxes = check_boxes(place, [(corners, label, 0)], size, invalid)
        found[name] = replace(known, boxes=known.boxes.and_also(boxes))
    everything = [found[name] for name in sorted(found)]
    return _parted(what, store, everything, classes, test or round(len(everything) / 5), validation, seed, augment)


@DATASETS.register("raccoon")
def raccoon(
    root: str | None = None,
    test: int = 40,
    validation: int = 32,
    seed: int = 0,
    augment: AugmentSpec = (),
) -> BoxedDataset:
    """Photographs of raccoons (Dat Tran 2017, MIT), 200 with 217 boxes of one class, laid out as `boxes_csv` says. No split is
    published but its sizes: 160 to train on, of which 32 are the validation part here, and 40 to test."""
    return boxes_csv(root, ["raccoon"], test=test, validation=validation, seed=seed, augment=augment)


@DATASETS.register("coco")
def coco(
    root: str | None = None,
    images: str = "{split}",
    annotations: str = "annotations/instances_{split}.json",
    splits: Mapping[str, str | None] | None = None,
    augment: AugmentSpec = (),
    invalid: Literal["refuse", "drop"] = "refuse",
) -> BoxedDataset:
    """COCO's layout (Lin et al. 2014): a folder of images and a file of instances for each part; in a folder, a .zip or a .tar.

    images, annotations: where ``{split}`` stands for a name of ``splits``.
    splits: what the parts are called, by default ``{train: train2017, test: val2017}``, without a validation part, so that a
    search takes a fraction of the training part.
    augment, invalid: as of `boxes_csv`. In COCO 2017 two boxes of the training part have no area: ``invalid: drop``.

    The categories of the training part become the labels 1, 2, ... in the order of their ids. Raises UserError as
    `boxes_csv` does.
    """
    what = "dataset 'coco'"
    named = split_names(what, splits, COCO_SPLITS)
    store = open_store(locate(what, root))
    parts: dict[str, list[Described]] = {}
    categories: dict[int, str] = {}
    for part, split in named.items():
        if split is None:
            continue
        folder = filled(what, "images", images, split)
        table = file_of(store, filled(what, "annotations", annotations, split))
        content = _json(store, table)
        own = _categories(f"{store.path}: {table}", content)
        categories = categories or own
        differs = next((key for key, name in own.items() if categories.get(key, name) != name), None)
        if differs is not None:
            raise UserError(
                f"{store.path}: {table}: category {differs} is '{own[differs]}', but '{categories[differs]}' in the training part"
            )
        parts[part] = _instances(store, table, content, folder, categories, invalid)
    _check_boxes_to_learn(what, parts["train"])
    classes = list(categories.values())
    sets = {
        part: BoxedImages(store, found, classes, augment if part == "train" else ()) for part, found in parts.items()
    }
    return BoxedDataset(sets["train"], sets.get("validation"), sets["test"], classes)


def _names(what: str, names: Any) -> list[str]:
    """The names of classes that a config states, each once."""
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise UserError(f"{what}: names must be a list of class names, got {names!r}")
    found = [str(name).strip() for name in names]
    twice = next((name for name in found if found.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{what}: names has '{twice}' twice")
    return found


def _categories(place: str, content: Mapping[str, Any]) -> dict[int, str]:
    """The categories of a COCO file by their ids, in the order of these."""
    entries = [(c["id"], str(c["name"])) for c in content["categories"]]
    wrong = next((key for key, _ in entries if not isinstance(key, int) or isinstance(key, bool)), None)
    if wrong is not None or not entries:
        raise UserError(
            f"{place}: " + (f"the id {wrong!r} of a category is not a whole number" if entries else "no categories")
        )
    for of, values in (("id", [key for key, _ in entries]), ("name", [name for _, name in entries])):
        twice = next((value for value in values if values.count(value) > 1), None)  # type: ignore[arg-type]
        if twice is not None:
            raise UserError(f"{place}: two categories have the {of} {twice!r}")
    return dict(sorted(entries))


def _instances(
    store: Store, table: str, content: Mapping[str, Any], folder: str, categories: Mapping[int, str], invalid: Invalid
) -> list[Described]:
    """The images of a COCO file, in its order, with their boxes."""
    place, files = f"{store.path}: {table}", files_below(store, folder)
    labels = {category: label for label, category in enumerate(categories, 1)}
    odd = next((image["id"] for image in content["images"] if not isinstance(image["id"], (int, str))), None)
    if odd is not None:
        raise UserError(f"{place}: the id {odd!r} of an image is not a number")
    boxes: dict[Any, list[tuple[list[float], int, int]]] = {}
    for image in content["images"]:
        if image["id"] in boxes:
            first = next(one["file_name"] for one in content["images"] if one["id"] == image["id"])
            raise UserError(f"{place}: the images {first} and {image['file_name']} have one id, {image['id']!r}")
        boxes[image["id"]] = []
    for entry in content["annotations"]:
        where = f"{place}, annotation {entry.get('id') if isinstance(entry, Mapping) else entry!r}"
        try:
            image, category, crowd = entry["image_id"], entry["category_id"], entry.get("iscrowd", 0)
            left, top, width, height = (float(number) for number in entry["bbox"])
            known = image in boxes, category in labels, crowd in (0, 1)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{where}: needs image_id, category_id and bbox [left, top, width, height] ({error})"
            ) from None
        if not known[2]:
            raise UserError(f"{where}: iscrowd must be 0 or 1, got {crowd!r}")
        if not known[0]:
            raise UserError(f"{where}: its image_id {image} is none of the images")
        if not known[1]:
            raise UserError(
                f"{where}: its category_id {category} is none of the training part's {len(labels)} categories"
            )
        corners = [left, top, left + width, top + height]
        boxes[image].append((corners, labels[category], int(crowd)))
    found = []
    for image in content["images"]:
        name = image["file_name"]
        if not isinstance(name, str) or name not in files:
            raise UserError(f"{place}: there is no image {folder}/{name}{nearest(str(name), list(files)[:1000])}")
        size = (_side(place, image, "width"), _side(place, image, "height"))
        found.append(
            Described(files[name], size, check_boxes(f"{place}, image {name}", boxes[image["id"]], size, invalid))
        )
    if not found:
        raise UserError(f"{place}: holds no images")
    return found


def _parted(
    what: str,
    store: Store,
    images: Sequence[Described],
    classes: Sequence[str],
    test: int,
    validation: int,
    seed: int,
    augment: AugmentSpec,
) -> BoxedDataset:
    """The images drawn into parts, each in their order."""
    if min(test, validation) < 0 or test < 1 or test + validation >= len(images):
        raise UserError(
            f"{what}: a test part of {test} and a validation part of {validation} images leave none of {len(images)} to train on"
            if test > 0 and validation >= 0
            else f"{what}: test must be at least 1 and validation at least 0, got {test} and {validation}"
        )
    order = torch.randperm(len(images), generator=make_generator(seed, "boxes"))
    ends = (test, test + validation, len(images))
    rows = [order[start:end].sort().values.tolist() for start, end in zip((0, *ends), ends, strict=False)]
    tested, validated, trained = ([images[row] for row in part] for part in rows)
    _check_boxes_to_learn(what, trained)
    return BoxedDataset(
        BoxedImages(store, trained, classes, augment),
        BoxedImages(store, validated, classes) if validated else None,
        BoxedImages(store, tested, classes),
        list(classes),
    )


def _check_boxes_to_learn(what: str, images: Sequence[Described]) -> None:
    if not any((image.boxes.crowd == 0).any() for image in images):
        raise UserError(f"{what}: no image of the training part has a box (but around crowds): nothing to learn")


# Files


def _table(store: Store, name: str) -> list[dict[str, str]]:
    place = f"{store.path}: {name}"
    try:
        reader = csv.DictReader(io.StringIO(store.read(name).decode("utf-8-sig")))
        rows, header = list(reader), reader.fieldnames or []
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{place} is not a table of comma-separated values ({error})") from None
    missing = [column for column in COLUMNS if column not in header]
    if missing:
        raise UserError(
            f"{place}: its first line has no column {missing[0]}{nearest(missing[0], header)} (needed: {', '.join(COLUMNS)})"
        )
    for number, row in enumerate(rows, 2):
        if None in row or any(value is None for value in row.values()):
            raise UserError(
                f"{place}, line {number}: has another number of columns than the first line's {len(header)}"
            )
        row.update({column: row[column].strip() for column in COLUMNS[3:]})
    if not rows:
        raise UserError(f"{place} has no rows")
    return rows


def _number(place: str, row: Mapping[str, str], column: str) -> float:
    try:
        return float(row[column])
    except ValueError:
        raise UserError(f"{place}: {column} must be a number, got {row[column]!r}") from None


def _side(place: str, row: Mapping[str, Any], column: str) -> int:
    """A width or height in pixels."""
    try:
        value = float(row[column])
    except (ValueError, TypeError):
        value = 0.0
    if not (1 <= value < 1e6 and value.is_integer()):
        raise UserError(f"{place}: {column} must be a whole number of pixels, got {row[column]!r}")
    return int(value)


def _label(place: str, name: str, classes: Sequence[str]) -> int:
    if name not in classes:
        shown = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
        raise UserError(f"{place}: class {name!r} is none of the classes{nearest(name, classes)} (allowed: {shown})")
    return list(classes).index(name) + 1


def _json(store: Store, name: str) -> Mapping[str, Any]:
    place = f"{store.path}: {name}"
    try:
        content = json.loads(store.read(name))
    except ValueError as error:
        raise UserError(f"{place} is not JSON ({error})") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, Mapping) or not isinstance(content.get(key), list):
            raise UserError(f"{place}: has no list '{key}' (needed: images, annotations, categories)")
    for key, wanted in (("images", ("id", "file_name", "width", "height")), ("categories", ("id", "name"))):
        for number, entry in enumerate(content[key]):
            missing = [part for part in wanted if not isinstance(entry, Mapping) or part not in entry]
            if missing:
                raise UserError(f"{place}: {key}[{number}] has no '{missing[0]}' (needed: {', '.join(wanted)})")
    return content  # type: ignore[no-any-return]
