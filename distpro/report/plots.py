"""Figures of schedules. matplotlib is imported when a figure is drawn."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distpro.files import write_atomically
from distpro.schedule import TASK, Schedule
from distpro.schedule_file import LOG
from pathways.registry import UserError, nearest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from numpy.typing import NDArray

QUANTITIES = {"weights": r"weight $\alpha$", "alpha_tilde": r"$\tilde{\alpha}$"}
FORMATS = ("png", "svg", "pdf")
# Okabe and Ito's palette, which colour-blind people can tell apart, without its yellow (too faint on white).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)), (0, (7, 1.6, 1.4, 1.6)), (0, (7, 1.5, 1, 1.5, 1, 1.5)))
GREY = "#BBBBBB"
INK = "#444444"
NAMED = 14  # terms without a level that get a colour and a name; the rest is grey
POINTS = 1500  # of a curve; more are not visible
LABEL = 44  # characters
LINE = 1.8  # points
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#E6E6E6",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": LINE,
    "figure.dpi": 130,
}


def schedule_figure(schedule: Schedule, what: str = "weights") -> Figure:
    """The processes over epochs, one panel per teacher level with all its pathways overlaid (Fig. 6): the colour is
    the student level, the dashes are the transform. Terms without a level share one panel, where the strongest are
    named.

    Args:
        what: ``weights`` or ``alpha_tilde``.

    Raises UserError for another word.
    """
    if what not in QUANTITIES:
        raise UserError(f"unknown quantity '{what}'{nearest(what, QUANTITIES)} (allowed: {', '.join(QUANTITIES)})")
    import matplotlib

    with matplotlib.rc_context(STYLE):
        return _draw_schedule(schedule, what)


def heatmap_figure(schedule: Schedule) -> Figure:
    """All weights as colours: one row per term, in the schedule's order, against epochs."""
    import matplotlib

    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        return _draw_heatmap(schedule)


def scalars_figure(schedule: Schedule) -> Figure:
    """The numbers that were learned beside the weights over epochs, one panel each, for they have units of their own.

    Raises UserError if there are none.
    """
    if not schedule.scalars:
        raise UserError("the schedule has no scalars: no number beside the weights was learned")
    import matplotlib

    with matplotlib.rc_context(STYLE):
        return _draw_scalars(schedule)


