"""What may stand in a study's file, see `distpro.report.study`: each mistake is one UserError, before anything is run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pathways.registry import UserError, nearest

KEYS = {"config", "metric", "seeds", "baseline", "set", "searches", "epochs", "reach", "shared", "figures", "runs"}


def check_content(path: Path, content: Mapping[str, Any]) -> None:
    """Raise UserError unless a file says what to run, and only what a study may say."""
    for key in content:
        if key not in KEYS:
            raise UserError(
                f"{path}: unknown key '{key}'{nearest(str(key), KEYS)} (allowed: {', '.join(sorted(KEYS))})"
            )
    for key, kind, example in (
        ("config", str, "a path"),
        ("seeds", list, "[0, 1, 2]"),
        ("runs", dict, "{equal: {...}}"),
    ):
        if not isinstance(content.get(key), kind) or not content[key]:
            raise UserError(f"{path}: {key} is {content.get(key)!r}: expected {example}")
    for key, kind, example in (
        ("set", dict, "overrides, {key: value}"),
        ("searches", dict, "{search: {...}}"),
        ("shared", dict, "{label: study/label}"),
        ("metric", str, "a metric's name"),
    ):
        if not isinstance(content.get(key, kind()), kind):
            raise UserError(f"{path}: {key} is {content[key]!r}: expected {example}, or no such key")
    _numbers(path, "seeds", content["seeds"], "expected whole numbers, each once")
    if "epochs" in content:
        _numbers(path, "epochs", content["epochs"], "expected budgets, [2, 4, 8], each once", least=1)
    for part in ("searches", "runs"):
        for label, own in content.get(part, {}).items():
            _check_label(path, part, label)
            if not isinstance(own, (dict, type(None))):
                raise UserError(f"{path}: {part}: {label} is {own!r}: expected overrides, {{key: value}}")
    for label, source in content.get("shared", {}).items():
        _check_label(path, "shared", label)
        if not isinstance(source, str) or not all(source.partition("/")):
            raise UserError(f"{path}: shared: {label} is {source!r}: expected STUDY/LABEL")


def check_names(path: Path, content: Mapping[str, Any], searches: Iterable[str], folders: Mapping[str, str]) -> None:
    """Raise UserError for a name of what is not there, and for two labels of one folder.

    Args:
        searches: labels of the searches.
        folders: the folder's name of each label, with its budget.
    """
    searches, runs = list(searches), [label for label in folders if label not in set(searches)]
    base = content.get("baseline", [])
    for label in base if isinstance(base, list) else [base]:
        if label not in runs:
            raise UserError(
                f"{path}: baseline: no run '{label}'{nearest(str(label), runs)} (there are: {', '.join(runs)})"
            )
    everywhere = (content.get("set") or {}).get("search")
    for label, own in content["runs"].items():
        search = (own or {}).get("search", everywhere)
        known = isinstance(search, str) and (search in searches or "/" in search)  # another study's is looked up there
        if not (known or search is None):
            there = f"there are: {', '.join(searches)}" if searches else "there are none"
            raise UserError(
                f"{path}: runs: {label}: no search '{search}'{nearest(str(search), searches)} ({there}; of another study: STUDY/SEARCH)"
            )
    first: dict[str, str] = {}
    for label, folder in folders.items():
        other = first.setdefault(folder.casefold(), label)
        if other != label:
            raise UserError(f"{path}: '{other}' and '{label}' would have one folder, {folder}-SEED: rename one of them")


def _check_label(path: Path, part: str, label: Any) -> None:
    if not isinstance(label, str) or not label:
        raise UserError(f"{path}: {part}: the label {label!r} is no text: write it in quotes")


def _numbers(path: Path, key: str, numbers: Any, expected: str, least: int | None = None) -> None:
    whole = isinstance(numbers, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
    if not whole or not numbers or len(set(numbers)) < len(numbers) or (least is not None and min(numbers) < least):
        raise UserError(f"{path}: {key} is {numbers!r}: {expected}")
