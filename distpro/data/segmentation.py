"""Data sets of images with a class for each pixel."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import PurePosixPath

import numpy as np
import torch
from PIL import Image

from distpro.data.augment import VOID, whole_number
from distpro.data.datasets import DATASETS, Source, locate
from distpro.data.files import SUFFIXES, THREADS, ImageFiles, Store, open_store, unreadable
from distpro.data.splits import Split
from distpro.data.trees import filled, memory, size_of, split_names, stated_size, trees_of
from pathways.registry import UserError

CAMVID = "Sky Building Pole Road Pavement Tree SignSymbol Fence Car Pedestrian Bicyclist".split()
GREY = (124, 116, 104)
"""What pads an image: ImageNet's mean."""
SPLITS = {"train": "train", "validation": "val", "test": "test"}


@DATASETS.register("segmentation")
def segmentation(
    root: str | None = None,
    names: Sequence[str] = (),
    ignore: int | None = None,
    images: str = "{split}",
    annotations: str = "{split}annot",
    lists: str | None = "{split}.txt",
    splits: Mapping[str, str | None] | None = None,
    image_size: int | Sequence[int] | None = None,
    fit: str = "stretch",
) -> Source:
    """Images and, of the same name and size, annotations: 8-bit image files whose pixels are class numbers, in a
    folder, a .zip or a .tar, or in one folder inside it. All are held in memory.

    names: of the classes 0, 1, ... ignore: the number of the pixels that have no class; 255 is such a number always.
    images, annotations: their folders, where ``{split}`` stands for a name of ``splits``.
    lists: files with one image per line, or null: all images of the folder.
    splits: what the parts are called, by default ``{train: train, validation: val, test: test}``; null for a
    validation part: there is none.
    image_size: side, or [height, width], to which the images are scaled (bilinear) with their annotations (nearest
    neighbour); by default the files must be of one size.
    fit: stretch; or pad: no image is scaled, each lies in the upper left corner of image_size, the rest is grey and void.

    Raises UserError for what is missing or damaged, for sizes that differ, for pixels that are no class, and where all to
    train on are void.
    """
    what = "dataset 'segmentation'"
    if isinstance(names, str) or not names or len(names) > VOID:
        raise UserError(f"{what}: names must be a list of 1 to {VOID} class names, got {names!r}")
    if ignore is not None and not (whole_number(ignore, 0) and ignore <= VOID):
        raise UserError(f"{what}: ignore must be null or a whole number from 0 to {VOID}, got {ignore!r}")
    if lists is None and "{split}" not in images:
        raise UserError(f"{what}: with lists null, images needs '{{split}}' to tell the parts apart, got {images!r}")
    parts = split_names(what, splits, SPLITS)
    tree = _Tree(open_store(locate(what, root)))
    pairs = {
        part: tree.pairs(
            name,
            filled(what, "images", images, name),
            filled(what, "annotations", annotations, name),
            None if lists is None else filled(what, "lists", lists, name),
        )
        for part, name in parts.items()
        if name is not None
    }
    label = np.full(VOID + 1, -1, np.int16)
    label[: len(names)] = range(len(names))
    label[[VOID] if ignore is None else [VOID, ignore]] = VOID
    return read_parts(what, tree.store, pairs, [str(n) for n in names], label, image_size, fit)


@DATASETS.register("camvid")
def camvid(root: str | None = None, image_size: int | Sequence[int] | None = None) -> Source:
    """CamVid (Brostow, Fauqueur, Cipolla 2009) with the 11 classes of SegNet, as its authors lay it out: ``train``,
    ``trainannot``, ``train.txt`` and likewise for ``val`` and ``test``. ``image_size``: as of ``segmentation``."""
    return segmentation(str(locate("dataset 'camvid'", root)), CAMVID, ignore=11, image_size=image_size)


def read_parts(
    what: str,
    store: Store,
    pairs: Mapping[str, Sequence[tuple[str, str]]],
    names: Sequence[str],
    label: np.ndarray,
    image_size: int | Sequence[int] | None = None,
    fit: str = "stretch",
) -> Source:
    """The data set of (image, annotation) files of its parts. ``label``: (256,) int16, the class, 255 or -1 (an error) of each
    value of an annotation. ``image_size``, ``fit``: as of `segmentation`. Raises UserError as that does."""
    if fit not in ("stretch", "pad") or (fit == "pad" and image_size is None):
        raise UserError(f"{what}: fit must be stretch, or pad with an image_size, got {fit!r}")
    size = stated_size(what, image_size) or size_of(store, pairs["train"][0][0])
    needed, there = 4 * prod(size) * sum(map(len, pairs.values())), memory()
    if needed > there:
        raise UserError(
            f"{what}: {needed / 1e9:.0f} GB of {size[0]}x{size[1]} images do not fit into {there / 1e9:.0f} GB of memory: "
            "give a smaller image_size"
        )
    reader = _Reader(store, size, "as is" if image_size is None else fit, label)
    read = {part: reader.read(found) for part, found in pairs.items()}
    if read["train"].labels.min() == VOID:
        raise UserError(f"{what}: every pixel of the training part is void: nothing to learn")
    return Source(read["train"], read["test"], list(names), validation=read.get("validation"))


