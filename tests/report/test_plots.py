"""Figures show every term, once, in its panel, at the right epochs; and no input breaks them."""

import warnings

import numpy as np
import pytest
import torch

from distpro.report.plots import heatmap_figure, save_figures, schedule_figure
from distpro.schedule import Schedule
from pathways.registry import UserError

LONG = "model.backbone.encoder.stages.3.blocks.2.downsample.reduction.norm"


def build(levels=3, transforms=("conv1x1", "conv3x3", "attention"), named=(), steps=40, tap="layer", scale=0.1):
    """All connections of ``levels`` × ``levels`` and some terms without a level, with weights that wander."""
    places = [(i, j, k) for i in range(levels) for j in range(levels) for k in range(len(transforms))]
    keys = [f"{tap}{i}<-{tap}{j}@{transforms[k]}" for i, j, k in places] + list(named)
    alpha = torch.randn(steps, len(keys), generator=torch.Generator().manual_seed(0)).cumsum(0) * scale
    return Schedule(
        keys=tuple(keys),
        levels=torch.tensor([[n + 1 for n in place] for place in places] + [[0, 0, 0]] * len(named)),
        transforms=tuple([transforms[k] for *_, k in places] + [""] * len(named)),
        alpha_tilde=alpha,
        weights=alpha.softmax(1),
        steps_per_epoch=10.0,
    )


CASES = {
    "paper": build(),
    "one term": build(levels=1, transforms=("conv1x1",)),
    "one step": build(steps=1),
    "81 pathways": build(transforms=tuple(f"transform{k}" for k in range(9))),
    "81 names": build(levels=0, named=[f"term{n}" for n in range(81)]),
    "8 levels": build(levels=8, transforms=("linear",)),
    "pooled": build(named=("kd", "rkd:distance", "_orig_mod.$x$", "$\\frac")),
    "long keys": build(tap=LONG, named=(LONG * 3,)),
    "constant": build().equal(),
    "by teacher level": build().reduce("teacher_level"),
    "by student level": build().reduce("student_level"),
    "all zero": build().drop(1e9),
}


def legend(figure):
    return [text.get_text().strip() for box in figure.legends for text in box.get_texts() if text.get_text().strip()]


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["weights", "alpha_tilde"])
def test_each_term_is_one_line_in_the_panel_of_its_teacher_level(case, what):
    axes = schedule_figure(case, what).axes
    places = sorted(set(case.levels[:, 0].tolist()), key=lambda level: (level == 0, level))
    assert len(axes) == len(places)
    seen = []
    for level, ax in zip(places, axes, strict=True):
        assert ax.get_title().startswith(f"teacher level {level}" if level else "terms without a level")
        for line in ax.lines:
            n = case.keys.index(line.get_label())
            seen.append(n)
            assert int(case.levels[n, 0]) == level
            np.testing.assert_array_equal(line.get_xdata(), np.arange(len(case)) / 10)
            np.testing.assert_array_equal(line.get_ydata(), getattr(case, what)[:, n].numpy())
    assert sorted(seen) == list(range(len(case.keys)))


@pytest.mark.slow
@pytest.mark.parametrize("draw", [schedule_figure, heatmap_figure])
def test_every_case_draws_without_warning_inside_the_page(case, draw):
    figure = draw(case)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.draw_without_rendering()
    page, drawn = figure.bbox_inches, figure.get_tightbbox()
    assert drawn.x0 >= 0 and drawn.y0 >= 0 and drawn.x1 <= page.x1 and drawn.y1 <= page.y1


def test_colour_is_the_student_level_and_dashes_are_the_transform():
    schedule = CASES["paper"]
    looks = {}
    for ax in schedule_figure(schedule).axes:
        for line in ax.lines:
            n = schedule.keys.index(line.get_label())
            # matplotlib has no public getter of a dash pattern
            looks[n] = (line.get_color(), str(line._unscaled_dash_pattern))
    colours = {(int(schedule.levels[n, 1]), colour) for n, (colour, _) in looks.items()}
    dashes = {(schedule.transforms[n], dash) for n, (_, dash) in looks.items()}
    assert len(colours) == 3 == len({colour for _, colour in colours})
    assert len(dashes) == 3 == len({dash for _, dash in dashes})


