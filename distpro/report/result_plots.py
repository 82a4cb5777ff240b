"""Figures of results: a dot for each run with the mean's interval, curves over epochs. matplotlib is imported when one is drawn."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distpro.report.intervals import half_width
from distpro.report.plots import COLOURS, DASHES, GREY, INK, NAMED, STYLE, new_figure, short
from pathways.registry import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = tuple[Sequence[float], Sequence[float]]
"""x and y."""


def dots_figure(found: Mapping[str, Sequence[float]], title: str, marked: Collection[str] = ()) -> Figure:
    """A row for each label: a dot for each run, the mean as a stroke with its 95 % interval of Student's t, and both in numbers.

    Dots and not bars from zero: accuracies differ in their third digit, and a bar that does not begin at zero lies.

    Args:
        found: values of runs by label, which are drawn from top to bottom; what is not finite is left out.
        title: of the axis, with its unit.
        marked: labels in colour; the others are grey. None at all: all in colour.

    Raises UserError if there are no values.
    """
    kept = {label: [v for v in values if math.isfinite(v)] for label, values in found.items()}
    kept = {label: values for label, values in kept.items() if values}
    if not kept:
        raise UserError("no results to compare")
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = new_figure(8.6, 0.36 * len(kept) + 0.9)
        ax = figure.add_subplot()
        for place, (label, values) in enumerate(kept.items()):
            colour = COLOURS[0] if label in marked or not marked else INK
            ax.plot(values, [place] * len(values), "o", markersize=5, alpha=0.45, color=colour, markeredgewidth=0)
            half = half_width(values) if len(values) > 1 else 0.0
            mean = statistics.mean(values)
            ax.errorbar(mean, place, xerr=half or None, marker="|", markersize=12, capsize=3, color=colour)
            numbers = mean_text(values)
            ax.annotate(numbers, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=9, color=INK)
        ax.set_yticks(range(len(kept)), [short(label) for label in kept])
        ax.set_ylim(len(kept) - 0.5, -0.5)
        every = [v for values in kept.values() for v in values]
        space = 0.35 * (max(every) - min(every)) or 0.5
        ax.set_xlim(
            min(every) - space, max(every) + space
        )  # an interval of a few seeds may be wider than what there is to see
        ax.grid(axis="y", visible=False)
        several = any(len(values) > 1 for values in kept.values())
        ax.set_xlabel(short(title, 80) + ("; dots: seeds, lines: mean with 95 % interval" if several else ""))
    return figure


def mean_text(values: Sequence[float], digits: int = 2) -> str:
    """``91.20 ± 0.35  (n = 3)``: mean and half of its 95 % interval."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {half_width(values):.{digits}f}  (n = {len(values)})" if len(values) > 1 else f"{mean}  (n = 1)"


def curves_figure(panels: Mapping[str, Mapping[str, Sequence[Curve]]], x: str = "epoch") -> Figure:
    """Curves side by side.

    Args:
        panels: by title, curves by label: one line for each run of the label, in one colour. A title that ends in "(log)" has a
            logarithmic axis.

    Raises UserError if there are none.
    """
    labels = list(dict.fromkeys(label for panel in panels.values() for label, curves in panel.items() if curves))
    if not labels:
        raise UserError("no curves to draw")
    import matplotlib
    from matplotlib.ticker import LogLocator, NullFormatter

    with matplotlib.rc_context(STYLE):
        size = (8.6, 3.4) if len(panels) == 1 else (4.2 * len(panels), 3.3 + 0.1 * min(len(labels), NAMED))
        figure = new_figure(*size)
        for place, (title, curves) in enumerate(panels.items()):
            ax = figure.add_subplot(1, len(panels), place + 1)
            for label, lines in curves.items():
                for line in lines:
                    ax.plot(*line, marker="o" if len(line[0]) == 1 else "", **_look(labels.index(label)))
            ax.set_title(short(title, 60))
            ax.set_xlabel(x)
            values = [v for lines in curves.values() for _, ys in lines for v in ys]
            if title.endswith("(log)") and values and min(values) > 0:
                ax.set_yscale("log")
                ax.yaxis.set_major_formatter("{x:g}")
                if max(values) < 20 * min(values):  # or the numbers between powers of ten would overlap
                    ax.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
                    ax.yaxis.set_minor_formatter("{x:g}")
                else:
                    ax.yaxis.set_minor_formatter(NullFormatter())
        _legend(figure, labels, beside=len(panels) == 1)
    return figure


def learned_figure(learned: Mapping[str, Any], title: str) -> Figure:
    """The weights of a search's terms over time, from the summary in a study's row: ``keys`` (N,) and ``weights`` (T, N).

    Raises UserError where it is none.
    """
    try:
        keys = [str(key) for key in learned["keys"]]
        columns = [[float(row[n]) for row in learned["weights"]] for n in range(len(keys))]
    except (KeyError, TypeError, ValueError, IndexError):
        raise UserError("a row's summary of what was learned is damaged") from None
    time = [n / max(1, len(learned["weights"]) - 1) for n in range(len(learned["weights"]))]
    return curves_figure(
        {title: {key: [(time, y)] for key, y in zip(keys, columns, strict=True)}}, "fraction of the search"
    )


def _look(n: int) -> dict[str, Any]:
    if n >= NAMED:
        return {"color": GREY, "linewidth": 0.8, "zorder": 1}
    return {"color": COLOURS[n % len(COLOURS)], "linestyle": DASHES[n // len(COLOURS)], "linewidth": 1.4}


def _legend(figure: Figure, labels: Sequence[str], beside: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=short(label), **_look(n)) for n, label in enumerate(labels[:NAMED])]
    if len(labels) > NAMED:
        handles.append(Line2D([], [], label=f"{len(labels) - NAMED} more", **_look(NAMED)))
    if beside:
        figure.legend(handles=handles, loc="outside right upper", handlelength=2.4)
        return
    width = max(len(handle.get_label()) for handle in handles)  # type: ignore[arg-type]
    columns = max(1, min(len(handles), int(figure.get_figwidth() / (width / 13 + 0.7))))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=2.4)


def as_svg(figure: Figure) -> str:
    """The figure as an SVG document that is the same every time it is drawn."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "distpro", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