def save_figures(schedule: Schedule, folder_or_file: str | Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Write figures and return their paths.

    Args:
        folder_or_file: a name with a suffix that matplotlib writes, ``.png`` say, gets :func:`schedule_figure`; a name without one
            is a folder that gets ``alpha.*`` and ``alpha_heatmap.*``, and ``alpha_scalars.*`` where there are scalars.
        formats: of the files in a folder.

    Raises UserError for an unknown format or suffix.
    """
    target = Path(folder_or_file)
    if re.fullmatch(r"\.[A-Za-z]\w*", target.suffix) and not target.is_dir():  # lr_0.05 is a folder
        known = _suffixes()
        if target.suffix.lower() not in known:
            raise UserError(
                f"{target}: no figure ends in '{target.suffix}'{nearest(target.suffix, known)} (allowed: {', '.join(known)}, or a "
                "folder, without a suffix)"
            )
        return [_save(schedule_figure(schedule), target)]
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"unknown figure format '{name}'{nearest(name, FORMATS)} (allowed: {', '.join(FORMATS)})")
    figures = {"alpha": schedule_figure(schedule), "alpha_heatmap": heatmap_figure(schedule)}
    figures |= {"alpha_scalars": scalars_figure(schedule)} if schedule.scalars else {}
    return [_save(figure, target / f"{stem}.{name}") for stem, figure in figures.items() for name in formats]


def _suffixes() -> list[str]:
    """Those that matplotlib writes by itself: pgf needs LaTeX, and raw pixels do not say how large the picture is."""
    from matplotlib.backend_bases import FigureCanvasBase

    return [f".{name}" for name in FigureCanvasBase.get_supported_filetypes() if name not in ("pgf", "raw", "rgba")]


def _save(figure: Figure, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:].lower())
    write_atomically(buffer.getvalue(), path)
    return path


def new_figure(width: float, height: float) -> Figure:
    """A figure in inches that no window knows."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no window

    return Figure(figsize=(width, height), layout="constrained")


# Curves


def _draw_schedule(schedule: Schedule, what: str) -> Figure:
    panels = _panels(schedule)
    columns = len(panels) if len(panels) <= 4 else min(4, math.ceil(len(panels) / 2))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(max(6.6, 3.3 * columns) + 2.4 * (0 in panels), 3.1 * rows + 0.6)
    steps = _sample(len(schedule))
    epochs, values = steps / schedule.steps_per_epoch, getattr(schedule, what)[steps].numpy()
    axes: list[Axes] = []
    for place, (level, members) in enumerate(panels.items()):
        ax = figure.add_subplot(rows, columns, place + 1, sharey=axes[0] if axes else None)
        axes.append(ax)
        looks = _pathway_looks(schedule, members) if level else _named_looks(schedule, members)
        for n, look in looks.items():
            ax.plot(epochs, values[:, n], label=schedule.keys[n], marker="o" if len(steps) == 1 else "", **look)
        ax.set_title(_level_name("teacher", level, schedule))
        ax.set_xlim(*_open(epochs.min(), epochs.max()))
        first_column, last_row = place % columns == 0, place + columns >= len(panels)
        ax.set_ylabel(QUANTITIES[what] if first_column else "")
        ax.set_xlabel("epoch" if last_row else "")
        ax.tick_params(axis="y", left=first_column, labelleft=first_column)
    axes[0].set_ylim(*_open(*_limits(values), margin=0.05))
    _draw_threshold(axes, schedule, what, steps)
    figure.suptitle(_title(schedule, what), fontsize=11)
    _legend_of_places(figure, schedule)
    if 0 in panels:
        _legend_of_names(figure, schedule, _named_looks(schedule, panels[0]))
    return figure


def _title(schedule: Schedule, what: str) -> str:
    """``resnet20 → resnet8 on digits: weight of each term``, as far as the file says; below it what drops terms."""
    said = [schedule.meta.get(name) for name in ("teacher", "student", "data")]
    teacher, student, data = (str(s.get("model", s.get("name", ""))) if isinstance(s, Mapping) else "" for s in said)
    pair = short(f"{teacher} → {student}", 60) if teacher and student else ""
    where = f" on {short(data, 30)}" if data else ""
    title = f"{'weight' if what == 'weights' else 'learned value'} of each term over the training"
    if _draws_threshold(schedule, what):
        size = "a tenth of an equal share" if schedule.reading == LOG else f"{schedule.threshold:g}"
        title += f" (dotted: terms below {size} are dropped)"
    return f"{pair}{where}\n{title}" if pair else title


def _draws_threshold(schedule: Schedule, what: str) -> bool:
    """Whether the quantity that is drawn is the one that is compared with a threshold."""
    return schedule.threshold is not None and (schedule.reading == LOG) == (what == "weights")


def _draw_threshold(axes: Sequence[Axes], schedule: Schedule, what: str, steps: NDArray[np.int64]) -> None:
    """Where a term is dropped, as a dotted line."""
    from matplotlib.collections import LineCollection

    if not _draws_threshold(schedule, what):
        return
    epochs = steps / schedule.steps_per_epoch
    level = np.full(len(steps), schedule.threshold, dtype=float)
    if schedule.reading == LOG:
        level = schedule.weights[steps].double().sum(1).numpy() / (10 * len(schedule.keys))
    for ax in axes:
        dots = LineCollection([np.stack([epochs, level], 1)], colors=INK, linestyles=":", linewidths=1, zorder=1)
        ax.add_collection(dots, autolim=False)


def _panels(schedule: Schedule) -> dict[int, list[int]]:
    """Terms (their numbers) by teacher level; those without a level last."""
    teacher = schedule.levels[:, 0].tolist()
    order = sorted(set(teacher), key=lambda level: (level == 0, level))
    return {level: [n for n, i in enumerate(teacher) if i == level] for level in order}


def _pathway_looks(schedule: Schedule, members: Sequence[int]) -> dict[int, dict[str, Any]]:
    colours, dashes = _student_colours(schedule), _transform_dashes(schedule)
    return {n: {"color": colours[int(schedule.levels[n, 1])], **dashes[_transform(schedule, n)]} for n in members}


def _named_looks(schedule: Schedule, members: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Lines of terms without a level, faint ones first so that they lie below."""
    strength = schedule.weights.abs().mean(0)
    order = sorted(members, key=lambda n: -float(strength[n]))
    looks: dict[int, dict[str, Any]] = {n: {"color": GREY, "linewidth": 0.8} for n in order[NAMED:]}
    for rank, n in enumerate(order[:NAMED]):
        looks[n] = {"color": COLOURS[rank % len(COLOURS)], "linestyle": DASHES[rank // len(COLOURS)]}
    return looks


def _student_colours(schedule: Schedule) -> dict[int, Any]:
    levels = sorted({j for i, j, _ in schedule.levels.tolist() if i})
    if len(levels) <= len(COLOURS):
        return dict(zip(levels, COLOURS, strict=False))
    from matplotlib import colormaps

    return dict(zip(levels, colormaps["viridis"](np.linspace(0, 0.92, len(levels))), strict=True))


def _transform_dashes(schedule: Schedule) -> dict[str, dict[str, Any]]:
    """Line style by transform, in the schedule's order; lines get thinner when the dashes are used up."""
    names = dict.fromkeys(_transform(schedule, n) for n, i in enumerate(schedule.levels[:, 0].tolist()) if i)
    return {
        name: {"linestyle": DASHES[k % len(DASHES)], "linewidth": LINE / (1 + k // len(DASHES))}
        for k, name in enumerate(names)
    }


def _transform(schedule: Schedule, n: int) -> str:
    k = int(schedule.levels[n, 2])
    return schedule.transforms[n] or (f"transform {k}" if k else "")


def _legend_of_places(figure: Figure, schedule: Schedule) -> None:
    """Colours are student levels and dashes transforms, so 27 lines need 6 entries and not 27."""
    from matplotlib.lines import Line2D

    colours, dashes = _student_colours(schedule), _transform_dashes(schedule)
    students = [
        Line2D([], [], color=c, lw=4, label=_level_name("student", j, schedule)) for j, c in colours.items() if j
    ]
    transforms = [Line2D([], [], color=INK, label=short(name), **look) for name, look in dashes.items() if name]
    if students or transforms:
        widest = max(len(str(handle.get_label())) for handle in students + transforms)
        room = max(1, int(figure.get_figwidth() / (widest / 14 + 0.65)))  # 14 characters are about an inch
        longest = max(len(students), len(transforms))
        columns = math.ceil(longest / math.ceil(longest / room))
        handles = _in_rows(students, columns) + _in_rows(transforms, columns)
        in_columns = [handle for column in range(columns) for handle in handles[column::columns]]
        figure.legend(handles=in_columns, loc="outside lower center", ncols=columns, handlelength=2.8)


def _in_rows(handles: list[Line2D], columns: int) -> list[Line2D]:
    """Filled up with empty entries to whole rows."""
    from matplotlib.lines import Line2D

    return handles + [Line2D([], [], linestyle="none", label=" ") for _ in range(-len(handles) % columns)]


def _legend_of_names(figure: Figure, schedule: Schedule, looks: Mapping[int, Mapping[str, Any]]) -> None:
    from matplotlib.lines import Line2D

    named = [n for n, look in looks.items() if look["color"] != GREY]
    handles = [Line2D([], [], label=short(schedule.keys[n]), **looks[n]) for n in named]
    if len(looks) > len(named):
        handles.append(Line2D([], [], color=GREY, linewidth=0.8, label=f"{len(looks) - len(named)} weaker terms"))
    figure.legend(handles=handles, loc="outside right upper", handlelength=2.6)


def _level_name(side: str, level: int, schedule: Schedule) -> str:
    """``teacher level 2: layer2``; without the tap where the keys do not agree on one."""
    if not level:
        return "terms without a level"
    column = ("teacher", "student").index(side)
    keys = [key for key, place in zip(schedule.keys, schedule.levels.tolist(), strict=True) if place[column] == level]
    taps = {match.group(column + 1) for key in keys if (match := re.fullmatch(r"(.+)<-(.+)@.+", key))}
    return f"{side} level {level}" + (f": {short(taps.pop(), 17)}" if len(taps) == 1 else "")


# Heat map


def _draw_heatmap(schedule: Schedule) -> Figure:
    steps, count = _sample(len(schedule)), len(schedule.keys)
    values = schedule.weights[steps].numpy()
    low, high = _limits(values)
    figure = new_figure(10, max(2.4, 0.21 * count + 1.1))
    ax = figure.add_subplot()
    extent = (0, len(schedule) / schedule.steps_per_epoch, count, 0)
    image = ax.imshow(values.T, "viridis", extent=extent, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    teacher = schedule.levels[:, 0].tolist()
    for n in range(1, count):
        if teacher[n] != teacher[n - 1]:
            ax.axhline(n, color="white", linewidth=2)
    ax.set_yticks(np.arange(count) + 0.5, [_row_name(schedule, n) for n in range(count)], fontsize=8.5)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("epoch")
    figure.colorbar(image, label=QUANTITIES["weights"], pad=0.015, aspect=max(12, count))
    return figure


def _row_name(schedule: Schedule, n: int) -> str:
    """The key; the place of a pathway whose key is long, since module names often differ in their middle only."""
    key, (i, j, _) = schedule.keys[n], schedule.levels[n].tolist()
    if len(key) <= LABEL or not (i and j):
        return short(key)
    return short(f"teacher {i} <- student {j} @ {_transform(schedule, n)}")


# Scalars


def _draw_scalars(schedule: Schedule) -> Figure:
    columns = min(4, len(schedule.scalars))
    rows = math.ceil(len(schedule.scalars) / columns)
    figure = new_figure(max(4.2, 3.1 * columns), 2.3 * rows + 0.4)
    steps = _sample(len(schedule))
    epochs = steps / schedule.steps_per_epoch
    for place, (name, column) in enumerate(schedule.scalars.items()):
        ax = figure.add_subplot(rows, columns, place + 1)
        values = column[steps].numpy()
        ax.plot(epochs, values, color=COLOURS[0], marker="o" if len(steps) == 1 else "")
        ax.set_title("weight of the task" if name == TASK else short(name, 30))
        ax.set_xlim(*_open(epochs.min(), epochs.max()))
        ax.set_ylim(*_open(*_limits(values), margin=0.05))
        ax.set_xlabel("epoch" if place + columns >= len(schedule.scalars) else "")
    return figure


# Numbers and labels


def _sample(steps: int) -> NDArray[np.int64]:
    """Step numbers to draw, at most POINTS, with the first and the last."""
    return np.linspace(0, steps - 1, min(steps, POINTS)).round().astype(np.int64)


def _limits(values: NDArray[np.float32]) -> tuple[float, float]:
    """Range of the finite values, at least a tenth of their size wide: noise of constant weights stays invisible."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    missing = max(0.1 * max(abs(low), abs(high)) - (high - low), 0.0)
    return low - missing / 2, high + missing / 2


def _open(low: float, high: float, margin: float = 0.03) -> tuple[float, float]:
    """A range with a margin, and never empty."""
    space = margin * (high - low) or 0.5
    return low - space, high + space


def short(text: str, length: int = LABEL) -> str:
    """A label of at most ``length`` characters, cut in the middle, with dollars that begin no formula."""
    if len(text) > length:
        half = (length - 1) // 2
        text = f"{text[:half]}…{text[-half:]}"
    return text.replace("$", r"\$")
