"""Models of any inputs and outputs through every command: dicts in and out, a `ModelOutput`, and a detector that takes
lists and gives losses in training."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml

import distpro
from distpro.cli import main
from distpro.config.reading import merge, read_config
from distpro.files import load_safely
from distpro.report.cost import describe
from distpro.runs.export import export
from distpro.schedule import Schedule
from distpro.train.tracking import read_metrics
from distpro.train.trainer import Interrupted
from tests import own_models
from tests.runs.test_resume import differences, stop_after

HERE = "tests.own_models"

KINDS = {
    "tagger": {
        "task": f"{HERE}:Tagging",
        "data": {"name": f"{HERE}:tagged_texts", "params": {"count": 24}},
        "teacher": {
            "model": f"{HERE}:Tagger",
            "params": {"width": 12},
            "taps": ["encoder.layers.0", "encoder.layers.1"],
        },
        "student": {"model": f"{HERE}:Tagger", "taps": ["encoder.layers.0", "encoder.layers.1"]},
        "pathways": {"connect": "same", "transforms": ["tokens"], "distance": "l2"},
        "terms": [{"loss": "kd"}, {"loss": "l2", "student_taps": ["[hidden]"], "teacher_taps": ["[hidden]"]}],
    },
    "texts": {
        "data": {"name": f"{HERE}:texts", "params": {"count": 24}},
        "teacher": {"model": f"{HERE}:TextClassifier", "params": {"width": 12, "num_labels": 3}},
        "student": {"model": f"{HERE}:TextClassifier", "params": {"num_labels": 3}},
        "pathways": {"connect": "same", "transforms": ["tokens"], "distance": "l2"},
        "terms": [
            {"loss": "kd"},
            {"loss": "l2", "student_taps": ["[hidden_states.2]"], "teacher_taps": ["[hidden_states.2]"]},
        ],
    },
    "detector": {
        "task": f"{HERE}:Detection",
        "data": {"name": f"{HERE}:boxes", "params": {"count": 12}},
        "teacher": {"model": f"{HERE}:Detector", "params": {"width": 8}, "taps": ["backbone.first", "backbone.second"]},
        "student": {"model": f"{HERE}:Detector", "taps": ["backbone.first", "backbone.second"]},
        "pathways": {"connect": "same", "transforms": ["conv1x1"], "distance": "l2"},
        "terms": [{"loss": "at", "student_taps": ["backbone.second"], "teacher_taps": ["backbone.second"]}],
    },
}
STEPS = 6
TAPS = {"texts": ["encoder.layers.0", "encoder.layers.1"]}

ESTIMATORS = ["forward_mode", "finite_difference", {"unrolled": {"steps": 2}}]


def settings(kind, folder, changes=None):
    """A config of two epochs of three batches; the teacher is written to ``folder`` first."""
    config = {
        "threads": 1,
        "precision": "float32",
        "channels_last": False,
        **KINDS[kind],
        "training": {
            "epochs": 2,
            "batch_size": 4 if kind == "detector" else 8,
            "optimizer": {"lr": 0.1, "weight_decay": 1e-3},
            "learning_rate": {"name": "cosine"},
        },
        "tracking": {"tensorboard": False, "log_every": 1},
    }
    for side in ("teacher", "student"):
        config[side] = {**({"taps": TAPS[kind]} if kind in TAPS else {}), **config[side]}
    path = folder / f"{kind}.pt"
    if not path.exists():
        torch.manual_seed(7)
        name = config["teacher"]["model"].partition(":")[2]
        torch.save(getattr(own_models, name)(**config["teacher"]["params"]).state_dict(), path)
    config["teacher"]["checkpoint"] = str(path)
    return merge(config, changes or {})


@pytest.fixture(scope="module", params=list(KINDS))
def runs(request, tmp_path_factory):
    """The kind of model, and a folder with a search and a retrain of it."""
    folder = tmp_path_factory.mktemp(request.param)
    config = settings(request.param, folder)
    distpro.search(config, out=folder / "search")
    distpro.retrain(config, schedule=folder / "search" / "alpha.pt", out=folder / "retrain")
    return request.param, folder


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=["forward_mode", "finite_difference", "unrolled"])
def test_every_estimator_searches(runs, estimator):
    kind, folder = runs
    schedule = distpro.search(settings(kind, folder, {"search": {"estimator": estimator}}))
    assert len(schedule) == STEPS and schedule.weights.isfinite().all()
    assert not torch.equal(schedule.alpha_tilde[0], schedule.alpha_tilde[-1])


@pytest.mark.slow
def test_a_horizon_searches_with_its_trials(runs):
    kind, folder = runs
    schedule = distpro.search(settings(kind, folder, {"search": {"horizon": 3, "trials": 2}}))
    assert schedule.reading == "log" and len(schedule) == STEPS
    assert (schedule.weights[2] != schedule.weights[3]).all()  # an update after three steps


@pytest.mark.slow
def test_estimators_agree_on_the_first_update(runs):
    """By plain gradient descent, so that α̃ shows the hypergradient itself, not its sign. Without dropout, which the
    estimators replay each in its own way."""
    kind, folder = runs
    plain = {"training": {"max_steps": 2}, "search": {"optimizer": "sgd", "learning_rate": 100.0}}
    if kind == "texts":
        plain["student"] = {"params": {"dropout": 0.0}}
    moved = []
    for estimator in ("forward_mode", "finite_difference", {"unrolled": {"steps": 1}}):
        schedule = distpro.search(settings(kind, folder, merge(plain, {"search": {"estimator": estimator}})))
        moved.append(schedule.alpha_tilde[1] - schedule.alpha_tilde[0])
    assert (moved[0] != 0).all()
    for other in moved[1:]:
        assert ((other - moved[0]).norm() / moved[0].norm()).item() < 0.02


def test_the_schedule_names_the_places(runs):
    kind, folder = runs
    schedule = Schedule.load(folder / "search" / "alpha.pt")
    first, second = KINDS[kind]["teacher"].get("taps") or TAPS[kind]
    assert len(schedule.keys) == (3 if kind == "detector" else 4)
    for key, tap in zip(schedule.keys, (first, second), strict=False):
        assert key.startswith(f"{tap}") and f"<-{tap}" in key
    assert schedule.meta["data"]["name"] == "objects" and schedule.meta["data"]["note"] == "the contents are not hashed"


def test_a_retrain_and_its_evaluation_say_the_same(runs):
    kind, folder = runs
    result = json.loads((folder / "retrain" / "result.json").read_text())
    headline = {"tagger": "tags", "texts": "accuracy", "detector": "distance"}[kind]
    assert math.isfinite(result[headline]) and result["step"] == STEPS
    found = distpro.evaluate(folder / "retrain")
    assert found == {name: result[name] for name in found} and headline in found
    best = (min if kind == "detector" else max)(
        row[f"test/{headline}"] for row in read_metrics(folder / "retrain") if f"test/{headline}" in row
    )
    assert result[f"best_{headline}"] == best


def test_losses_that_read_logits_name_what_is_missing(tmp_path):
    """A detector's task gives no response."""
    config = settings("detector", tmp_path, {"terms": [{"loss": "kd"}], "pathways": None})
    with pytest.raises(distpro.UserError, match="logits"):
        distpro.search(config)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["search", "retrain"])
