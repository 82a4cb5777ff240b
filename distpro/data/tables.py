"""Tables of texts: .tsv, .csv and .jsonl files in a folder or an archive. Nothing is unpacked to disk."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from distpro.data.files import Store, open_store
from pathways.registry import UserError, nearest

Column = str | int
"""Name of a column, or its number where a table has no header."""

KINDS = {".tsv": "tsv", ".csv": "csv", ".jsonl": "jsonl"}
csv.field_size_limit(2**24)


@dataclass(frozen=True)
class Layout:
    """How a table is written. ``kind``: tsv, csv or jsonl, None: as the file's name ends. ``header``: whether the first line
    names the columns. ``quotes``: whether quote characters enclose fields; else they are text."""

    kind: str | None = None
    header: bool = True
    quotes: bool = False


@dataclass(frozen=True)
class Columns:
    """Which columns are read. ``pair``: of the second text, None: there is none."""

    text: Column
    pair: Column | None
    label: Column


@dataclass(frozen=True)
class Rows:
    """A part of a data set as it is read: texts, their pairs (None: there are none), labels as words, and each row's place."""

    texts: list[str]
    pairs: list[str] | None
    labels: list[str]
    places: list[str]


def read_rows(root: Path, file: str, layout: Layout, columns: Columns) -> Rows:
    """The rows of a table. ``root``: a folder, an archive, or the folder that the file lies in. Raises UserError, with the
    line, for what is missing or damaged, an empty text or label among it. Blanks around a label are left out."""
    store = open_store(root, packed=True)
    place = f"{root}: {file}"
    try:
        text = _bytes_of(store, file).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{place} is not UTF-8 text") from None
    kind = layout.kind or KINDS.get(PurePosixPath(file).suffix.lower())
    if kind is None:
        raise UserError(f"{place}: its name does not end in {', '.join(KINDS)}: give format")
    rows, header = _json(text, place) if kind == "jsonl" else _table(text, kind, layout, place)
    wanted = [columns.text, columns.label, *([] if columns.pair is None else [columns.pair])]
    if header is not None:
        for name in wanted:
            if header.count(name) > 1:  # type: ignore[arg-type]
                raise UserError(f"{place} has {header.count(name)} columns '{name}'")  # type: ignore[arg-type]
            if name not in header:
                shown = ", ".join(map(str, header))
                raise UserError(f"{place} has no column '{name}'{nearest(str(name), header)} (it has: {shown})")
    found: dict[Column, list[str]] = {name: [] for name in wanted}
    places = []
    for line, row in rows:
        where = f"{place}, line {line}"
        for name in found:
            value = _field(row, name, header, where)
            label = name == columns.label
            if not value.strip():
                raise UserError(f"{where}: the {'label' if label else 'text'} in column '{name}' is empty")
            found[name].append(value.strip() if label else value)
        places.append(where)
    if not places:
        raise UserError(f"{place} holds no row")
    pairs = None if columns.pair is None else found[columns.pair]
    return Rows(found[columns.text], pairs, found[columns.label], places)


def numbers_of(rows: Rows) -> list[float]:
    """The labels as numbers. Raises UserError for one that is none."""
    found = []
    for label, place in zip(rows.labels, rows.places, strict=True):
        try:
            value = float(label)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f"{place}: the score '{label}' is not a finite number")
        found.append(value)
    return found


def classes_of(rows: Rows, names: Sequence[str]) -> list[int]:
    """The labels as places in ``names``. Raises UserError for one that is not there."""
    number = {name: n for n, name in enumerate(names)}
    for label, place in zip(rows.labels, rows.places, strict=True):
        if label not in number:
            if _are_scores(names):
                raise UserError(
                    f"{place}: '{label}' is no label of the training part: of scores, data.params.regression: true"
                )
            allowed = ", ".join(names[:20]) + ", ..." * (len(names) > 20)
            raise UserError(f"{place}: unknown label '{label}'{nearest(label, names)} (allowed: {allowed})")
    return [number[label] for label in rows.labels]


def _bytes_of(store: Store, file: str) -> bytes:
    """A file by its path below the store, or below the one folder in it. Archives are only asked for names that they list, so
    that no path leads out of them."""
    names = {PurePosixPath(name): name for name in store.names()}
    wanted = PurePosixPath(file)
    inner = {PurePosixPath(*path.parts[1:]): name for path, name in names.items() if len(path.parts) > 1}
    name = names.get(wanted) or (inner.get(wanted) if len({p.parts[0] for p in names}) == 1 else None)
    if name is None:
        raise UserError(f"{store.path}: no file {file}{nearest(file, map(str, names))}")
    try:
        return store.read(name)
    except Exception as error:  # readers of archives raise whatever damaged bytes make them trip over
        raise UserError(f"{store.path}: {file} cannot be read ({error})") from None


def _table(text: str, kind: str, layout: Layout, place: str) -> tuple[list[tuple[int, Any]], list[str] | None]:
    file, delimiter = io.StringIO(text, newline=""), "\t" if kind == "tsv" else ","
    if layout.quotes:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
    else:
        reader = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE, strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise UserError(f"{place}, line {reader.line_num}: {error}") from None
    header = rows.pop(0)[1] if layout.header and rows else None
    if header is not None:
        for line, row in rows:
            if len(row) != len(header):
                raise UserError(f"{place}, line {line}: {len(row)} columns, but the header has {len(header)}")
    return rows, header


def _json(text: str, place: str) -> tuple[list[tuple[int, Any]], None]:
    rows = []
    for line, content in enumerate(
        text.split("\n"), 1
    ):  # and not where JSON has other ends of lines inside of a string
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}, line {line}: no JSON ({error})") from None
        if not isinstance(row, Mapping):
            raise UserError(f"{place}, line {line}: expected an object, found {type(row).__name__}")
        rows.append((line, row))
    return rows, None


def _field(row: Any, name: Column, header: list[str] | None, where: str) -> str:
    if isinstance(row, Mapping):
        if name not in row:
            raise UserError(f"{where} has no '{name}'{nearest(str(name), row)} (it has: {', '.join(map(str, row))})")
        value = row[name]
        if value is None or isinstance(value, (list, Mapping)):
            raise UserError(f"{where}: '{name}' must be a text or a number, got {json.dumps(value)[:40]}")
        whole = isinstance(value, float) and value.is_integer()  # 1.0 is the class 1
        return value if isinstance(value, str) else json.dumps(int(value) if whole else value)
    number = header.index(name) if header is not None else name  # type: ignore[arg-type]
    if not isinstance(number, int) or not 0 <= number < len(row):
        raise UserError(
            f"{where} has no column {name!r} (it has {len(row)}, numbered from 0; header: true gives names)"
        )
    return str(row[number])


def _are_scores(names: Sequence[str]) -> bool:
    """Whether labels are numbers with digits behind a point."""
    try:
        return any(not float(name).is_integer() for name in names)
    except (ValueError, OverflowError):
        return False
