"""Files that are whole or absent, and that never run code when they are read."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
import secrets
import struct
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from pathways.registry import UserError

OLD_GUESTS = (
    "argparse.Namespace",
    "collections.defaultdict",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
)
"""What files of PyTorch before 1.6 often hold beside weights."""


def write_atomically(data: bytes | str, path: str | Path, kept_as: Path | None = None) -> None:
    """Write a file under a temporary name in the same folder, flush it to disk, and rename it into place. Who may read it is
    left to the umask. ``kept_as``: what the file that was there is called then. Raises OSError that names the file."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with naming(path):
            with open(temporary, "xb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            if kept_as is not None:
                _keep(path, kept_as)
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Let an OSError say which file it is about: that of a full disk does not."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def save_atomically(content: Any, path: str | Path, kept_as: Path | None = None) -> None:
    """``torch.save`` to a file that is the old one or the new one, never half of each; ``kept_as`` names the old one then."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(buffer.getvalue(), path, kept_as)


def _keep(path: Path, kept: Path) -> None:
    """Give the file a second name: ``path`` is there at every moment. Does nothing where there is none yet, or the file system
    has no hard links."""
    temporary = kept.with_name(f".{kept.name}.{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):
        os.link(path, temporary)
        os.replace(temporary, kept)
    temporary.unlink(missing_ok=True)


def is_leftover(name: str) -> bool:
    """Whether a file is called as the temporary ones of writers are, and as the locks that Optuna is about to remove."""
    return re.fullmatch(r"\..+\.[0-9a-f]{8}|.+\.lock[0-9a-f-]{36}\.rename", name) is not None


def remove_leftovers(folder: Path, age: float = 0.0) -> None:
    """Remove the temporary files of writers that were killed. ``age``: seconds that they have at least, of a folder that others
    may be writing to."""
    for path in (*folder.rglob(".*"), *folder.rglob("*.rename")):
        if is_leftover(path.name) and path.is_file():
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                if not age or time.time() - path.stat().st_mtime > age:
                    path.unlink()


class Unread(list):
    """What stands for an object of a file that is not read: nothing of its class is imported or called."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


def _unread_dict(*args: Any) -> dict[Any, Any]:
    """In place of ``collections.defaultdict``: the unpickler fills plain dicts only."""
    return {}


def load_safely(path: str | Path, weights: bool = False, wanted: str = "student.pt") -> Any:
    """``torch.load(weights_only=True)`` on the CPU.

    Args:
        weights: of somebody else's file, of which only tensors are wanted: objects beside them (settings, numpy's scalars,
            an optimiser's defaultdict) are replaced by something empty, without a look at what they are.
        wanted: what such files are usually called, to be named where ``path`` is something else.

    Raises UserError if the file is missing, damaged, or (else) holds anything but tensors, numbers, strings, lists and dicts.
    """
    path = Path(path)
    near = path / wanted if path.is_dir() else path.with_name(wanted)
    there = f"{near}?" if near.is_file() else ""
    if path.is_dir():
        raise UserError(f"{path}: no such file, it is a folder{f': {there}' if there else f' without {wanted}'}")
    if not path.is_file():
        raise UserError(f"{path}: no such file{f'; did you mean {there}' if there else ''}")
    if path.suffix in (".yaml", ".yml", ".json", ".txt") and not _is_zip(path):
        raise UserError(f"{path}: is a text file, not one of torch.save{f'; did you mean {there}' if there else ''}")
    _check_whole(path)
    advice = "; save it again where it was made: torch.save(model.state_dict(), FILE)" if weights else ""
    try:
        with warnings.catch_warnings(), safe_globals(_replaced(path) if weights else []):
            warnings.simplefilter("ignore")  # of a damaged file's pickle protocol
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: holds more than tensors and plain values (or is damaged); not loaded{advice}"
        ) from None
    except Exception as error:  # damaged bytes can fail anywhere in the unpickler
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {reason})") from None


def _check_whole(path: Path) -> None:
    """Raise UserError where a part of a zip file does not fit its checksum, which ``torch.load`` does not compare, or is packed,
    which ``torch.save`` never does: a small file may then hold more than the memory. Files whose checksums are all of another
    kind (``torch.serialization.set_crc32_options(False)``) are let through."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise UserError(f"{path}: is a packed archive, not a file of torch.save")
            if sum(entry.file_size for entry in entries) > path.stat().st_size:
                raise UserError(f"{path}: damaged: its parts say that they are larger than the file")
            fitting = [_fits(archive, entry) for entry in entries]
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, OSError, struct.error) as error:
        raise UserError(f"{path}: damaged ({error})") from None
    wrong = [entry.filename for entry, fits in zip(entries, fitting, strict=True) if not fits]
    if wrong and len(wrong) < len(entries):
        raise UserError(f"{path}: damaged: {wrong[0][:100]} does not fit its checksum")


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return False


def _fits(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(entry) as part:
            while part.read(2**20):
                pass
    except zipfile.BadZipFile:  # a wrong checksum, or a wrong header
        return False
    return True


def _replaced(path: Path) -> list[Any]:
    """(replacement, name) of the classes and functions that a file names and that ``torch.load`` would refuse."""
    if not _is_zip(path):  # of PyTorch before 1.6, where they cannot be listed beforehand
        names: tuple[str, ...] = OLD_GUESTS
    else:
        names = tuple(get_unsafe_globals_in_checkpoint(path))
    return [(_unread_dict if name == "collections.defaultdict" else Unread, name) for name in names]
