"""Numbers that are learned beside the weights from end to end: search, trials, schedule, retrain, a run that is stopped, and
what a config may not say."""

from __future__ import annotations

import json
import math
import signal

import pytest
import torch

import distpro
from distpro import build
from distpro.config.reading import merge, read_config
from distpro.files import load_safely
from distpro.report.plots import save_figures, scalars_figure
from distpro.report.words import explain_schedule
from distpro.runs.trials import Trials
from distpro.schedule import Schedule
from distpro.train.tracking import read_metrics
from distpro.train.trainer import Interrupted, Trainer
from tests.digits import random_teacher, settings
from tests.runs.test_resume import apart, stop_after, stop_in_training

HCL = [f"hcl.level_weights.{n}" for n in range(4)]
NAMES = ["task", "kd.temperature", *HCL]
START = [1, 3, 1, 0.5, 0.25, 0.125]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return random_teacher(tmp_path_factory.mktemp("teacher"))


def searching(teacher, changes=None, **search):
    """A search of twelve steps, in four windows."""
    plain = {
        "search": {"horizon": 3, "trials": 0, "validation_fraction": 0.2, **search},
        "pathways": None,
        "task_weight": "learned",
        "terms": [
            {"loss": "kd", "params": {"temperature": {"learned": {"initial": 3}}}},
            {
                "loss": "hcl",
                "weight": 0.1,
                "student_taps": ["layer1"],
                "teacher_taps": ["layer1"],
                "params": {"level_weights": "learned"},
            },
            {"loss": "sp"},
        ],
    }
    return settings(teacher, merge(plain, changes or {}))


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    distpro.search(searching(teacher), out=folder)
    return folder


def test_they_start_where_the_config_says_and_move_with_the_weights(whole):
    schedule = Schedule.load(whole / "alpha.pt")
    assert list(schedule.scalars) == NAMES and schedule.keys == ("kd", "sp")
    assert [values[0].item() for values in schedule.scalars.values()] == pytest.approx(START)
    for values in schedule.scalars.values():
        assert (values[:3] == values[0]).all() and values[3] != values[2]  # a window of three steps
        assert values[-1] != values[-2]  # what the last update has led to
    columns = [schedule.weights, *(values[:, None] for values in schedule.scalars.values())]
    moved = torch.cat([(column[3] / column[2]).log() for column in columns]).abs()
    assert 0 < moved.max().item() <= 1 + 1e-5 and moved.min() > 0  # four updates: the largest of all steps is 1
    logged = [row["scalar/kd.temperature"] for row in read_metrics(whole) if "scalar/kd.temperature" in row]
    assert logged[-1] == pytest.approx(schedule.scalars["kd.temperature"][-1].item())


@pytest.mark.slow
def test_a_retrain_plays_them(teacher, whole, tmp_path):
    """The last ones at every step; all of them with ``retrain.start`` 0."""
    schedule, seen = Schedule.load(whole / "alpha.pt"), []
    step = Trainer.train_step

    def looking(trainer, *batches):
        step(trainer, *batches)
        terms = {term.key: term.loss for term in trainer.objective.terms}
        seen.append(
            [trainer.objective.task_weight_at(trainer.step - 1), terms["kd"].temperature, *terms["hcl"].level_weights]
        )

    for start, at in ((1.0, [-1] * 12), (0.0, range(12))):
        seen.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "train_step", looking)
            result = distpro.retrain(
                schedule=schedule,
                out=tmp_path / f"start{start}",
                overrides=[f"retrain.start={start}", "retrain.threshold=null", "training.max_steps=12"],
            )
        truth = torch.stack([values[list(at)] for values in schedule.scalars.values()], 1)
        assert torch.allclose(torch.tensor(seen), truth, rtol=1e-6)
        assert 0 <= result.metrics["accuracy"] <= 100


@pytest.mark.slow
def test_a_control_without_a_schedule_leaves_them_where_they_start(teacher):
    assert distpro.retrain(searching(teacher), overrides=["retrain.weights=constant"]).metrics