def test_legend_names_student_levels_and_transforms_once():
    expected = {f"student level {j + 1}: layer{j}" for j in range(3)} | {"conv1x1", "conv3x3", "attention"}
    words = legend(schedule_figure(CASES["paper"]))
    assert set(words) == expected and len(words) == 6


def test_legend_of_many_named_terms_names_the_strongest():
    schedule = CASES["81 names"]
    words = legend(schedule_figure(schedule))
    strongest = schedule.weights.mean(0).argsort(descending=True)[:14].tolist()
    assert words == [schedule.keys[n] for n in strongest] + ["67 weaker terms"]


def test_names_that_look_like_markup_are_shown():
    assert {"_orig_mod.$x$", "$\\frac"} <= {
        word.replace("\\$", "$") for word in legend(schedule_figure(CASES["pooled"]))
    }


def test_panels_share_their_y_axis_and_label_it_once():
    axes = schedule_figure(CASES["paper"]).axes
    assert len({ax.get_ylim() for ax in axes}) == 1
    assert [bool(ax.get_ylabel()) for ax in axes] == [True, False, False]
    assert all(ax.get_xlabel() == "epoch" for ax in axes)


def test_noise_of_constant_weights_is_not_blown_up():
    low, high = schedule_figure(CASES["constant"]).axes[0].get_ylim()
    assert high - low > 0.1 / 27


def test_long_schedules_keep_both_ends():
    schedule = build(levels=1, steps=20_000)
    line = schedule_figure(schedule).axes[0].lines[0]
    assert len(line.get_xdata()) < 3000
    assert (line.get_xdata()[0], line.get_xdata()[-1]) == (0, 1999.9)


def test_unknown_quantity():
    with pytest.raises(UserError, match="did you mean 'weights'"):
        schedule_figure(CASES["paper"], "weigths")


@pytest.mark.slow
def test_heat_map_shows_terms_by_time(case):
    ax = heatmap_figure(case).axes[0]
    (image,) = ax.images
    np.testing.assert_array_equal(image.get_array(), case.weights.T.numpy())
    assert image.get_extent() == [0, len(case) / 10, len(case.keys), 0]
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert len(set(labels)) == len(case.keys) and max(map(len, labels)) <= 50


STARTS = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF", "PNG": b"\x89PNG", "jpg": b"\xff\xd8\xff"}


@pytest.mark.parametrize(("suffix", "start"), STARTS.items())
def test_one_file(tmp_path, suffix, start):
    (path,) = save_figures(CASES["one term"], tmp_path / "new" / f"fig6.{suffix}")
    assert path == tmp_path / "new" / f"fig6.{suffix}" and path.read_bytes().startswith(start)


@pytest.mark.slow
def test_folder_gets_all_figures_in_all_formats(tmp_path):
    paths = save_figures(CASES["one term"], tmp_path, formats=("png", "svg"))
    expected = {"alpha.png", "alpha.svg", "alpha_heatmap.png", "alpha_heatmap.svg"}
    assert {path.name for path in paths} == expected == {path.name for path in tmp_path.iterdir()}


def test_a_name_without_a_known_suffix(tmp_path):
    """A number is none."""
    with pytest.raises(UserError, match=r"q.jpgg: no figure ends in '.jpgg'; did you mean '.jpg'\?"):
        save_figures(CASES["one term"], tmp_path / "q.jpgg")
    assert not list(tmp_path.iterdir())
    assert {path.parent for path in save_figures(CASES["one term"], tmp_path / "lr_0.05")} == {tmp_path / "lr_0.05"}


def test_unknown_format_writes_nothing(tmp_path):
    with pytest.raises(UserError, match="did you mean 'png'"):
        save_figures(CASES["one term"], tmp_path, formats=("svg", "pgn"))
    assert not list(tmp_path.iterdir())
