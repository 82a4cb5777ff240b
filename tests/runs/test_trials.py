"""The trials of a search over a horizon: what they judge, what they leave, and a search that is stopped in one."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import distpro
from distpro import build
from distpro.build.data import search_parts
from distpro.config.reading import read_config
from distpro.runs.trials import judged
from distpro.schedule import Schedule
from distpro.tasks import TASKS
from distpro.train.trainer import Diverged, Interrupted, Trainer
from tests.digits import random_teacher, settings
from tests.runs.test_resume import apart, stop_in_training

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return random_teacher(tmp_path_factory.mktemp("teacher"))


def searching(teacher, **search):
    """A search of twelve steps, in four windows, with a space of two terms."""
    changes = {
        "search": {"horizon": 3, "trials": 7, "validation_fraction": 0.2, **search},
        "pathways": None,
        "terms": [{"loss": "kd"}, {"loss": "sp"}],
    }
    return settings(teacher, changes)


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    distpro.search(searching(teacher), out=folder)
    return folder


def results(folder):
    return {path.parent.name: json.loads(path.read_text()) for path in (folder / "trials").glob("*/result.json")}


def test_the_schedule_ends_with_the_weights_that_were_judged_best(whole):
    found = results(whole)
    assert {"equal_weights", "learned"} < set(found) and 3 <= len(found) <= 7
    assert not list((whole / "trials").glob("*/checkpoint.pt"))
    best = min(found, key=lambda name: found[name].get("calibrated_loss", math.inf))
    schedule = Schedule.load(whole / "alpha.pt")
    first, last = schedule.weights[0], schedule.weights[-1]
    factor = float(best.rpartition("times_")[2]) if "times" in best else 1.0
    equal = min((n for n in found if n.startswith("equal")), key=lambda n: found[n].get("calibrated_loss", math.inf))
    strength = float(equal.rpartition("times_")[2]) if "times" in equal else 1.0
    # the pass begins below where equal weights were best
    assert first.tolist() == pytest.approx([0.1 * strength / 3] * 2, rel=0.01)
    if best.startswith("equal"):
        assert last.tolist() == pytest.approx([factor / 3] * 2, rel=0.01)
    else:
        assert (last / last.sum() - 0.5).abs().max() > 1e-3
        assert last.sum().item() == pytest.approx(factor * strength * 2 / 3, rel=0.01) or best == "half_of_the_way"


def test_few_trials_come_all_after_the_pass(teacher, tmp_path):
    """It starts where the config says, and what it has learned is judged at its own strength and at powers of ten of it."""
    schedule = distpro.search(searching(teacher, trials=4), out=tmp_path)
    plain = distpro.search(searching(teacher, trials=0))
    found = results(tmp_path)
    assert len(found) == 4 and {"learned", "learned_times_10"} < set(found)
    assert schedule.weights[0].tolist() == pytest.approx([1 / 3] * 2)
    best = min(found, key=lambda name: found[name].get("calibrated_loss", math.inf))
    factor = float(best.rpartition("times_")[2]) if "times" in best else 1.0
    assert torch.allclose(schedule.weights[-1], factor * plain.weights[-1], rtol=0.01)  # names have three digits


def test_a_trial_is_the_retrain_of_its_weights_on_the_searchs_part(teacher, tmp_path):
    """What `equal weights` is judged by is what a training on those samples as a data set of their own says."""
    plain = searching(teacher)
    plain["data"] = {**plain["data"], "augment": []}  # it is drawn by a sample's number in its set
    schedule = distpro.search(plain, out=tmp_path / "search")
    config = read_config(plain)
    data = build.build_data(config)
    validation, train = search_parts(config, data)
    arrays = {"names": np.array(data.names)}
    for name, part in (("train", train), ("test", validation)):
        arrays |= {f"x_{name}": part.images.permute(0, 2, 3, 1).numpy(), f"y_{name}": part.labels.numpy()}
    np.savez(tmp_path / "parts.npz", **arrays)
    there = {"name": "npz", "root": str(tmp_path / "parts.npz"), "samples": None, "params": {}}
    scales = dict(zip(schedule.keys, schedule.scales.tolist(), strict=True))
    own = {
        **plain,
        "data": {**plain["data"], **there, "mean": list(data.mean), "std": list(data.std)},
        "terms": [{"loss": loss, "weight": scales[loss] / 3} for loss in ("kd", "sp")],
        "retrain": {"weights": "constant"},
    }
    expected = distpro.retrain(own).metrics["loss"]
    assert results(tmp_path / "search")["equal_weights"]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("trial", [0, 2, 5])
def test_a_search_that_is_stopped_in_a_trial_ends_in_the_same_bytes(teacher, whole, tmp_path, monkeypatch, trial):
    """Before the pass and after it."""
    stop_in_training(monkeypatch, trial, steps=5)
    with pytest.raises(Interrupted):
        distpro.search(searching(teacher), out=tmp_path / "run")
    monkeypatch.undo()
    for path in (tmp_path / "run" / "trials").glob("*/result.json"):
        path.with_name("checkpoint.pt").touch()  # as of one that was killed before it removed it
    distpro.search(searching(teacher), out=tmp_path / "run", resume=True)
    assert apart(whole, tmp_path / "run") == [] and not list((tmp_path / "run" / "trials").glob("*/checkpoint.pt"))
    for name, result in results(whole).items():
        again = results(tmp_path / "run")[name]
        assert {**again, "seconds": 0} == {**result, "seconds": 0}


def test_without_a_folder_it_learns_the_same(teacher, whole):
    found = distpro.search(searching(teacher))
    assert torch.equal(found.weights, Schedule.load(whole / "alpha.pt").weights)


def test_a_trial_that_diverges_is_worst(teacher, tmp_path, monkeypatch):
    fit = Trainer.fit

    def diverging(trainer):
        if trainer.name == "trial 2":
            raise Diverged("training diverged")
        return fit(trainer)

    monkeypatch.setattr(Trainer, "fit", diverging)
    distpro.search(searching(teacher), out=tmp_path / "run")
    found = results(tmp_path / "run")
    assert [name for name, result in found.items() if "loss" not in result] == ["equal_weights_times_10"]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["trials"] == len(found) and result["seconds"] > sum(r["seconds"] for r in found.values()) > 0


def test_what_is_judged():
    task = TASKS.build("classification")
    assert judged({"accuracy": 50.0, "loss": 0.5}, task) == 0.5
    assert judged({"accuracy": 50.0}, task) == -50.0
    assert judged({"accuracy": 50.0, "loss": math.nan}, task) == judged({}, task) == math.inf


def test_trials_need_a_strength_to_choose(teacher):
    with pytest.raises(distpro.UserError, match="trials need search.weighting log"):
        distpro.search(searching(teacher, weighting="softmax"))
    assert distpro.search(searching(teacher, weighting="softmax", trials=None)).reading == "softmax"