@pytest.mark.slow
def test_they_are_said_and_drawn(whole, tmp_path):
    schedule = Schedule.load(whole / "alpha.pt")
    assert "kd.temperature: 3, " in explain_schedule(schedule)
    assert {path.name for path in save_figures(schedule, tmp_path)} == {
        "alpha.png",
        "alpha_heatmap.png",
        "alpha_scalars.png",
    }
    titles = [ax.get_title() for ax in scalars_figure(schedule).axes]
    assert titles == ["weight of the task", *NAMES[1:]]


@pytest.mark.slow
def test_a_search_that_is_stopped_ends_in_the_same_bytes(teacher, whole, tmp_path, monkeypatch):
    stop_after(monkeypatch, [4], signal.SIGTERM)
    with pytest.raises(Interrupted):
        distpro.search(searching(teacher), out=tmp_path / "run")
    monkeypatch.undo()
    distpro.search(searching(teacher), out=tmp_path / "run", resume=True)
    assert apart(whole, tmp_path / "run") == []


@pytest.mark.slow
def test_trials_have_the_numbers_reached(teacher, tmp_path, monkeypatch):
    """Before the pass those that it starts from, after it those that it has come to; a stopped trial changes nothing."""
    judged, judge = [], Trials.judge

    def looking(trials, name, schedule):
        judged.append((name, {key: values.tolist() for key, values in schedule.scalars.items()}))
        return judge(trials, name, schedule)

    monkeypatch.setattr(Trials, "judge", looking)
    found = distpro.search(searching(teacher, trials=7), out=tmp_path / "whole")
    before = [values for name, values in judged if name.startswith("equal")]
    after = {name: values for name, values in judged if not name.startswith("equal")}
    assert all(list(values) == NAMES and [x for (x,) in values.values()] == pytest.approx(START) for values in before)
    learned = [values for name, values in after.items() if name.startswith("learned")]
    assert all(values == learned[0] for values in learned)
    ended = load_safely(tmp_path / "whole" / "checkpoint.pt")["weights"]["scalars"]["log"]
    assert [x for (x,) in learned[0].values()] == pytest.approx(ended.exp().tolist(), rel=1e-6)
    assert (ended - torch.tensor(START).log()).abs().max() > 1e-4  # they have moved
    if "half of the way" in after:
        half = [(start * learned[0][name][0]) ** 0.5 for name, start in zip(NAMES, START, strict=True)]
        assert [x for (x,) in after["half of the way"].values()] == pytest.approx(half)
    results = {
        path.parent.name: json.loads(path.read_text()) for path in (tmp_path / "whole/trials").glob("*/result.json")
    }
    best = min(results, key=lambda name: results[name].get("calibrated_loss", math.inf))
    ends = next(values for name, values in judged if name.replace(" ", "_") == best)
    assert [values[-1].item() for values in found.scalars.values()] == pytest.approx([x for (x,) in ends.values()])

    stop_in_training(monkeypatch, len(before) + 1, steps=5)  # the first trial after the pass
    with pytest.raises(Interrupted):
        distpro.search(searching(teacher, trials=7), out=tmp_path / "run")
    monkeypatch.undo()
    distpro.search(searching(teacher, trials=7), out=tmp_path / "run", resume=True)
    assert apart(tmp_path / "whole", tmp_path / "run") == []


