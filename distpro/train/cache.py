"""The teacher's tensors kept on disk, so that a later epoch or run need not compute them again.

cache.json   what the cache was made for         sums.bin   a checksum per row, 0 where there is none yet
tap-N.bin    the rows of the N-th tap, by name

A row is what one sample gave in one epoch. It counts as present if its checksum fits what the tap files hold, so a
process or a machine that stops between two writes, or two processes that write one row at once, leave no wrong row.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distpro.files import write_atomically
from pathways.registry import UserError

FORMAT = "distpro teacher cache 1"
ANSWERS = "teacher's answers"
SHOWN = 128  # values of each tap that cache.json keeps

_NONE = object()
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
_PIECE = 2**26  # bytes that a digest hashes in one go


class TeacherCache:
    """What the teacher gave for each sample, in ``epochs`` versions: epoch e reads and writes version e mod ``epochs``,
    so augmentations have to repeat after as many epochs.

    Several processes may use one folder at a time. On a CUDA device, reading waits for ``index``.

    >>> import tempfile
    >>> teacher, images = nn.Linear(4, 3), torch.randn(10, 4)
    >>> with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
    ...     example = {"logits": teacher(images[:2])}
    ...     cache = TeacherCache(f"{folder}/cache", torch.arange(10), 1, example, {"teacher weights": digest(teacher)})
    ...     index = torch.tensor([7, 2])
    ...     print(cache.read(index, epoch=0))
    ...     cache.write(index, 0, {"logits": teacher(images[index])})
    ...     print(torch.equal(cache.read(index, epoch=5)["logits"], teacher(images[index])), cache.bytes)
    None
    True 200

    Args:
        folder: opened if it holds a cache, created otherwise.
        index: (N,) int64, the numbers of the samples that may be asked for, each once.
        epochs: versions of each sample; 1 where its image is always the same.
        taps: the teacher's tensors of any batch of at least two rows: what is read has their shapes, dtypes and strides.
        fingerprint: plain values, by the names that an error should use, of all that decides what the teacher gives.
        views: rows in a batch per sample, those of a sample one after the other.
        device: where the tensors that are read go.
        answers: by tap, what the teacher gives for samples that are always the same. It shows that the teacher's code has changed,
            which no fingerprint does.
        tolerance: how far these may lie from those that the cache was made with, as a part of their root mean square: other
            machines and kernels round in other ways.

    Raises UserError if the folder holds a cache that was made for something else, a damaged one, or no cache at all,
    and if the disk has no room for all rows.
    """

    def __init__(
        self,
        folder: str | Path,
        index: Tensor,
        epochs: int,
        taps: Mapping[str, Tensor],
        fingerprint: Mapping[str, Any],
        *,
        views: int = 1,
        device: str | torch.device = "cpu",
        answers: Mapping[str, Tensor] | None = None,
        tolerance: float = 0.01,
    ):
        self.folder, self.epochs, self.device = Path(folder), epochs, torch.device(device)
        self.samples = len(index)
        index = index.cpu()
        self._row_of = torch.full((int(index.max()) + 2,), -1)  # the last stands for all numbers that are too high
        self._row_of[index] = torch.arange(self.samples)
        self.taps = {name: _Tap(name, taps[name], views) for name in sorted(taps)}
        self._widths = {f"tap-{n}.bin": tap.width for n, tap in enumerate(self.taps.values())} | {"sums.bin": 8}
        facts = {
            "samples": self.samples,
            "sample numbers": _digest([("index", index)]),
            "epochs": epochs,
            "views": views,
            **{f"tap '{name}'": tap.facts for name, tap in self.taps.items()},
            "byte order": sys.byteorder,
        }
        assert not facts.keys() & fingerprint.keys()
        self._tolerance = tolerance
        said = {ANSWERS: {name: _some_values(answers[name]) for name in sorted(answers)}} if answers else {}
        self._open(json.loads(json.dumps({"format": FORMAT, **fingerprint, **facts, **said})))

    @property
    def bytes(self) -> int:
        """Size on disk once every row is there."""
        return self.epochs * self.samples * sum(self._widths.values())

    def read(self, index: Tensor, epoch: int) -> dict[str, Tensor] | None:
        """The tensors by tap, (B * views, ...), of the samples ``index`` (B,), or None unless all are there."""
        rows = self._rows(index, epoch)
        sums = self._sums.read(rows)
        if not sums.all():
            return None
        found = [file.read(rows, pin=self.device.type == "cuda") for file in self._files]
        if not torch.equal(_checksums(found), sums):
            return None
        moved = (words.to(self.device, non_blocking=True) for words in found)
        return {name: tap.tensor(words) for (name, tap), words in zip(self.taps.items(), moved, strict=True)}

    def write(self, index: Tensor, epoch: int, features: Mapping[str, Tensor]) -> None:
        """Keep the tensors of the samples ``index`` (B,); other taps in ``features`` are ignored.

        Raises UserError for tensors of another shape or dtype than the cache holds, and if the disk is full.
        """
        rows = self._rows(index, epoch)
        parts = [tap.words(features[name]) for name, tap in self.taps.items()]
        for file, words in zip(self._files, parts, strict=True):
            file.write(rows, words)
        self._sums.write(rows, _checksums(parts))

    def describe(self) -> str:
        """One line: where, how large, how full."""
        rows = self.epochs * self.samples
        filled = int(self._sums.words.count_nonzero())
        epochs = f" x {self.epochs:,} epochs" if self.epochs > 1 else ""
        return (
            f"teacher cache {self.folder}: {_size(self.bytes)} for {self.samples:,} samples{epochs}, "
            f"{100 * filled // rows}% filled"
        )

    def _rows(self, index: Tensor, epoch: int) -> Tensor:
        rows = self._row_of[index.cpu().clamp(-1, len(self._row_of) - 1)]
        if rows.min() < 0:
            raise UserError(f"{self.folder}: the cache has no sample {int(index.cpu()[rows < 0][0])}")
        return rows + epoch % self.epochs * self.samples

    # Opening

    def _open(self, facts: dict[str, Any]) -> None:
        new = not (self.folder / "cache.json").is_file()
        if new:
            self._check_space()
            self._create(facts)
        self._compare(facts)  # of a new one too: another process may have been first
        if not new:
            self._check_space()
        files = [_File(self.folder / name, self.epochs * self.samples, width) for name, width in self._widths.items()]
        *self._files, self._sums = files

    def _compare(self, facts: dict[str, Any]) -> None:
        try:
            stored = json.loads((self.folder / "cache.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            stored = None
        if not isinstance(stored, dict) or stored.get("format") != FORMAT:
            raise UserError(
                f"{self.folder}: cache.json is damaged or of another version; remove the folder or name another"
            )
        differing = [
            _difference(k, stored, facts)
            for k in {**stored, **facts}
            if k != ANSWERS and stored.get(k, _NONE) != facts.get(k, _NONE)
        ]
        before, now = (of.get(ANSWERS, {}) for of in (stored, facts))  # older caches have none
        changed = [tap for tap in before if tap in now and not _alike(before[tap], now[tap], self._tolerance)]
        if changed and not differing:  # where the weights differ, the answers do too
            differing = [f"what the teacher answers at '{changed[0]}', with the same weights (its code has changed?)"]
        if differing:
            raise UserError(
                f"{self.folder}: this teacher cache was made for something else, what differs: {', '.join(differing)}; "
                "remove the folder or name another"
            )

    def _check_space(self) -> None:
        files = [self.folder / name for name in self._widths]
        there = sum(f.stat().st_blocks * 512 for f in files if f.is_file())  # the files are sparse
        place = next(p for p in (self.folder.absolute(), *self.folder.absolute().parents) if p.is_dir())
        free = shutil.disk_usage(place).free
        if self.bytes - there > free:
            raise UserError(
                f"{self.folder}: the teacher cache needs {_size(self.bytes - there)}, but {_size(free)} are free there; "
                "name a folder on another disk, or cache fewer epochs"
            )

    def _create(self, facts: dict[str, Any]) -> None:
        """Make the folder elsewhere and rename it, which fails if there is something already."""
        place = self.folder.resolve()
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as scratch:
                new = Path(scratch) / "cache"
                new.mkdir()
                for name, width in self._widths.items():
                    with open(new / name, "wb") as file:
                        file.truncate(self.epochs * self.samples * width)
                write_atomically(json.dumps(facts, indent=1) + "\n", new / "cache.json")
                new.rename(place)
        except OSError as error:
            if not (place / "cache.json").is_file():
                raise UserError(
                    f"{self.folder}: no teacher cache, and none can be made there ({error.strerror}); name another folder"
                ) from None


class _Tap:
    """How the rows of one tap lie in the teacher's tensors. A file has their values in the same order."""

    def __init__(self, name: str, example: Tensor, views: int):
        size, strides = example.shape, example.stride()
        if len(example) < 2 or any(stride == 0 and n > 1 for n, stride in zip(size, strides, strict=True)):
            raise UserError(f"tap '{name}': cannot cache a tensor of shape {tuple(size)} and strides {strides}")
        self.name, self.views = name, views
        self.dtype, self.shape = example.dtype, size[1:]
        self.rows = f"{str(self.dtype).removeprefix('torch.')} {tuple(self.shape)}"
        self.width = views * self.shape.numel() * example.element_size()
        self._example_rows, self._example_strides = len(example), strides
        self._order = sorted(range(1, example.dim()), key=lambda d: -strides[d])
        self._dense = example.permute(0, *self._order).is_contiguous()

    @property
    def facts(self) -> str:
        return f"{self.rows}, strides of two {self._strides(2)}"

    def _strides(self, rows: int) -> list[int]:
        """Strides of a tensor of so many rows; those above the rows' own grow with their number."""
        own = self._example_strides[0]
        return [s // self._example_rows * rows if s > own else s for s in self._example_strides]

    def words(self, features: Tensor) -> Tensor:
        """(B * views, ...) → (B, words), on the CPU."""
        if features.shape[1:] != self.shape or features.dtype != self.dtype:
            found = f"{str(features.dtype).removeprefix('torch.')} {tuple(features.shape[1:])}"
            raise UserError(f"tap '{self.name}': the teacher gave rows of {found}, the cache holds {self.rows}")
        flat = features.detach().cpu().permute(0, *self._order).reshape(len(features) // self.views, -1)
        return flat.contiguous().view(_word(self.width))

    def tensor(self, words: Tensor) -> Tensor:
        """(B, words) → (B * views, ...), with the strides that the teacher gives."""
        rows = len(words) * self.views
        size, strides = (rows, *self.shape), self._strides(rows)
        flat = words.view(self.dtype)
        if self._dense:
            return flat.as_strided(size, strides)
        ordered = flat.view(rows, *(size[d] for d in self._order))
        back = [0, *(1 + self._order.index(d) for d in range(1, len(size)))]
        return torch.empty_strided(size, strides, dtype=self.dtype, device=flat.device).copy_(ordered.permute(back))


class _File:
    """Rows of ``width`` bytes. They are read through a memory map, and not written through it: where the disk is full,
    that would kill the process."""

    def __init__(self, path: Path, rows: int, width: int):
        self.path, self.width = path, width
        found = path.stat().st_size if path.is_file() else 0
        if found != rows * width:
            raise UserError(
                f"{path}: the cache is damaged, {found:,} bytes instead of {rows * width:,}; remove the folder"
            )
        try:
            self._file = open(path, "r+b", buffering=0)
        except OSError as error:
            raise UserError(f"{path}: cannot be opened ({error.strerror})") from None
        mapped = mmap.mmap(self._file.fileno(), rows * width)
        self.words = torch.frombuffer(mapped, dtype=_word(width)).view(rows, -1)

    def read(self, rows: Tensor, pin: bool = False) -> Tensor:
        """(B, words)"""
        out = torch.empty((len(rows), self.words.shape[1]), dtype=self.words.dtype, pin_memory=pin)
        return torch.index_select(self.words, 0, rows, out=out)

    def write(self, rows: Tensor, words: Tensor) -> None:
        """Write ``words`` (B, words)."""
        try:
            for row, values in zip(rows.tolist(), words.numpy(), strict=True):
                os.pwrite(self._file.fileno(), values.data, row * self.width)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror})") from None


