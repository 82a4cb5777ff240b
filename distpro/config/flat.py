"""Nested settings as one mapping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys.

    >>> flat({"training": {"epochs": 3}, "seed": 0})
    {'training.epochs': 3, 'seed': 0}
    """
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def setting_text(value: Any) -> Any:
    """A setting as a table shows it: a list of mappings, such as the terms, without what is empty; numbers and words as they are.

    >>> setting_text([{"loss": "kd", "weight": 1.0, "key": None, "params": {}}])
    'loss kd, weight 1.0'
    """
    if isinstance(value, list) and value and all(isinstance(entry, Mapping) for entry in value):
        told = [{k: v for k, v in entry.items() if v not in (None, {}, [], False)} for entry in value]
        return "; ".join(", ".join(f"{k} {v}" for k, v in entry.items()) for entry in told)
    return value if isinstance(value, (bool, int, float, str)) else str(value)
