"""Encoded images in a folder, a .zip or a .tar, decoded on request. Nothing is unpacked to disk."""

from __future__ import annotations

import io
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pathways.registry import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff")
THREADS = os.cpu_count() or 1

Box = Callable[[int, int], tuple[int, int, int, int]]
"""(width, height) of an image -> (left, top, right, bottom) of the part to be shown."""


def check_room(what: str, size: int) -> None:
    """Raise UserError for so many bytes that this machine could not hold them: a small archive may say, or unpack to, any
    number."""
    try:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not of this system
        room = 2**36
    if size > room:
        raise UserError(f"{what}: would need {size / 1e9:,.0f} GB of memory, this machine has {room / 1e9:,.0f}")


def unreadable(place: str, error: Exception) -> UserError:
    """What to raise for an image file that cannot be decoded."""
    unknown = isinstance(error, UnidentifiedImageError)  # whose message is the address of an object
    return UserError(f"{place} is not a readable image ({'none of a kind that is known' if unknown else error})")


class Store(Protocol):
    """Files by their path below ``path``, with '/' between the parts."""

    path: Path

    def names(self) -> list[str]: ...

    def read(self, name: str) -> bytes: ...


@dataclass
class FolderStore:
    path: Path

    def names(self) -> list[str]:
        folders = os.walk(self.path, followlinks=True)
        return [Path(folder, file).relative_to(self.path).as_posix() for folder, _, files in folders for file in files]

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


@dataclass
class ZipStore:
    path: Path

    def __post_init__(self) -> None:
        self._open()

    def _open(self) -> None:
        self._archive, self._process = zipfile.ZipFile(self.path), os.getpid()

    def names(self) -> list[str]:
        return [entry.filename for entry in self._archive.infolist() if not entry.is_dir()]

    def read(self, name: str) -> bytes:
        if self._process != os.getpid():  # a forked worker must not share the parent's file position
            self._open()
        check_room(f"{self.path}: {name}", self._archive.getinfo(name).file_size)
        return self._archive.read(name)

    def __reduce__(self):
        return ZipStore, (self.path,)


@dataclass
class TarStore:
    """An uncompressed tar: the members' places are noted once, then read directly."""

    path: Path

    def __post_init__(self) -> None:
        with tarfile.open(self.path, "r:") as archive:
            self._places = {member.name: (member.offset_data, member.size) for member in archive if member.isreg()}

    def names(self) -> list[str]:
        return list(self._places)

    def read(self, name: str) -> bytes:
        start, size = self._places[name]
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(size)


@dataclass
class PackedTarStore:
    """A compressed tar, which has no places to jump to: its files are held in memory. For small archives."""

    path: Path

    def __post_init__(self) -> None:
        with tarfile.open(self.path, "r:*") as archive:
            members = [(member, archive.extractfile(member)) for member in archive if member.isreg()]
            check_room(str(self.path), sum(member.size for member, _ in members))
            self._files = {member.name: file.read() for member, file in members if file is not None}

    def names(self) -> list[str]:
        return list(self._files)

    def read(self, name: str) -> bytes:
        return self._files[name]


PACKED = (".tar.xz", ".tar.gz", ".tar.bz2", ".tgz")


def open_store(path: Path, packed: bool = False) -> Store:
    """The store for a folder, a .zip or an uncompressed .tar, with ``packed`` also a compressed one. Raises UserError for
    anything else."""
    if path.is_dir():
        return FolderStore(path)
    kinds: dict[str, Callable[[Path], Store]] = {".zip": ZipStore, ".tar": TarStore}
    kinds |= dict.fromkeys(PACKED if packed else (), PackedTarStore)
    kind = next((suffix for suffix in kinds if path.name.lower().endswith(suffix)), None)
    if kind is None:
        raise UserError(f"{path}: expected a folder, a .zip or {'a' if packed else 'an uncompressed'} .tar")
    try:
        return kinds[kind](path)
    except (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, OSError, EOFError) as error:
        raise UserError(f"{path}: not a readable {kind} archive ({error})") from None


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Images ``names`` of ``store`` as RGB of ``size`` (H, W). ``resize``: length to which the short side is scaled
    before the centre crop to ``size``; None: the files must have that size already."""

    store: Store
    names: Sequence[str]
    size: tuple[int, int]
    resize: int | None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, 3, H, W), as of the decoded tensor."""
        return (len(self), 3, *self.size)

    def select(self, rows: Sequence[int]) -> ImageFiles:
        return replace(self, names=[self.names[row] for row in rows])

    def decode(self, rows: Sequence[int], boxes: Sequence[Box] | None = None, threads: int = THREADS) -> Tensor:
        """The images of ``rows``, (N, 3, H, W) uint8: of each its part ``boxes[i]`` scaled to ``size``, without
        ``boxes`` its centre. Raises UserError if a file is damaged or of the wrong size."""
        out = np.empty((len(rows), 3, *self.size), np.uint8)

        def fill(place: int) -> None:
            image = self._decode(rows[place], boxes[place] if boxes else None)
            out[place] = np.asarray(image).transpose(2, 0, 1)

        with ThreadPoolExecutor(threads) as pool:  # Pillow decodes outside the interpreter lock
            list(pool.map(fill, range(len(rows))))
        return torch.from_numpy(out)

    def open(self, row: int) -> Image.Image:
        """One image in full resolution, RGB of 8 bits. Raises UserError if the file is damaged, or does not say which of its
        values is white."""
        try:
            image = Image.open(io.BytesIO(self.store.read(self.names[row])))
            if not _white_is_known(image):
                kind = "floating-point" if image.mode == "F" else "32-bit"
                raise UserError(f"has {kind} pixels, of which no value is known to be white: save it with 8 or 16 bits")
            return _eight_bits(image).convert("RGB")
        except UserError as error:
            raise UserError(f"{self._place(row)} {error}") from None
        except Exception as error:  # readers of archives and images raise whatever a damaged file makes them trip over
            raise unreadable(self._place(row), error) from None

    def _decode(self, row: int, box: Box | None) -> Image.Image:
        image = self.open(row)
        if box is not None:
            return image.crop(box(*image.size)).resize(self.size[::-1], Image.Resampling.BILINEAR)
        if self.resize is not None:
            return _centre(image, self.resize, self.size)
        if image.size[::-1] != self.size:
            found, first = (f"{height}x{width}" for height, width in (image.size[::-1], self.size))
            raise UserError(f"{self._place(row)} is {found}, but others are {first}: give image_size")
        return image

    def _place(self, row: int) -> str:
        return f"{self.store.path}: {self.names[row]}"


def _is_16_bit(image: Image.Image) -> bool:
    """Whether white is 65535. Versions of Pillow open 16-bit grey as I;16 or as I; PNG and PGM have no more bits."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def _white_is_known(image: Image.Image) -> bool:
    return image.mode not in ("I", "F") or _is_16_bit(image)


def _eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit grey image with its values rounded to 8 bits, which Pillow would cut off at 255; any other as it is."""
    if not _is_16_bit(image):
        return image
    values = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _centre(image: Image.Image, resize: int, size: tuple[int, int]) -> Image.Image:
    """Scale the short side to ``resize`` and crop the centre, rounding as torchvision's Resize and CenterCrop do."""
    width, height = image.size
    short = min(width, height)
    width, height = width * resize // short, height * resize // short
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    return image.crop((left, top, left + size[1], top + size[0]))
