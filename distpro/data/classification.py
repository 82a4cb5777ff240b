"""Data sets of images with one class each: CIFAR, arrays, scikit-learn's digits, image folders."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from distpro.console import note, pip_install
from distpro.data.datasets import DATASETS, Source, locate
from distpro.data.files import SUFFIXES, FolderStore, ImageFiles, Store, check_room, open_store
from distpro.data.splits import Split, split
from distpro.data.trees import trees_of
from pathways.registry import UserError, nearest

MOST_CLASSES = 1_000_000
LOOKED_AT = 64  # images of a part whose size is looked at beforehand
PARTS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
PARTS |= dict.fromkeys(("val", "valid", "validation"), "val")
"""What folders of the parts of a set are called, in small letters, and the part."""

CIFAR_MEAN = (125.3 / 255, 123.0 / 255, 113.9 / 255)  # of the field's CIFAR protocol, for CIFAR-10 and CIFAR-100
CIFAR_STD = (63.0 / 255, 62.1 / 255, 66.7 / 255)


@DATASETS.register("cifar10")
def cifar10(root: str | None = None, download: bool = False) -> Source:
    """CIFAR-10 (Krizhevsky 2009), from ``root/cifar-10-batches-py`` as torchvision lays it out."""
    return _cifar("cifar10", "CIFAR10", root, download)


@DATASETS.register("cifar100")
def cifar100(root: str | None = None, download: bool = False) -> Source:
    """CIFAR-100 (Krizhevsky 2009), from ``root/cifar-100-python`` as torchvision lays it out."""
    return _cifar("cifar100", "CIFAR100", root, download)


def _cifar(dataset: str, kind: str, root: str | None, download: bool) -> Source:
    import torchvision.datasets

    build = getattr(torchvision.datasets, kind)
    if download:
        folder = Path(root or ".").expanduser()
    else:
        hint = "; unpack the official python version there, or set download: true"
        folder = locate(f"dataset '{dataset}'", root, build.base_folder, hint).parent
    try:
        train, test = (build(folder, train=train, download=download) for train in (True, False))
    except (RuntimeError, OSError) as error:
        place = folder / build.base_folder
        raise UserError(f"dataset '{dataset}': {place} is incomplete or damaged ({error})") from None
    parts = [_from_arrays(s.data, np.asarray(s.targets)) for s in (train, test)]
    return Source(parts[0], parts[1], list(train.classes), CIFAR_MEAN, CIFAR_STD)


@DATASETS.register("npz")
def npz(root: str | None = None, channels: int | None = None) -> Source:
    """A numpy archive: ``x_train`` and ``x_test`` uint8 (N, H, W, C), (N, H, W) or, of 1 or 3 channels, (N, C, H, W);
    ``y_train`` and ``y_test`` whole numbers (N,), ``names`` of the classes (optional).

    channels: 1 keeps grey images as they are, 3 repeats them to three channels, which is the default: the built-in models
    take three. Images with colours stay as they are.
    """
    if channels not in (None, 1, 3):
        raise UserError(f"dataset 'npz': channels must be 1 or 3, got {channels!r}")
    path = locate("dataset 'npz'", root)
    arrays = _read_npz(path)
    _check_arrays(path, arrays)
    if channels == 1 and arrays["x_train"].shape[3] != 1:
        raise UserError(f"{path}: channels is 1, but the images have {arrays['x_train'].shape[3]}")
    if channels != 1 and arrays["x_train"].shape[3] == 1:
        arrays |= {f"x_{part}": arrays[f"x_{part}"].repeat(3, axis=3) for part in ("train", "test")}
    count = 1 + max(int(arrays["y_train"].max()), int(arrays["y_test"].max()))
    if count > MOST_CLASSES:
        raise UserError(f"{path}: the labels go up to {count - 1}; they number classes (allowed: below {MOST_CLASSES})")
    names = [str(n) for n in arrays.get("names", range(count))]
    if len(names) < count:
        raise UserError(f"{path}: 'names' holds {len(names)} names, but the labels go up to {count - 1}")
    train, test = (_from_arrays(arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in ("train", "test"))
    return Source(train, test, names)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            check_room(str(path), sum(entry.file_size for entry in entries))
            return {entry.filename.removesuffix(".npy"): _read_array(archive, entry) for entry in entries}
    except UserError:
        raise
    except Exception as error:  # numpy and zipfile raise whatever a damaged file makes them trip over
        raise UserError(f"{path}: not a readable .npz of plain arrays ({error})") from None


def _read_array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    """An array of plain values, which has as many as its header says, before room is made for them."""
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with archive.open(entry) as part:
        version = np.lib.format.read_magic(part)
        if version in read_header:  # later versions are for names of fields beyond latin-1
            shape, _, dtype = read_header[version](part)
            said, held = math.prod(shape) * dtype.itemsize, entry.file_size - part.tell()
            if said != held and not dtype.hasobject:
                raise ValueError(f"{entry.filename} says {dtype} {shape}, {said} bytes, and holds {held}")
    with archive.open(entry) as part:
        array: np.ndarray = np.lib.format.read_array(part, allow_pickle=False)
        return array


def _channels_last(what: str, x: np.ndarray) -> np.ndarray:
    """Images (N, H, W, C) of (N, H, W), (N, H, W, C) or (N, C, H, W). Raises UserError where it may be either."""
    if x.ndim == 3:
        return x[..., None]
    first, last = x.shape[1], x.shape[3]
    either = first in (1, 3) and last in (1, 3)
    other = last > 4 and first not in (1, 3) and x.shape[2] == last != first  # channels-first, by its square images
    if either or other:
        raise UserError(f"{what}: {x.shape} may be (N, C, H, W) or (N, H, W, C); store images as (N, H, W, C)")
    return x.transpose(0, 2, 3, 1) if first in (1, 3) and last > 4 else x


def _check_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Raise UserError for what is not as `npz` says; images become (N, H, W, C)."""
    missing = [key for key in ("x_train", "y_train", "x_test", "y_test") if key not in arrays]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)} (it holds {', '.join(arrays) or 'nothing'})")
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.dtype != np.uint8 or x.ndim not in (3, 4) or x.size == 0:
            raise UserError(f"{path}: x_{part} must be uint8 (N, H, W, C) or (N, H, W), got {x.dtype} {x.shape}")
        arrays[f"x_{part}"] = _channels_last(f"{path}: x_{part}", x)
        if y.dtype.kind not in "iu" or y.shape != x.shape[:1] or y.min() < 0:
            raise UserError(f"{path}: y_{part} must be {len(x)} labels from 0, got {y.dtype} {y.shape}")
    shapes = arrays["x_train"].shape[1:], arrays["x_test"].shape[1:]
    if shapes[0] != shapes[1]:
        raise UserError(f"{path}: the images of x_train are {shapes[0]}, those of x_test {shapes[1]}")


