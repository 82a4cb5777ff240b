"""What data sets of pairs of files share: where the files lie, what the parts are called, and how large their images are."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from distpro.data.augment import whole_number
from distpro.data.files import ImageFiles, Store
from pathways.registry import UserError, nearest


def trees_of(store: Store) -> list[dict[PurePosixPath, str]]:
    """A store's files by path, from its top, and from the one folder that holds all of them, and so on."""
    files = {PurePosixPath(name): name for name in store.names()}
    files = {f: n for f, n in files.items() if not any(part.startswith((".", "__MACOSX")) for part in f.parts)}
    trees = [files]
    while len({f.parts[0] for f in trees[-1]}) == 1 and all(len(f.parts) > 1 for f in trees[-1]):
        trees.append({PurePosixPath(*f.parts[1:]): name for f, name in trees[-1].items()})
    return trees


def files_below(store: Store, folder: str) -> dict[str, str]:
    """The names of a folder's files by their path below it; the folder may lie in one other that holds everything. Raises
    UserError where there are none."""
    paths, parts = {PurePosixPath(name): name for name in store.names()}, PurePosixPath(folder).parts
    for skip in (0, 1):
        found = {
            PurePosixPath(*path.parts[skip + len(parts) :]).as_posix(): name
            for path, name in paths.items()
            if path.parts[skip : skip + len(parts)] == parts and len(path.parts) > skip + len(parts)
        }
        if found:
            return found
    raise UserError(f"{store.path}: no files in {folder}/")


def file_of(store: Store, file: str) -> str:
    """The name of a file, which may lie in one folder that holds everything. Raises UserError where it is missing."""
    paths, wanted = {PurePosixPath(name): name for name in store.names()}, PurePosixPath(file)
    inner = (name for path, name in paths.items() if PurePosixPath(*path.parts[1:]) == wanted)
    name = paths.get(wanted) or next(inner, None)
    if name is None:
        raise UserError(f"{store.path}: no file {file}")
    return name


def split_names(what: str, splits: Any, defaults: Mapping[str, str | None]) -> dict[str, str | None]:
    """What the parts are called: ``defaults`` with what a config says, {part: name}; null for a validation part: there is none.
    Raises UserError, which begins with ``what``, for another part or a name that is none."""
    if splits is not None and not isinstance(splits, Mapping):
        raise UserError(f"{what}: splits must be a mapping such as {dict(defaults)}, got {splits!r}")
    for part, name in (splits or {}).items():
        if part not in defaults:
            raise UserError(
                f"{what}: splits has no part '{part}'{nearest(part, defaults)} (allowed: {', '.join(defaults)})"
            )
        if not isinstance(name, str) and not (name is None and part == "validation"):
            raise UserError(f"{what}: splits.{part} must be a name, got {name!r}")
    return {**defaults, **(splits or {})}


def filled(what: str, key: str, pattern: str, split: str) -> str:
    """``pattern``, a config's ``key``, with ``split`` where ``{split}`` stands. Raises UserError, which begins with ``what``, for
    another placeholder."""
    try:
        return pattern.format(split=split)
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        near = nearest(error.args[0], ["split"]) if isinstance(error, KeyError) else ""
        raise UserError(
            f"{what}: {key} has a placeholder that is unknown, got {pattern!r}{near} (allowed: {{split}})"
        ) from None


def stated_size(what: str, image_size: Any) -> tuple[int, int] | None:
    """(height, width) of a config's ``image_size``, a side or [height, width]; None where it says nothing. Raises UserError."""
    if image_size is None:
        return None
    sides = [image_size] * 2 if isinstance(image_size, int) else image_size
    if not isinstance(sides, Sequence) or len(sides) != 2 or not all(whole_number(side, 1) for side in sides):
        raise UserError(f"{what}: image_size must be a side or [height, width] of at least 1, got {image_size!r}")
    return sides[0], sides[1]


def size_of(store: Store, image: str) -> tuple[int, int]:
    """(height, width) of an image file."""
    width, height = ImageFiles(store, [image], (0, 0), None).open(0).size
    return height, width


def memory() -> float:
    """Bytes of the machine's memory; infinite where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return float("inf")
