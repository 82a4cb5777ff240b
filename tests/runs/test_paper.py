"""The paper's search as its users know it, from end to end: `preset: paper` on digits, interpolated into KD, ReviewKD and AT."""

from __future__ import annotations

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import distpro
from distpro.config.reading import merge, read_config
from distpro.schedule import Schedule
from tests.digits import random_teacher

SHORT = {"epochs": 3, "batch_size": 20, "optimizer": {"lr": 0.05}, "learning_rate": {"milestones": [1, 2]}}
RETRAIN = {"epochs": 5, "learning_rate": {"milestones": [2, 3, 4]}}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """What a config says beside the preset: pair, data, and a training of seconds."""
    return {
        "preset": "paper",
        "threads": 1,
        "data": {"name": "digits", "samples": 100, "params": {"image_size": 8}},
        "teacher": {"model": "resnet14", "checkpoint": str(random_teacher(tmp_path_factory.mktemp("teacher")))},
        "student": {"model": "resnet8"},
        "training": SHORT,
        "retrain": {"training": RETRAIN},
    }


@pytest.fixture(scope="module")
def search(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("paper") / "search"
    distpro.search(config, out=folder)
    return folder


def test_the_search_is_the_papers(config, search):
    """27 pathways, α̃ near one and biased softmax at every step, by finite differences, without trials. The first step has been
    repeated with the weights that it led to, so that Adam's first step of γ is in the first row."""
    schedule = Schedule.load(search / "alpha.pt")
    assert len(schedule) == 12 and len(schedule.keys) == 27
    assert torch.allclose((schedule.alpha_tilde[0] - 1).abs(), torch.full((27,), 0.05), rtol=1e-3)
    exponentials = schedule.alpha_tilde.exp()
    assert torch.allclose(schedule.weights, exponentials / (exponentials.sum(1, True) + torch.e))
    moved = schedule.alpha_tilde.diff(dim=0)
    assert (moved != 0).any(1).all() and moved.abs().max() <= 0.05 * 1.5  # every step, by Adam of γ = 0.05
    assert (schedule.reading, schedule.start, schedule.threshold) == ("biased_softmax", 0, 0.5)
    recorded = read_config(search / "config.yaml")
    assert recorded.search.estimator == {"finite_difference": {"epsilon": 0.01}}
    assert recorded.search.repeats and recorded.search.trials == 0 and not (search / "trials").exists()


def test_tensorboard_has_every_weight_at_every_logged_step(search):
    events = EventAccumulator(str(search))
    events.Reload()
    tags = events.Tags()
    schedule = Schedule.load(search / "alpha.pt")
    for n, key in enumerate(schedule.keys):
        scalars = events.Scalars(f"alpha/{key}")
        assert scalars[-1].step == 12
        assert scalars[-1].value == pytest.approx(schedule.weights[-1, n].item(), abs=0.01)
        assert f"alpha_tilde/{key}" in tags["scalars"]
        used = (
            schedule.strengths(12)(11) * schedule.scales[n].item() * scalars[-1].value
        )  # of which threshold drops none
        assert events.Scalars(f"weight/{key}")[-1].value == pytest.approx(used, rel=1e-6)
    assert {"alpha/processes", "alpha/heatmap"} <= set(tags["images"])


@pytest.mark.parametrize(
    ("terms", "reduction"),
    [
        ([{"loss": "kd"}], "total"),
        ([{"loss": "review"}], "total"),
        ([{"loss": "at", "connect": "all"}], "connection"),
    ],
    ids=["KD", "ReviewKD", "AT"],
)
def test_it_is_interpolated_into_other_losses(config, search, terms, reduction, tmp_path):
    """Retrained for 25 steps: the summed weights of 12, linear in between, the end points on the end points."""
    followed = [{**term, "weight": {"schedule": reduction}} for term in terms]
    changes = merge(config, {"pathways": None, "terms": followed, "tracking": {"log_every": 1}})
    result = distpro.retrain(changes, schedule=search / "alpha.pt", out=tmp_path / "run")
    assert result.metrics["step"] == 25
    assert json.loads((tmp_path / "run" / "result.json").read_text())["epoch"] == 5

    schedule = Schedule.load(search / "alpha.pt")
    kept = schedule.weights * (schedule.alpha_tilde > 0.5)
    assert schedule.strengths(25)(0) == 1
    played = schedule.reduce("total").interpolate(25).weights[:, 0]
    assert played[0] == pytest.approx(kept[0].sum().item()) and played[-1] == pytest.approx(kept[-1].sum().item())
    middle = 0.5 * (kept[5].sum() + kept[6].sum())  # step 12 of 24 is step 5.5 of 11
    assert played[12] == pytest.approx(middle.item())