def _from_arrays(images: np.ndarray, labels: np.ndarray) -> Split:
    channels_first = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return Split.of(torch.from_numpy(channels_first), torch.from_numpy(labels.astype(np.int64)))


@DATASETS.register("digits")
def digits(image_size: int = 16) -> Source:
    """The 1797 handwritten digits that come with scikit-learn (Alpaydin, Kaynak 1998): 8x8 grey pixels repeated to
    ``image_size`` and to three channels; 1438 to train, 359 to test, the same always."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(f"dataset 'digits' needs scikit-learn: {pip_install('demo')}") from None
    if image_size < 8 or image_size % 8:
        raise UserError(f"dataset 'digits': image_size must be a multiple of 8, got {image_size}")
    bunch = load_digits()
    grey = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))
    larger = grey.repeat_interleave(image_size // 8, 1).repeat_interleave(image_size // 8, 2)
    whole = Split.of(larger.unsqueeze(1).repeat(1, 3, 1, 1), torch.from_numpy(bunch.target.astype(np.int64)))
    train, test = (Split.of(part.images, part.labels) for part in split(whole, 0.8, seed=0))
    return Source(train, test, [str(digit) for digit in range(10)])


@DATASETS.register("folder")
def folder(
    root: str | None = None,
    image_size: int | None = None,
    resize: int | None = None,
    stream: bool | None = None,
    test_fraction: float | None = None,
) -> Source:
    """Image files ``train/<class>/...`` and ``test/<class>/...`` (or ``val``, ``valid``, ``validation``; in small letters or
    capitals) in a folder, a .zip or a .tar, or in one folder inside it.

    image_size: side of the square images; by default the files must be of one size. resize: length to which the short
    side is scaled before the centre crop, default ``image_size``; ImageNet's protocol is 224 and 256. stream: decode
    at each use (true), once (false), or by size: beyond 2 GiB of decoded images at each use. test_fraction: where there is no
    test part, the share of each class, always the same images, that becomes it: of ``train``, or of ``<class>/...`` without parts.
    """
    store = open_store(locate("dataset 'folder'", root))
    tree = image_tree(store, whole=test_fraction is not None)
    train, test = tree["train"], tree.get("test") or tree.get("val", [])
    if "test" in tree and "val" in tree:
        note(f"{store.path}: {tree['val'][0][0].parent}/ is not used: the test part is {test[0][0].parent}/")
    _note_empty(store, {of for of, _ in train})
    names = sorted({of.name for of, _ in train})
    unknown = sorted({of.name for of, _ in test}.difference(names))
    if unknown:
        raise UserError(f"{store.path}: test class '{unknown[0]}' is not a training class{nearest(unknown[0], names)}")
    size = _image_size(store, train[0][1], image_size, resize)
    number = {name: i for i, name in enumerate(names)}

    def as_split(files: list[tuple[PurePosixPath, str]]) -> Split:
        images = ImageFiles(store, [name for _, name in files], size, image_size and (resize or image_size))
        if image_size is None:  # a part that is streamed would show another size in the middle of a training
            images.decode(range(0, len(images), -(-len(images) // LOOKED_AT)))
        return Split.of(images, torch.tensor([number[of.name] for of, _ in files]))

    if test:
        return Source(as_split(train), as_split(test), names, stream=stream)
    assert test_fraction is not None
    kept, held = (Split.of(p.images, p.labels) for p in split(as_split(train), 1 - test_fraction, seed=0))
    return Source(kept, held, names, stream=stream)


def image_tree(store: Store, whole: bool = False) -> dict[str, list[tuple[PurePosixPath, str]]]:
    """(folder of the class, file) of each image by part of the set, sorted. ``whole``: a set without a test part, or without any
    parts, whose images are all ``train``, is taken too. Raises UserError where there are no such images."""
    tree: dict[str, list[tuple[PurePosixPath, str]]] = {}
    folder_of = cache(PurePosixPath)  # one object for the images of a class, of which there may be millions
    for name in sorted(store.names()):
        parts = PurePosixPath(name).parts
        start = next((i for i in (0, 1) if parts[i : i + 1] and parts[i].lower() in PARTS), None)
        if start is not None and len(parts) >= start + 3 and _is_image(parts):
            tree.setdefault(PARTS[parts[start].lower()], []).append((folder_of(*parts[: start + 2]), name))
    for part, files in tree.items():
        called = sorted({of.parent.name for of, _ in files})
        if len(called) > 1:
            raise UserError(f"{store.path}: {called[0]}/ and {called[1]}/ are both the {part} part; rename one of them")
    if whole and not tree:
        tree = {"train": _without_parts(store)}
    if whole and not tree.get("train"):
        raise UserError(f"{store.path}: no image files in train/<class>/ or <class>/")
    for wanted in () if whole else (("train",), ("test", "val")):
        if not any(part in tree for part in wanted):
            place = " or ".join(f"{part}/<class>/" for part in wanted)
            raise UserError(f"{store.path}: no image files in {place} (test_fraction: 0.2 cuts a test part off)")
    return tree


def _without_parts(store: Store) -> list[tuple[PurePosixPath, str]]:
    """(folder of the class, file) of the images in ``<class>/...``, sorted; of the innermost folder that holds several such."""
    images = {path: name for path, name in trees_of(store)[-1].items() if _is_image(path.parts)}
    files = {path: name for path, name in images.items() if len(path.parts) > 1}
    names = sorted({path.parts[0] for path in files} or {PurePosixPath(name).parent.name for name in images.values()})
    if names == [""]:  # images without any folder
        return []
    if names and all(name.lower() in PARTS for name in names):
        raise UserError(f"{store.path}: {names[0]}/ has no folder for each class: {names[0]}/<class>/")
    if names and not files:
        raise UserError(f"{store.path}: only one class: {names[0]}")
    folder_of = cache(PurePosixPath)
    return sorted((folder_of(*PurePosixPath(n).parts[: 1 - len(path.parts)]), n) for path, n in files.items())


def _note_empty(store: Store, classes: set[PurePosixPath]) -> None:
    """Say which folders beside those of the classes hold no image, of which no class is made."""
    if not isinstance(store, FolderStore):
        return
    hidden = (".", "__MACOSX")
    beside = {f for top in {of.parent for of in classes} for f in (store.path / top).iterdir() if f.is_dir()}
    found = {PurePosixPath(f.relative_to(store.path).as_posix()) for f in beside if not f.name.startswith(hidden)}
    for of in sorted(found - classes):
        note(f"{store.path}: {of}/ holds no image: it is left out of the {len(classes)} classes")


def _is_image(parts: Sequence[str]) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in parts)
    return parts[-1].lower().endswith(SUFFIXES) and not hidden


def _image_size(store: Store, first: str, image_size: int | None, resize: int | None) -> tuple[int, int]:
    if image_size is None:
        if resize is not None:
            raise UserError("dataset 'folder': resize needs image_size")
        width, height = ImageFiles(store, [first], (0, 0), None).open(0).size
        return height, width
    if image_size < 1 or (resize is not None and resize < image_size):
        raise UserError(f"dataset 'folder': need 1 <= image_size <= resize, got {image_size} and {resize}")
    return image_size, image_size
