"""The counts of a file of results, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def as_markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """How often each part was tried, how often its promise held, and the first cases in which it did not."""
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        parts.setdefault(row["part"], []).append(row)
    lines = ["| part | cases | attacks | held | failed |", "|---|---|---|---|---|"]
    for part, found in parts.items():
        attacks = sum(row.get("count", 1) for row in found)
        wrong = [row for row in found if not row["ok"]]
        lines.append(f"| {part} | {len(found):,} | {attacks:,} | {len(found) - len(wrong):,} | {len(wrong):,} |")
    lines += [
        f"\n{row['part']} {row['case']}, seed {row['seed']}: {row['attack']}"
        for p in parts.values()
        for row in p
        if not row["ok"]
    ]
    return "\n".join(lines)
