"""Data sets of images with a distance for each pixel."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

import numpy as np
import torch
from PIL import Image

from distpro.data.datasets import DATASETS, Source, locate
from distpro.data.files import THREADS, ImageFiles, Store, open_store, unreadable
from distpro.data.splits import Split
from distpro.data.trees import filled, size_of, split_names, stated_size, trees_of
from pathways.registry import UserError, nearest

PARTS = {"train": "train", "validation": None, "test": "test"}
MOST_UNITS = 65535


@DATASETS.register("depth")
def depth(
    root: str | None = None,
    images: str = "{split}/*.jpg",
    depths: str = "{split}/*.png",
    lists: str | None = None,
    splits: Mapping[str, str | None] | None = None,
    scale: float = 0.001,
    most: float | None = None,
    image_size: int | Sequence[int] | None = None,
) -> Source:
    """Images and, of the same size, depth maps: grey image files of 16 (or 8) bits, in a folder, a .zip or a .tar, or in one
    folder inside it. All are held in memory, five bytes a pixel.

    images, depths: their paths, where ``{split}`` stands for a name of ``splits`` and each ``*`` for a part of a name: what
    it stands for in an image's path, it does in its depth map's. ``rgb/*/color_*.jpg``, ``depth/*/depth_*.png``.
    lists: in place of the two, files with an image and its depth map on each line, ``{split}.txt``; what else a line says
    is left aside.
    splits: what the parts are called, by default ``{train: train, validation: null, test: test}``; null: there is none.
    scale: metres that one unit of the files stands for, by default those of millimetres. 0 is no measurement.
    most: metres beyond which there is no measurement either, for instance of sensors that write 65535.
    image_size: side, or [height, width], to which the images are scaled (bilinear) with their depth (nearest neighbour);
    by default the files must be of one size.

    Raises UserError for what is missing or damaged, for sizes that differ, and for a depth map without a measurement.
    """
    what = "dataset 'depth'"
    parts = split_names(what, splits, PARTS)
    for name, value in (("scale", scale), ("most", most)):
        if value is not None and not (isinstance(value, (int, float)) and 0 < value < math.inf):
            raise UserError(f"{what}: {name} must be a number of metres above 0, got {value!r}")
    if lists is None and images.count("*") != depths.count("*"):
        raise UserError(f"{what}: images and depths must have as many *, got {images!r} and {depths!r}")
    for key, pattern in (("images", images), ("depths", depths)) if lists is None else (("lists", lists),):
        if "{split}" not in pattern:
            raise UserError(f"{what}: {key} needs '{{split}}' to tell the parts apart, got {pattern!r}")
    tree = _Tree(open_store(locate(what, root)))
    pairs = {
        part: tree.matching(filled(what, "images", images, name), filled(what, "depths", depths, name))
        if lists is None
        else tree.listed(filled(what, "lists", lists, name))
        for part, name in parts.items()
        if name is not None
    }
    size = stated_size(what, image_size) or size_of(tree.store, pairs["train"][0][0])
    reader = _Reader(tree.store, size, image_size is not None, float(scale), most)
    read = {part: reader.read(found) for part, found in pairs.items()}
    return Source(read["train"], read["test"], [], validation=read.get("validation"))


@DATASETS.register("sevenscenes")
def sevenscenes(root: str | None = None, image_size: int | Sequence[int] | None = None) -> Source:
    """Frames of 7-Scenes (Shotton et al. 2013), images ``train/N.jpg`` and millimetres ``train/N.png``, and likewise for
    ``test``. 65535, which the original files have where nothing was measured, is left out. ``image_size``: as of ``depth``."""
    place = str(locate("dataset 'sevenscenes'", root))
    return depth(place, most=MOST_UNITS / 1000 - 0.001, image_size=image_size)


@DATASETS.register("nyuv2")
def nyuv2(
    root: str | None = None,
    image_size: int | Sequence[int] | None = None,
    splits: Mapping[str, str | None] | None = None,
) -> Source:
    """NYU Depth v2 (Silberman et al. 2012) as image files, laid out as for BTS and its successors:
    ``sync/SCENE/rgb_N.jpg`` and ``sync/SCENE/sync_depth_N.png``, in millimetres, to train, and likewise
    ``official_splits/test`` to test; ``splits`` names other folders. Nothing is cropped at the borders. ``image_size``: as
    of ``depth``; the whole set (24,231 images) takes 2.1 GB at [114, 152], 8.4 GB at S2D's [228, 304]."""
    names = {"train": "sync", "test": "official_splits/test", **(splits or {})}
    place = str(locate("dataset 'nyuv2'", root))
    patterns = "{split}/*/rgb_*.jpg", "{split}/*/sync_depth_*.png"
    return depth(place, *patterns, splits=names, image_size=image_size)


