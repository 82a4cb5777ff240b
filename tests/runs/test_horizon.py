"""A search over a horizon from end to end: its default space, its memory, its schedule, and a run that is stopped."""

from __future__ import annotations

import re
import signal

import pytest
import torch
import yaml

import distpro
from distpro.cli import main
from distpro.config.reading import read_config
from distpro.files import load_safely
from distpro.schedule import Schedule
from distpro.search.estimators.sweep import Sweep
from distpro.train.tracking import read_metrics
from distpro.train.trainer import Interrupted, Trainer
from tests.digits import random_teacher, settings
from tests.runs.test_resume import apart, stop_after


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return random_teacher(tmp_path_factory.mktemp("teacher"))


def horizon(teacher, **search):
    """A search of twelve steps whose config names no space."""
    config = settings(teacher, {"search": {"horizon": 0.25, "trials": 0, "validation_fraction": 0.2, **search}})
    return {key: value for key, value in config.items() if key not in ("pathways", "terms")}


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    distpro.search(horizon(teacher), out=folder)
    return folder


def test_the_default_space_and_its_schedule(teacher, whole):
    schedule = Schedule.load(whole / "alpha.pt")
    assert len(schedule.keys) == 11 and {"kd", "dkd", "dist", "sp", "pkt"} < set(schedule.keys)
    assert (schedule.reading, schedule.start, schedule.strength) == ("log", 1.0, 1.0)
    w = schedule.weights
    assert torch.allclose(w[:3], torch.full_like(w[:3], 1 / 12))  # a window of three steps has one set of weights
    assert (w[3] != w[2]).any() and torch.equal(w[3], w[5])
    moved = (w[3].log() - w[2].log()).abs().max().item()
    assert 0 < moved <= 1 + 1e-5  # four updates: the largest step of a logarithm is 1
    assert (w[-1] != w[-2]).any()  # what the last update has led to
    assert torch.allclose(w.log(), schedule.alpha_tilde, atol=1e-5)


@pytest.mark.slow
def test_a_replay_takes_the_last_weights(teacher, whole, tmp_path):
    schedule = Schedule.load(whole / "alpha.pt")
    kept = schedule.played(7)
    assert torch.equal(kept.weights, schedule.drop(schedule.threshold).weights[-1:].expand(7, -1))
    result = distpro.retrain(schedule=whole / "alpha.pt", out=tmp_path / "run")
    assert 0 <= result.metrics["accuracy"] <= 100
    assert read_config(tmp_path / "run" / "config.yaml").retrain.start == 1


@pytest.mark.slow
def test_a_search_that_is_stopped_in_a_window_ends_in_the_same_bytes(teacher, whole, tmp_path, monkeypatch):
    """It leaves at once, with a checkpoint of the step that its window of three began at."""
    stop_after(monkeypatch, [5], signal.SIGTERM)
    with pytest.raises(Interrupted) as stopped:
        distpro.search(horizon(teacher), out=tmp_path / "run")
    monkeypatch.undo()
    assert str(stopped.value) == "stopped at step 5 of 12; --resume goes on from step 3, where its horizon began"
    assert load_safely(tmp_path / "run" / "checkpoint.pt")["step"] == 3
    distpro.search(horizon(teacher), out=tmp_path / "run", resume=True)
    assert apart(whole, tmp_path / "run") == []


