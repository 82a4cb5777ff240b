"""Configs to begin with: what `distpro init` writes."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from distpro.files import write_atomically
from pathways.registry import UserError, nearest

TEACHER = "_teacher"
_FOLDER = importlib.resources.files("distpro") / "config" / "examples"


def starters() -> list[str]:
    """Names of the examples."""
    names = (f.name.removesuffix(".yaml") for f in _FOLDER.iterdir() if f.name.endswith(".yaml"))
    return sorted(name for name in names if not name.endswith(TEACHER))


def write_starter(name: str, out: str | Path | None = None) -> tuple[Path, Path]:
    """Write an example's search config to ``out`` (default: ``<name>.yaml`` here) and its teacher's beside it.

    Raises UserError for an unknown name, and for a file that is there: nothing is written then.
    """
    if name not in starters():
        raise UserError(f"unknown example '{name}'{nearest(name, starters())} (allowed: {', '.join(starters())})")
    search = Path(out) if out is not None else Path(f"{name}.yaml")
    if search.suffix not in (".yaml", ".yml"):
        raise UserError(f"{search}: a config's name ends with .yaml")
    teacher = search.with_name(f"{search.stem}{TEACHER}{search.suffix}")
    for path in (search, teacher):
        if path.exists():
            raise UserError(f"{path} already exists; choose another name with --out FILE")
    for path, source in ((search, f"{name}.yaml"), (teacher, f"{name}{TEACHER}.yaml")):
        write_atomically((_FOLDER / source).read_text(encoding="utf-8"), path)
    return search, teacher