def test_interrupted_and_resumed(runs, command, tmp_path, monkeypatch):
    """To the same bytes, the second time after a step in the middle of an epoch."""
    kind, folder = runs
    config, schedule = settings(kind, folder), folder / "search" / "alpha.pt"

    def go(resume):
        if command == "search":
            distpro.search(config, out=tmp_path, resume=resume)
        else:
            distpro.retrain(config, schedule=schedule, out=tmp_path, resume=resume)

    stop_after(monkeypatch, [3 if command == "search" else 2, 5])
    for resume in (False, True):
        with pytest.raises(Interrupted):
            go(resume)
    go(True)
    states = [load_safely(place / "checkpoint.pt") for place in (tmp_path, folder / command)]
    for state in states:
        state.pop("seconds")
        for row in state["history"]:
            row.pop("seconds", None)
    assert differences(*states) == []
    if command == "search":
        ours, theirs = (Schedule.load(place / "alpha.pt") for place in (tmp_path, folder / command))
        assert torch.equal(ours.alpha_tilde, theirs.alpha_tilde) and torch.equal(ours.weights, theirs.weights)
    else:
        assert differences(*(load_safely(place / "student.pt") for place in (tmp_path, folder / command))) == []


def test_the_cache_refuses_data_that_it_cannot_know(runs, tmp_path):
    kind, folder = runs
    config = settings(kind, folder, {"cache": {"folder": str(tmp_path / "cache")}})
    for run in (
        lambda: distpro.search(config, out=tmp_path / "run"),
        lambda: distpro.retrain(config, schedule=folder / "search" / "alpha.pt", out=tmp_path / "run"),
    ):
        reason = "images of several sizes are padded" if kind == "detector" else "for distpro's own data sets"
        with pytest.raises(distpro.UserError, match=f"cache: {reason}"):
            run()
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_dry_run_names_the_places_and_the_cost(runs, tmp_path, capsys):
    kind, folder = runs
    config = settings(kind, folder)
    found = describe(read_config(config), searching=True)
    taps = KINDS[kind]["teacher"].get("taps") or TAPS[kind]
    assert list(found.student_shapes) == taps and found.student_parameters > 0
    assert [key for key, *_ in found.terms] == list(Schedule.load(folder / "search" / "alpha.pt").keys)
    assert found.steps == STEPS and found.step_macs > 0

    (tmp_path / "cfg.yaml").write_text(yaml.safe_dump(config))
    assert main(["search", str(tmp_path / "cfg.yaml"), "--out", str(tmp_path / "run"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"student  {config['student']['model']}" in said and "run      6 steps" in said
    assert not (tmp_path / "run").exists()


def test_a_training_without_a_teacher(runs):
    kind, folder = runs
    result = distpro.train(settings(kind, folder))
    assert result.metrics["step"] == STEPS


# Export


@pytest.mark.slow
@pytest.mark.parametrize("format", ["safetensors", "pt2"])
def test_the_student_leaves_with_its_arguments(runs, format, tmp_path):
    kind, folder = runs
    if format == "safetensors":
        pytest.importorskip("safetensors")
    path = tmp_path / f"student.{format}"
    if kind == "detector" and format == "pt2":
        with pytest.raises(distpro.UserError, match="takes a list, which no pt2 file can stand for"):
            export(folder / "retrain", format, path)
        return
    if kind == "texts" and format == "pt2":
        with pytest.raises(distpro.UserError, match="cannot be exported to pt2: RuntimeError: Found .*TextOutput"):
            export(folder / "retrain", format, path)
        torch.export.register_dataclass(own_models.TextOutput, serialized_type_name="tests.TextOutput")
    assert export(folder / "retrain", format, path) == path
    weights = load_safely(folder / "retrain" / "student.pt")
    if format == "safetensors":
        from safetensors.torch import load_file

        assert differences(load_file(path), weights) == []
        return
    config = read_config(folder / "retrain" / "config.yaml")
    name = config.student.model.partition(":")[2]
    student = getattr(own_models, name)(**config.student.params).eval()
    student.load_state_dict(weights)
    program = torch.export.load(path).module()
    for count in (2, 5):  # batches of any size
        few = [own_models.Texts(count, 3, per_token=False)[n] for n in range(count)]
        inputs = {key: torch.stack([sample[key] for sample in few]) for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            assert torch.allclose(program(**inputs)["logits"], student(**inputs)["logits"], atol=1e-6)