def kd(temperature, **more):
    return {"terms": [{"loss": "kd", "params": {"temperature": temperature, **more}}], "task_weight": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": {"horizon": 1}}, "task, kd.temperature, hcl.level_weights.0, "),
        (
            {"search": {"horizon": 1}},
            "can be learned by a search over a horizon alone (search.horizon: several steps, ",
        ),
        ({"search": {"estimator": "unrolled"}}, "; this one has unrolled"),
        (kd({"learned": {"start": 4}}), "learned has no parameter 'start'"),
        (kd({"learned": 4}), "learned: needs its parameters as a mapping, {initial: 4}, found 4"),
        (kd({"learned": {"initial": 0}}), "learned: initial: expected a finite number above 0, found 0"),
        (kd({"learned": {"initial": "4"}}), "learned: initial: expected a finite number above 0, found '4'"),
        (kd(4, ce_weight="learned"), "'kd.ce_weight' starts from 0.0; a learned one moves as its logarithm"),
        (kd(4, heat="learned"), "parameter 'heat' of loss 'kd' cannot move (allowed: temperature, ce_weight)"),
        ({"task_weight": {"learned": {"initial": -1}}}, "expected a finite number above 0, found -1"),
        ({"task_weight": {"learned": {"initial": [1, 2]}}}, "task_weight: learned: initial: expected one number"),
        ({"terms": [{"loss": "ls", "params": {"smoothing": "learned"}}]}, "'ls.smoothing' must be from 0 to 1"),
        (
            {"terms": [{"loss": "mlkd", "params": {"temperatures": [4, "learned"]}}]},
            "parameter 'temperatures': an item that is learned says its start, {learned: {initial: 1}}",
        ),
        ({"terms": [{"loss": "kd", "weight": {"learned": {"initial": 1}}}]}, "learned"),
    ],
)
def test_what_cannot_be_meant_is_said(teacher, changes, message):
    with pytest.raises(distpro.UserError) as refused:
        distpro.search(merge(searching(teacher), changes))
    assert message in str(refused.value)


CUT = """
from distpro.losses.kd import KD

class Cut(KD):
    def compare(self, student, teacher, target):
        return super().compare(student, teacher, target) / float(self.temperature)
"""


def test_a_loss_that_cuts_the_derivative_is_refused_by_name(teacher, tmp_path, monkeypatch):
    (tmp_path / "cut_losses.py").write_text(CUT)
    monkeypatch.syspath_prepend(tmp_path)
    terms = [{"loss": "cut_losses:Cut", "key": "mine", "params": {"temperature": "learned"}}]
    with pytest.raises(distpro.UserError) as refused:
        distpro.search(merge(searching(teacher), {"terms": terms}))
    assert "scalar 'mine.temperature' cannot be learned: loss 'cut_losses' has no right derivative by it" in str(
        refused.value
    )


@pytest.mark.slow
def test_items_of_a_list_may_be_learned_one_by_one(teacher):
    temperatures = [2, {"learned": {"initial": 5}}, {"linear": {"initial": 6, "final": 3}}]
    terms = [{"loss": "mlkd", "params": {"temperatures": temperatures}}, {"loss": "sp"}]
    found = distpro.search(merge(searching(teacher), {"terms": terms, "task_weight": 1})).scalars
    assert list(found) == ["mlkd.temperatures.1"]
    values = found["mlkd.temperatures.1"]
    assert values[0].item() == pytest.approx(5) and values[3] != values[2]


def test_a_list_may_say_its_start(teacher):
    terms = [{"loss": "mlkd", "params": {"temperatures": {"learned": {"initial": [2, 4]}}}}, {"loss": "sp"}]
    config = read_config(
        merge(searching(teacher), {"terms": terms, "task_weight": {"name": "learned", "initial": 0.5}})
    )
    trainer = build.build_search(config, build.build_data(config))
    assert trainer.weights.beside.names == ("task", "mlkd.temperatures.0", "mlkd.temperatures.1")
    assert trainer.weights.beside.values().tolist() == pytest.approx([0.5, 2, 4])


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("task", "task_weight: it is learned, but the schedule has no scalar 'task'"),
        ("kd.temperature", "it has no scalar 'kd.temperature', which the term says is learned"),
    ],
)
def test_a_schedule_without_them_is_refused(teacher, whole, missing, message):
    schedule = Schedule.load(whole / "alpha.pt")
    schedule.scalars.pop(missing)
    with pytest.raises(distpro.UserError, match=message):
        distpro.retrain(searching(teacher), schedule=schedule)
