"""Files that are whole or absent, and that never run code when they are read."""

from __future__ import annotations

import io
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch

from pathways.registry import UserError


def write_atomically(data: bytes | str, path: str | Path) -> None:
    """Write a file under a temporary name in the same folder, flush it to disk, and rename it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_atomically(content: Any, path: str | Path) -> None:
    """``torch.save`` to a file that is the old one or the new one, never half of each."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(buffer.getvalue(), path)


def load_safely(path: str | Path) -> Any:
    """``torch.load(weights_only=True)`` on the CPU. Raises UserError if the file is missing, damaged, or holds
    anything but tensors, numbers, strings, lists and dicts."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: holds more than tensors and plain values (or is damaged); not loaded") from None
    except Exception as error:  # damaged bytes can fail anywhere in the unpickler
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {reason})") from None