class _Tree:
    """Where the files of each part lie."""

    def __init__(self, store: Store):
        self.store = store
        self.trees = [{file.as_posix(): name for file, name in tree.items()} for tree in trees_of(store)]

    def matching(self, images: str, depths: str) -> list[tuple[str, str]]:
        """(image, depth map) files of a part, sorted."""
        found, maps = (self._by_stars(place) for place in (images, depths))
        for one, other, place in ((found, maps, depths), (maps, found, images)):
            alone = next((stars for stars in sorted(one) if stars not in other), None)
            if alone is not None:
                missing = _starred(place, alone)
                raise UserError(f"{self.store.path}: {one[alone]} has no counterpart {missing}")
        return [(found[stars], maps[stars]) for stars in sorted(found)]

    def _by_stars(self, place: str) -> dict[tuple[str, ...], str]:
        """The files that fit a pattern by what its stars stand for."""
        pattern = re.compile("([^/]*)".join(map(re.escape, place.split("*"))))
        for tree in self.trees:
            fits = {match.groups(): name for file, name in tree.items() if (match := pattern.fullmatch(file))}
            if fits:
                return fits
        raise UserError(f"{self.store.path}: no files {place}")

    def listed(self, listing: str) -> list[tuple[str, str]]:
        """(image, depth map) files of a part, in the order of its list."""
        tree = next((tree for tree in self.trees if listing in tree), None)
        if tree is None:
            raise UserError(f"{self.store.path}: no list {listing}")
        try:
            lines = self.store.read(tree[listing]).decode("utf-8").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"{self.store.path}: {listing} is not a text file") from None
        pairs = []
        for number, words in ((n, line.split()) for n, line in enumerate(lines, 1) if line.strip()):
            at = f"{self.store.path}: {listing}, line {number}"
            if len(words) < 2:
                raise UserError(f"{at}: expected an image and its depth map, found '{' '.join(words)}'")
            files = [PurePosixPath(word.lstrip("/")).as_posix() for word in words[:2]]
            for file in files:
                if file not in tree:
                    raise UserError(f"{at}: there is no file {file}{nearest(file, tree)}")
            pairs.append((tree[files[0]], tree[files[1]]))
        if not pairs:
            raise UserError(f"{self.store.path}: {listing} is empty")
        return pairs


def _starred(place: str, stars: Sequence[str]) -> str:
    for star in stars:
        place = place.replace("*", star, 1)
    return place


class _Reader:
    """Reads pairs of files into memory."""

    def __init__(self, store: Store, size: tuple[int, int], resize: bool, scale: float, most: float | None):
        self.store, self.size, self.resize, self.scale = store, size, resize, scale
        self.most = MOST_UNITS if most is None else math.floor(most / scale + 1e-9)

    def read(self, pairs: Sequence[tuple[str, str]]) -> Split:
        """The images (N, 3, H, W) and depth maps (N, H, W) of files."""
        images = np.empty((len(pairs), 3, *self.size), np.uint8)
        maps = np.empty((len(pairs), *self.size), np.uint16)
        files = ImageFiles(self.store, [image for image, _ in pairs], self.size, None)

        def fill(row: int) -> None:
            image = files.open(row)
            found = self._depth(pairs[row][1], image.size, pairs[row][0])
            if self.resize:
                image = image.resize(self.size[::-1], Image.Resampling.BILINEAR)
                rows, columns = (_nearest(new, old) for new, old in zip(self.size, found.shape, strict=True))
                found = found[rows[:, None], columns]
            elif found.shape != self.size:
                sizes = ("x".join(map(str, size)) for size in (found.shape, self.size))
                raise UserError(
                    f"{self.store.path}: {pairs[row][0]} is {next(sizes)}, but others are {next(sizes)}: give image_size"
                )
            images[row], maps[row] = np.asarray(image).transpose(2, 0, 1), found

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(fill, range(len(pairs))))
        return Split.of(torch.from_numpy(images), torch.from_numpy(maps), self.scale)

    def _depth(self, name: str, size: tuple[int, int], image: str) -> np.ndarray:
        """A depth map in its units, (H, W) uint16, 0 where there is no measurement. ``size``: (width, height) of its image."""
        place = f"{self.store.path}: {name}"
        try:
            stored = Image.open(io.BytesIO(self.store.read(name)))
            stored.load()
        except Exception as error:  # readers of archives and images raise whatever a damaged file makes them trip over
            raise unreadable(place, error) from None
        if stored.mode not in ("L", "I") and not stored.mode.startswith("I;16"):
            raise UserError(
                f"{place} has pixels of mode {stored.mode}; a depth map is grey, whole numbers of 16 or 8 bits"
            )
        if stored.size != size:
            found, other = (f"{height}x{width}" for width, height in (stored.size, size))
            raise UserError(f"{place} is {found}, but its image {image} is {other}")
        values = np.asarray(stored)
        if stored.mode == "I" and (values.min() < 0 or values.max() > MOST_UNITS):
            wrong = values.min() if values.min() < 0 else values.max()
            raise UserError(f"{place} holds a depth of {wrong} (allowed: 0, not measured, to {MOST_UNITS})")
        values = np.where(values > self.most, 0, values).astype(np.uint16)
        if not values.any():
            beyond = "" if self.most >= MOST_UNITS else f", or beyond {self.most * self.scale:g} m"
            raise UserError(f"{place} holds no measurement: every pixel is 0{beyond}")
        return values


def _nearest(new: int, old: int) -> np.ndarray:
    """The pixels of ``old`` whose centres are nearest to those of ``new``, as Pillow takes them."""
    return ((np.arange(new) + 0.5) * old / new).astype(np.int64)
