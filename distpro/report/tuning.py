"""What a tuning has found: its leaderboard, and what the budget has bought."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distpro.console import number_text
from distpro.files import write_atomically
from distpro.report.plots import COLOURS, INK, STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 6  # values of a trial
LOSSES = {"calibrated_loss": "validation loss at its best temperature", "loss": "validation loss"}
ORDER = ("complete", "pruned", "diverged")


def values_text(values: Mapping[str, float], most: int = SHOWN) -> str:
    """A trial's values in a line, the largest ones where there are many."""
    first = sorted(values, key=lambda name: -values[name])[:most] if len(values) > most else list(values)
    said = ", ".join(f"{name} {number_text(values[name])}" for name in first)
    return said + (f", and {len(values) - most} more" if len(values) > most else "") or "nothing free"


def ranked(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The trials, the best first; behind all those that came to their end the pruned ones, then the diverged."""
    return sorted(
        rows, key=lambda row: (ORDER.index(row["state"]), row["judged"] if row["judged"] is not None else 0.0)
    )


def board(rows: Sequence[Mapping[str, Any]], headline: str) -> tuple[list[str], list[list[Any]]]:
    """The leaderboard's columns and cells; numbers as text."""
    shown = {name: said for name, said in LOSSES.items() if any(name in row for row in rows)}
    shown |= {headline: shown.get(headline, headline)}
    columns = ["", "candidate", "values", *shown.values(), "epochs", "trainings", "seconds"]
    cells: list[list[Any]] = []
    for place, row in enumerate(ranked(rows), start=1):
        where = str(place) if row["state"] == "complete" else row["state"]
        numbers = [number_text(float(row[name])) if name in row else "-" for name in shown]
        cost = [f"{row['epochs']:.4g}", f"{row['cost']:.3g}", f"{row['seconds']:.0f}"]
        cells.append([where, row["candidate"], values_text(row["values"]), *numbers, *cost])
    return columns, cells


def leaderboard(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    """leaderboard.md: what was spent, and all trials, the best first.

    Args:
        rows: trials, as of trials.jsonl.
        summary: ``budget`` and ``spent`` in trainings, ``epochs`` of one, ``by`` which metric it was judged, the task's ``headline``,
            ``running`` trials, and the learned ``schedule`` (None without one) with its search's seconds, ``search_seconds`` (None: unknown).
    """
    columns, cells = board(rows, summary["headline"])
    lines = ["# Leaderboard", "", " ".join(said_of(rows, summary)), ""]
    lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in cells]
    return "\n".join(lines) + "\n"


def said_of(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[str]:
    """The sentences above a leaderboard."""
    count = {state: sum(row["state"] == state for row in rows) for state in ORDER}
    others = ", ".join(f"{count[state]} {state}" for state in ORDER[1:] if count[state])
    said = [
        f"{summary['spent']:.4g} of {summary['budget']} trainings of {summary['epochs']} epochs, in {len(rows)} trials"
        f"{f' ({others})' if others else ''}; judged by the {criterion_of(summary)}."
    ]
    if same := sum(row["cost"] == 0 for row in rows):
        said.append(f"{same} of them would have repeated another's training, and cost nothing.")
    if summary["running"]:
        said.append(f"{summary['running']} more are running, or were left: --resume goes on with them.")
    if summary["schedule"] is not None:
        seconds = summary["search_seconds"]
        cost = "of unknown cost (its folder does not say)" if seconds is None else f"of {seconds:.0f} s"
        said.append(
            f"The learned schedule, {summary['schedule']}, comes from a search {cost}, which is not in the budget."
        )
    return said


def criterion_of(summary: Mapping[str, Any]) -> str:
    """What trials were judged by, in words."""
    headline = f"{summary['headline']} on the validation part"
    return LOSSES.get(summary["by"], headline)


def tuning_figure(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> Figure:
    """The best value found against the trainings spent, and a dot per trial in its candidate's colour: filled where it came to its
    end, open where it was pruned. Trials far behind the others are at the edge; what has diverged has no place."""
    import matplotlib
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["candidate"] for row in rows))
    looks = [(COLOURS[n % len(COLOURS)], "os^D"[n // len(COLOURS) % 4]) for n in range(len(names))]
    sign = 1 if summary["by"] in LOSSES else -1 if any((row["judged"] or 0) < 0 for row in rows) else 1
    edge = _edge([row["judged"] for row in rows if row["state"] == "complete"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 4.4), layout="constrained")
        ax = figure.add_subplot()
        spent, best = 0.0, math.inf
        curve: list[tuple[float, float]] = []
        for row in rows:
            spent += row["cost"]
            if row["judged"] is None:
                continue
            colour, marker = looks[names.index(row["candidate"])]
            fill = colour if row["state"] == "complete" else "none"
            ax.plot(spent, sign * min(row["judged"], edge), marker, color=colour, markerfacecolor=fill)
            if row["state"] == "complete":
                best = min(best, row["judged"])
                curve.append((spent, sign * best))
        if curve:
            ax.step(
                *zip(*[*curve, (spent, sign * best)], strict=True), where="post", color=INK, linewidth=1.3, zorder=1
            )
        for name, (colour, marker) in zip(names, looks, strict=True):
            ax.plot([], [], marker, color=colour, label=name)
        ax.plot([], [], "o", color=INK, markerfacecolor="none", label="open: pruned")
        ax.plot([], [], color=INK, linewidth=1.3, label="best so far")
        ax.set_xlabel("trainings spent")
        ax.set_ylabel(criterion_of(summary))
        figure.legend(loc="outside right upper")
    return figure


def _edge(values: Sequence[float]) -> float:
    """The worst value that has a place of its own: four times as far from the best as the median is."""
    if not values:
        return math.inf
    best, middle = min(values), sorted(values)[len(values) // 2]
    return best + 4 * (middle - best) if middle > best else max(values)


def save_tuning_figure(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], path: Path) -> None:
    """Write `tuning_figure`, in the format that the file's name says."""
    buffer = io.BytesIO()
    tuning_figure(rows, summary).savefig(buffer, format=path.suffix[1:])
    write_atomically(buffer.getvalue(), path)