@dataclass
class _Tree:
    """Where the files of each part lie."""

    store: Store
    trees: list[dict[PurePosixPath, str]] = field(init=False)

    def __post_init__(self) -> None:
        self.trees = trees_of(self.store)

    def pairs(self, split: str, images: str, annotations: str, listing: str | None) -> list[tuple[str, str]]:
        """(image, annotation) files of a part in two folders, in the order of its list, else sorted."""
        found, maps = (self._by_stem(folder) for folder in (images, annotations))
        stems = sorted(found) if listing is None else self._listed(listing)
        if not stems:
            raise UserError(f"{self.store.path}: split '{split}' is empty")
        for stem in stems:
            for place, files in ((images, found), (annotations, maps)):
                if stem not in files:
                    raise UserError(f"{self.store.path}: no file {place}/{stem}.* for '{stem}' of split '{split}'")
        return [(found[stem], maps[stem]) for stem in stems]

    def _by_stem(self, folder: str) -> dict[str, str]:
        """The image files below a folder by their name without suffix."""
        parts = PurePosixPath(folder).parts
        for tree in self.trees:
            found: dict[str, str] = {}
            for file, name in tree.items():
                if file.parts[: len(parts)] == parts and file.suffix.lower() in SUFFIXES:
                    if file.stem in found:
                        raise UserError(f"{self.store.path}: {found[file.stem]} and {name} are of one name")
                    found[file.stem] = name
            if found:
                return found
        raise UserError(f"{self.store.path}: no image files in {folder}/")

    def _listed(self, listing: str) -> list[str]:
        """The names in a list, without folder and suffix: of each line the first word."""
        name = next((tree[PurePosixPath(listing)] for tree in self.trees if PurePosixPath(listing) in tree), None)
        if name is None:
            raise UserError(f"{self.store.path}: no list {listing} (lists: null takes all images of a folder)")
        try:
            lines = self.store.read(name).decode("utf-8").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"{self.store.path}: {listing} is not a text file") from None
        words = [line.split()[0] for line in lines if line.strip()]
        files = [PurePosixPath(word) for word in words]
        return [file.stem if file.suffix.lower() in SUFFIXES else file.name for file in files]


class _Reader:
    """Reads pairs of files into memory."""

    def __init__(self, store: Store, size: tuple[int, int], fit: str, label: np.ndarray):
        self.store, self.size, self.fit, self.label = store, size, fit, label

    def read(self, pairs: Sequence[tuple[str, str]]) -> Split:
        """The images (N, 3, H, W) and label maps (N, H, W) of files."""
        images = np.empty((len(pairs), 3, *self.size), np.uint8)
        maps = np.full((len(pairs), *self.size), VOID, np.uint8)
        if self.fit == "pad":
            images[:] = np.array(GREY, np.uint8)[:, None, None]
        files = ImageFiles(self.store, [image for image, _ in pairs], self.size, None)

        def fill(row: int) -> None:
            image = files.open(row)
            annotation = self._annotation(pairs[row][1], image.size, pairs[row][0])
            found, wanted = (f"{height}x{width}" for height, width in (image.size[::-1], self.size))
            width, height = self.size[::-1]
            if self.fit == "stretch":
                image = image.resize((width, height), Image.Resampling.BILINEAR)
                annotation = annotation.resize((width, height), Image.Resampling.NEAREST)
            elif self.fit == "as is" and found != wanted:
                raise UserError(
                    f"{self.store.path}: {pairs[row][0]} is {found}, but others are {wanted}: give image_size"
                )
            elif image.size[0] > width or image.size[1] > height:
                raise UserError(f"{self.store.path}: {pairs[row][0]} is {found}, larger than the image_size {wanted}")
            part = (row, slice(image.size[1]), slice(image.size[0]))
            images[part[0], :, part[1], part[2]] = np.asarray(image).transpose(2, 0, 1)
            maps[part] = self.label[np.asarray(annotation)]

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(fill, range(len(pairs))))
        return Split.of(torch.from_numpy(images), torch.from_numpy(maps))

    def _annotation(self, name: str, size: tuple[int, int], image: str) -> Image.Image:
        """An annotation as stored, its values checked, palettes left aside. ``size``: (width, height) of its image."""
        place = f"{self.store.path}: {name}"
        try:
            annotation = Image.open(io.BytesIO(self.store.read(name)))
            annotation.load()
        except Exception as error:  # readers of archives and images raise whatever a damaged file makes them trip over
            raise unreadable(place, error) from None
        if annotation.mode not in ("L", "P"):
            raise UserError(f"{place} has pixels of mode {annotation.mode}; an annotation is 8-bit grey or palette")
        if annotation.size != size:
            found, other = (f"{height}x{width}" for width, height in (annotation.size, size))
            raise UserError(f"{place} is {found}, but its image {image} is {other}")
        values = np.unique(np.asarray(annotation))
        wrong = values[self.label[values] < 0]
        if wrong.size:
            raise UserError(
                f"{place} holds the value {wrong[0]}, which is neither a class nor ignored (allowed: {_ranges(self.label >= 0)})"
            )
        return annotation


def _ranges(allowed: np.ndarray) -> str:
    """The numbers where an array is True, "0 to 2, 7, 255"."""
    edges = np.flatnonzero(np.diff([0, *allowed.astype(np.int8), 0])).reshape(
        -1, 2
    )  # each run's first and first behind it
    return ", ".join(str(first) if end - first == 1 else f"{first} to {end - 1}" for first, end in edges)
