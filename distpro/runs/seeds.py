"""The same run with several seeds, and how far apart their results are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, stdev

from distpro.console import table
from distpro.files import write_atomically
from distpro.schedule import Schedule
from pathways.registry import UserError

Run = Callable[[Path, list[str], bool], Mapping[str, float]]
"""Called with a run's folder, its overrides, and whether to go on from what is there; gives its numbers by name."""


def run_seeds(run: Run, folder: Path, overrides: list[str], resume: bool, first: int, count: int, what: str) -> None:
    """Run once for each of ``count`` seeds from ``first`` on, in a folder of its own below ``folder``, and print the numbers with
    their mean and standard deviation; they are kept in ``result.json``. Each run is what it is alone. ``what``: heading of the
    numbers' names. Raises UserError for a count below 1."""
    if count < 1:
        raise UserError(f"--seeds {count}: expected 1 or more")
    found = {}
    for seed in range(first, first + count):
        inner = folder / f"seed{seed}"
        found[seed] = run(inner, [*overrides, f"seed={seed}"], resume and inner.exists())
    if not (folder / f"seed{first}" / "config.yaml").is_file():
        return  # not the process that writes
    rows = []
    for name in found[first]:
        values = [numbers[name] for numbers in found.values()]
        spread = f"{stdev(values):.3g}" if len(values) > 1 else "-"
        rows.append([name, f"{mean(values):.6g}", spread, *(f"{value:.6g}" for value in values)])
    table(str(folder), [what, "mean", "deviation", *(f"seed {seed}" for seed in found)], rows)
    kept = {str(seed): dict(numbers) for seed, numbers in found.items()}
    write_atomically(json.dumps(kept, indent=1) + "\n", folder / "result.json")


def last_weights(schedule: Schedule) -> dict[str, float]:
    """What a schedule ends with, λ · scale · weight of each term by its key, before any threshold."""
    last = schedule.strength * schedule.scales * schedule.weights[-1]
    return dict(zip(schedule.keys, last.tolist(), strict=True))