def _word(width: int) -> torch.dtype:
    return next(word for word in _WORDS if width % word.itemsize == 0)


def _checksums(parts: Iterable[Tensor]) -> Tensor:
    """(B, 1) int64, never 0, of each row of the tensors (B, words)."""
    total: Tensor | int = 0
    for words in parts:
        total = total * 0x9E3779B1 + words.sum(1, keepdim=True, dtype=torch.int64)
    assert isinstance(total, Tensor)
    return total.masked_fill_(total == 0, 1)


def _some_values(tensor: Tensor) -> list[float]:
    """Of a tensor, at most `SHOWN`, evenly spaced."""
    flat = tensor.detach().reshape(-1)
    count = min(SHOWN, len(flat))
    return flat[torch.arange(count, device=flat.device) * len(flat) // count].double().tolist()  # type: ignore[no-any-return]


def _alike(before: list[float], now: list[float], tolerance: float) -> bool:
    """Whether two lists of values are the same but for ``tolerance`` times the root mean square of the first."""
    a, b = torch.tensor(before, dtype=torch.float64), torch.tensor(now, dtype=torch.float64)
    size = a.nan_to_num(posinf=0.0, neginf=0.0).square().mean().sqrt().item()
    return torch.allclose(a, b, rtol=0.0, atol=tolerance * size, equal_nan=True)


def _difference(key: str, stored: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    if key not in stored or key not in facts:
        return f"{key} ({'new' if key in facts else 'not asked for now'})"
    values = [repr(facts_of[key]) for facts_of in (stored, facts)]
    told = all(
        len(v) <= 80 and not re.fullmatch("'[0-9a-f]{32,}'", v) for v in values
    )  # a digest tells nobody anything
    return f"{key} (was {values[0]}, is {values[1]})" if told else key


def _size(count: int) -> str:
    """Bytes in decimal units, as disks are sold.

    >>> _size(999), _size(512 * 10**6), _size(1.234e9)
    ('999 bytes', '512 MB', '1.23 GB')
    """
    power = min(4, int(math.log10(max(count, 1) * 1.0005)) // 3)
    return f"{count / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def digest(module: nn.Module) -> str:
    """Hash of a module's state: names, dtypes, shapes and values, wherever and in whatever memory layout they are."""
    return _digest(sorted(module.state_dict().items()))


def digest_data(images: Tensor, labels: Tensor, index: Tensor) -> str:
    """Hash of samples: all pixels, labels and numbers."""
    return _digest([("images", images), ("labels", labels), ("index", index)])


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    whole = hashlib.blake2b(digest_size=16)
    with ThreadPoolExecutor() as pool:
        for name, tensor in tensors:
            whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            for part in pool.map(lambda piece: hashlib.blake2b(piece.numpy()).digest(), flat.split(_PIECE)):
                whole.update(part)
    return whole.hexdigest()
