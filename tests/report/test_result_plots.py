"""Dots are at their values, intervals at theirs, and a label is a label."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from distpro.report.intervals import half_width
from distpro.report.result_plots import as_svg, curves_figure, dots_figure, learned_figure
from pathways.registry import UserError

FOUND = {
    "KD": [70.0, 71.0, 73.0],
    "learned": [72.0, 72.5],
    "once $\\frac": [float("nan"), 71.0],
    "none": [float("nan")],
}


def test_dots_means_and_intervals():
    (ax,) = dots_figure(FOUND, "test accuracy, %", marked=["learned"]).axes
    assert [label.get_text().replace("\\$", "$") for label in ax.get_yticklabels()] == list(FOUND)[:3]
    dots = [line.get_xdata() for line in ax.lines if line.get_marker() == "o"]
    for drawn, values in zip(dots, ([70, 71, 73], [72, 72.5], [71]), strict=True):
        np.testing.assert_array_equal(drawn, values)
    _, _, (bars,) = ax.containers[0]
    half = half_width([70, 71, 73])
    np.testing.assert_allclose(bars.get_segments()[0][:, 0], [71.3333 - half, 71.3333 + half], rtol=1e-5)
    assert ax.texts[1].get_text() == f"72.25 ± {half_width([72, 72.5]):.2f}  (n = 2)"


@pytest.mark.parametrize("count", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_figures_stay_on_the_page(count):
    labels = [f"a rather long label of a run, number {n}" for n in range(count)]
    curve = ([1, 2, 3], [0.1, 0.2, 0.4])
    panels = {"one (log)": {label: [curve] for label in labels}, "two": {}}
    learned = {"keys": labels, "weights": [[0.1] * count, [0.2] * count]}
    for figure in (
        curves_figure(panels),
        dots_figure({x: [1.0, 2.0] for x in labels}, "x"),
        learned_figure(learned, "t"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figure.draw_without_rendering()
        page, drawn = figure.bbox_inches, figure.get_tightbbox()
        assert drawn.x0 >= 0 and drawn.y0 >= 0 and drawn.x1 <= page.x1 and drawn.y1 <= page.y1
        assert as_svg(figure).startswith("<?xml")


def test_nothing_to_draw_is_said():
    with pytest.raises(UserError, match="no results"):
        dots_figure({"a": [float("inf")]}, "x")
    with pytest.raises(UserError, match="no curves"):
        curves_figure({"a": {"b": []}})
    with pytest.raises(UserError, match="damaged"):
        learned_figure({"keys": ["a", "b"], "weights": [[1.0]]}, "t")
