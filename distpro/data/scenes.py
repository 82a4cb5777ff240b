"""Cityscapes and Pascal VOC, as their authors lay them out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np

from distpro.data.augment import VOID
from distpro.data.datasets import DATASETS, Source, locate
from distpro.data.files import Store, open_store
from distpro.data.segmentation import read_parts, segmentation
from distpro.data.trees import trees_of
from pathways.registry import UserError

CITYSCAPES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain", "sky",
    "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""labelId of each of these classes (cityscapesscripts/helpers/labels.py); the other ids to 33 are void."""

VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


@DATASETS.register("cityscapes")
def cityscapes(root: str | None = None, image_size: int | Sequence[int] | None = None) -> Source:
    """Cityscapes (Cordts et al., CVPR 2016) with its 19 classes: ``leftImg8bit/{train,val}/CITY/*_leftImg8bit.png`` and
    ``gtFine/{train,val}/CITY/*_gtFine_labelIds.png``, whose ids become the 19 train ids, or void (255). Its ``val`` is the test
    part here: the labels of its own test part are not published.

    image_size: as of ``segmentation``. All images are held in memory: 3,475 of 1024×2048 are 29 GB, of 512×1024 7 GB.

    Raises UserError for what is missing or damaged, and where memory does not suffice.
    """
    store = open_store(locate("dataset 'cityscapes'", root))
    label = np.full(VOID + 1, -1, np.int16)  # no label id
    label[[*range(34), VOID]] = VOID
    label[list(LABEL_IDS)] = range(len(LABEL_IDS))
    pairs = {part: _pairs(store, split) for part, split in (("train", "train"), ("test", "val"))}
    return read_parts("dataset 'cityscapes'", store, pairs, CITYSCAPES, label, image_size)


def _pairs(store: Store, split: str) -> list[tuple[str, str]]:
    """(image, label ids) files of a part, by city."""
    folders = (("leftImg8bit", "_leftImg8bit.png"), ("gtFine", "_gtFine_labelIds.png"))
    images, labels = (_by_scene(store, f"{folder}/{split}", ending) for folder, ending in folders)
    for scene in sorted(images.keys() ^ labels.keys()):
        folder, ending = folders[scene in images]
        raise UserError(
            f"{store.path}: no file {folder}/{split}/{scene}{ending}, of which there is the {_OTHER[folder]}"
        )
    return [(images[scene], labels[scene]) for scene in sorted(images)]


_OTHER = {"leftImg8bit": "annotation", "gtFine": "image"}


def _by_scene(store: Store, folder: str, ending: str) -> dict[str, str]:
    """The files of a folder's cities, by ``city/scene``."""
    parts = PurePosixPath(folder).parts
    for tree in trees_of(store):
        found = {
            PurePosixPath(*file.parts[len(parts) :]).as_posix().removesuffix(ending): name
            for file, name in tree.items()
            if file.parts[: len(parts)] == parts and file.name.endswith(ending)
        }
        if found:
            return found
    raise UserError(f"{store.path}: no files {folder}/CITY/*{ending}")


@DATASETS.register("voc_segmentation")
def voc_segmentation(
    root: str | None = None,
    image_size: int | Sequence[int] = 512,
    fit: str = "pad",
    train: str = "train",
    test: str = "val",
    annotations: str = "SegmentationClass",
) -> Source:
    """Pascal VOC (Everingham et al., IJCV 2010) with 20 classes and background: ``JPEGImages/*.jpg``, palette images
    ``SegmentationClass/*.png`` (255: the border), and the lists ``ImageSets/Segmentation/{train,val}.txt``.

    root: the year's folder, ``VOCdevkit/VOC2012``, or an archive that holds it.
    image_size, fit: as of ``segmentation``; its images are of 500 pixels at most, of any proportion.
    train, test: names of lists; ``trainaug`` with annotations ``SegmentationClassAug`` are those of Hariharan et al. 2011.

    Raises UserError as ``segmentation`` does.
    """
    return segmentation(
        str(locate("dataset 'voc_segmentation'", root)),
        VOC,
        images="JPEGImages",
        annotations=annotations,
        lists="ImageSets/Segmentation/{split}.txt",
        splits={"train": train, "validation": None, "test": test},
        image_size=image_size,
        fit=fit,
    )
