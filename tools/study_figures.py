"""The figures that a study's YAML file may ask for, see tools/study.py."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from distpro.report.page import title_of
from distpro.report.result_plots import dots_figure
from distpro.report.study import StudyFile, at_budget


def draw_budgets(study: StudyFile, path: Path) -> None:
    """Accuracy against epochs, and against seconds with the search's; a training of its own at every point."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for base in study.content["runs"]:
        points = []
        for n, values in study.budgets(base).items():
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            points.append((n, study.seconds(at_budget(base, n)), statistics.mean(values), spread))
        if points:
            epochs, seconds, means, spreads = zip(*points, strict=True)
            for axis, x in zip(axes, (epochs, seconds), strict=True):
                axis.errorbar(x, means, spreads, marker="o", markersize=4, capsize=3, label=base)
    axes[0].set(
        xlabel="epochs of the training, each with its own learning-rate schedule",
        ylabel=f"test {title_of(study.metric)}",
    )
    axes[1].set(xlabel="seconds, the search included")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[1].xaxis.set_major_formatter("{x:.0f}")
    axes[0].set_xticks(study.content["epochs"], [str(e) for e in study.content["epochs"]])
    axes[0].legend(frameon=False)
    _save(figure, path)


def draw_dots(study: StudyFile, path: Path) -> None:
    """Accuracy of every run, the best first: a dot per seed, and the mean with its 95 % interval; learned schedules in blue."""
    found = {k: [r[study.metric] for r in rows.values()] for k, rows in study.found().items() if k in study.runs}
    found = dict(sorted(found.items(), key=lambda item: -statistics.mean(item[1])))
    marked = [label for label in found if _learned(study, label)]
    _save(dots_figure(found, f"test {title_of(study.metric)}", marked), path)


def _learned(study: StudyFile, label: str) -> bool:
    """Whether a run replays what a search has learned."""
    search = study.search_of(label)
    return (
        search is not None and not search.tunes and study.runs[label].get("retrain.weights", "searched") == "searched"
    )


def draw_levels(study: StudyFile, path: Path) -> None:
    """Each teacher level's share of the weight over a search, a panel per search: mean and spread over seeds."""
    plt = _pyplot()
    found = {k: rows for k, rows in study.found().items() if "learned" in rows[min(rows)]}
    figure, axes = plt.subplots(1, len(found), figsize=(4.5 * len(found), 3.5), sharey=True, squeeze=False)
    for axis, (name, rows) in zip(axes[0], found.items(), strict=True):
        levels = sorted({i for r in rows.values() for i in r["learned"]["teacher_levels"] if i})
        for level in levels:
            shares = [_share(r["learned"], level) for r in rows.values()]
            mean = [statistics.mean(x) for x in zip(*shares, strict=True)]
            time = [n / (len(mean) - 1) for n in range(len(mean))]
            (line,) = axis.plot(time, mean, label=f"teacher level {level}")
            for share in shares:
                axis.plot(time, share, color=line.get_color(), alpha=0.25, linewidth=0.8)
        axis.set(title=f"{name}, {len(rows)} seeds", xlabel="fraction of the search")
        axis.grid(alpha=0.3)
    axes[0][0].set(ylabel="share of the terms that read a level")
    axes[0][0].legend(frameon=False)
    _save(figure, path)


def _share(learned: dict[str, Any], level: int) -> list[float]:
    placed = learned["teacher_levels"]
    mine = [[w for w, i in zip(row, placed, strict=True) if i == level] for row in learned["weights"]]
    everyone = [[w for w, i in zip(row, placed, strict=True) if i] for row in learned["weights"]]
    return [sum(a) / sum(b) for a, b in zip(mine, everyone, strict=True)]


def draw_weights(study: StudyFile, path: Path) -> None:
    """The weight that each term of a search ends with, relative to where it began: mean and every seed."""
    plt = _pyplot()
    from matplotlib.ticker import NullLocator

    found = {k: rows for k, rows in study.found().items() if "learned" in rows[min(rows)]}
    figure, axes = plt.subplots(1, len(found), figsize=(5.5 * len(found), 5), squeeze=False, layout="constrained")
    for axis, (name, rows) in zip(axes[0], found.items(), strict=True):
        keys = next(iter(rows.values()))["learned"]["keys"]
        gains = [
            [e / b for b, e in zip(*(r["learned"]["weights"][n] for n in (0, -1)), strict=True)] for r in rows.values()
        ]
        places = list(range(len(keys)))
        axis.barh(places, [statistics.geometric_mean(x) for x in zip(*gains, strict=True)], color="0.8")
        for gain in gains:
            axis.plot(gain, places, "o", markersize=3, color="C0")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_yticks(places, keys, fontsize=7)
        axis.invert_yaxis()
        axis.set(xscale="log", xlabel="last weight / first weight", title=f"{name}, {len(rows)} seeds")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticks([0.1, 0.3, 1, 3], ["0.1", "0.3", "1", "3"])
    _save(figure, path)


FIGURES = {
    "bars": draw_dots,  # the name of older studies
    "budgets": draw_budgets,
    "dots": draw_dots,
    "levels": draw_levels,
    "weights": draw_weights,
}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    if figure.get_layout_engine() is None:
        figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
