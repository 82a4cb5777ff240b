"""The files that a training goes on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distpro.files import load_safely
from pathways.registry import UserError

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
"""The last one, and the one before."""

VERSION = 1


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint. Raises UserError if it is damaged or of a newer version, with the one before where that is
    whole."""
    try:
        state = load_safely(path)
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise UserError(f"{path}: is no checkpoint of a run")
    except UserError as error:
        before = path.with_name(PREVIOUS)
        if path.name != PREVIOUS and before.is_file():
            step = read_checkpoint(before)["step"]
            raise UserError(f"{error}; the one before is whole, of step {step}: mv {before} {path}") from None
        raise
    version = state.get("version", VERSION)  # which the first ones do not say
    if version != VERSION:
        raise UserError(f"{path}: a checkpoint of version {version!r}; this distpro reads {VERSION}")
    return state