@pytest.mark.slow
def test_a_search_that_is_killed_after_an_evaluation_writes_its_row_once(teacher, tmp_path, monkeypatch):
    """A window of eight steps ends with the second epoch: the first one's checkpoint is written there, before the evaluation."""
    distpro.search(horizon(teacher, horizon=8), out=tmp_path / "whole")
    write, states = Trainer._write, []

    def killed(trainer, state):
        states.append((state["step"], len(state["history"])))
        if len(states) == 2:
            raise KeyboardInterrupt
        write(trainer, state)

    monkeypatch.setattr(Trainer, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        distpro.search(horizon(teacher, horizon=8), out=tmp_path / "run")
    monkeypatch.undo()
    assert states == [(8, 1), (8, 2)]
    distpro.search(horizon(teacher, horizon=8), out=tmp_path / "run", resume=True)
    assert apart(tmp_path / "whole", tmp_path / "run") == []
    steps = [[row["step"] for row in read_metrics(tmp_path / name)] for name in ("whole", "run")]
    assert steps[0] == steps[1]


@pytest.mark.slow
def test_a_horizon_that_does_not_fit_is_shortened(teacher, capsys):
    schedule = distpro.search(horizon(teacher, memory=0.002))
    said = capsys.readouterr().out
    assert "search.horizon: 3 steps do not fit" in said and "search.memory" in said
    assert len(schedule.weights.unique(dim=0)) > 4


FEWER = {"crd": {"nce_k": 256}}
"""Parameters of losses: CRD's 16,384 negatives of each sample take seconds a step."""


@pytest.mark.slow
@pytest.mark.parametrize("loss", [None, "crd", "sskd"])
def test_steps_that_are_done_again_lead_to_the_same_bytes(teacher, loss, tmp_path):
    """Of a whole horizon every third step is kept; the others are done again, augmentation, teacher and all."""
    space = (
        {}
        if loss is None
        else {"pathways": None, "terms": [{"loss": "kd"}, {"loss": loss, "params": FEWER.get(loss, {})}]}
    )
    for name, search in (("kept", {}), ("again", {"estimator": {"sweep": {"stretch": 3}}})):
        distpro.search({**horizon(teacher, horizon="whole", **search), **space}, out=tmp_path / name)
    assert {path.rsplit(".", 1)[-1] for path in apart(tmp_path / "kept", tmp_path / "again")} == {"estimator"}


@pytest.mark.slow
def test_a_horizon_that_does_not_fit_is_done_in_stretches(teacher, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(horizon(teacher, horizon="whole", memory=0.017)))
    assert main(["search", str(tmp_path / "c.yaml"), "--dry-run"]) == 0
    said = re.search(
        r"(\d+) steps at a time, (0.01\d*) GB kept of them, of every (\d+) the first", capsys.readouterr().out
    )
    assert int(said[1]) == 12 and float(said[2]) <= 0.017 and int(said[3]) > 1


@pytest.mark.slow
def test_a_compiled_search_sweeps_uncompiled(teacher, whole):
    """Its first update is the eager run's; from there on the rounding of compiled steps grows."""
    found = distpro.search({**horizon(teacher), "compile": "eager"}).alpha_tilde
    eager = Schedule.load(whole / "alpha.pt").alpha_tilde
    moved = (eager[3] - eager[2]).abs().max()
    assert (found[3] - eager[3]).abs().max() < 1e-2 * moved


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_moves_nothing(teacher, monkeypatch, capsys):
    call = Sweep.__call__

    def broken(sweep, step, validation):
        h = call(sweep, step, validation)
        return h * torch.nan if step.number == 5 else h

    monkeypatch.setattr(Sweep, "__call__", broken)
    w = distpro.search(horizon(teacher)).weights
    assert w.isfinite().all() and torch.equal(w[5], w[6]) and (w[8] != w[9]).any()
    assert "search: step 6: the gradient is not finite, the weights stay as they are" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["crd", "sskd"])
def test_losses_that_ask_for_more_than_images(teacher, loss):
    """For the samples' numbers and a memory of them, or for rotated images."""
    found = distpro.search(
        {**horizon(teacher), "pathways": None, "terms": [{"loss": loss, "params": FEWER.get(loss, {})}]}
    )
    assert (found.weights[2] != found.weights[3]).all() and found.weights.isfinite().all()


def test_what_looks_one_step_back_is_refused(teacher):
    with pytest.raises(distpro.UserError, match="looks one step back; with a horizon of 0.25: sweep or unrolled"):
        distpro.search(horizon(teacher, estimator="finite_difference"))
