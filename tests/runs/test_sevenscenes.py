"""The 7-Scenes configs as they are shipped, on small images and for a few steps: teacher, search, resume, retrains, export."""

from __future__ import annotations

import json
import math

import pytest
import torch

import distpro
from distpro.batch import Batch
from distpro.data import load_data, make_loader
from distpro.files import load_safely
from distpro.runs.export import export
from distpro.schedule import Schedule
from distpro.tasks import Depth
from distpro.train.trainer import Interrupted
from pathways import UserError
from tests.conftest import ROOT
from tests.runs.test_resume import differences, stop_after

pytestmark = pytest.mark.slow

SMALL = [
    "threads=1",
    "precision=float32",
    "data.samples=16",
    "data.params={image_size: [48, 64]}",
    "data.augment=[{scale: {range: [0.9, 1.2]}}, flip]",
    "training.batch_size=4",
    "tracking={tensorboard: false, log_every: 1}",
]
SEARCH = ROOT / "search_configs" / "sevenscenes_resnet10t_shufflenet.yaml"
RETRAINS = sorted((ROOT / "retrain_configs").glob("sevenscenes_*.yaml"))
DATA = {"name": "sevenscenes", "root": "depth7scenes/sevenscenes_128x96.zip", "params": {"image_size": [48, 64]}}


@pytest.fixture(autouse=True)
def found(data_folder, monkeypatch):
    """Where the configs' relative root begins."""
    if not (data_folder / "depth7scenes").is_dir():
        pytest.skip(f"no 7-Scenes in {data_folder}")
    monkeypatch.setenv("DISTPRO_DATA", str(data_folder))


@pytest.fixture
def teacher(made, tmp_path_factory):
    """The teacher's config, trained for two steps."""
    if "teacher" not in made:
        made["teacher"] = tmp_path_factory.mktemp("sevenscenes") / "teacher"
        overrides = [*SMALL, "training.max_steps=2"]
        result = distpro.train(ROOT / "search_configs" / "sevenscenes_teacher.yaml", made["teacher"], overrides)
        assert result.metrics["step"] == 2 and result.metrics["rmse"] > 0
    return made["teacher"]


def overrides_of(teacher, steps):
    return [*SMALL, f"teacher.checkpoint={teacher / 'student.pt'}", f"training.max_steps={steps}"]


def searched(teacher, out, resume=False):
    """Six steps, three of them an epoch, with one step of a horizon."""
    return distpro.search(
        SEARCH, out, [*overrides_of(teacher, 6), "training.epochs=2", "search.horizon=1", "search.trials=0"], resume
    )


@pytest.fixture
def search(made, teacher):
    if "search" not in made:
        made["search"] = teacher.parent / "search"
        searched(teacher, made["search"])
    return made["search"]


def test_a_search_over_a_horizon_judges_by_the_task_s_loss(teacher, tmp_path):
    overrides = [*overrides_of(teacher, 4), "training.epochs=2", "search.horizon=2", "search.trials=2"]
    schedule = distpro.search(SEARCH, tmp_path / "run", overrides)
    assert schedule.reading == "log" and (schedule.weights[1] != schedule.weights[2]).all()
    results = [json.loads(p.read_text()) for p in (tmp_path / "run" / "trials").glob("*/result.json")]
    assert len(results) == 2
    for result in results:
        assert result["rmse"] > 0 and result["loss"] > 0 and "calibrated_loss" not in result


def test_a_search_whose_config_says_data_and_models_alone(teacher, tmp_path):
    """The default space of the task: no loss of classes, no embedding, and no word about a cross entropy."""
    pair = {
        "task": "depth",
        "data": {**DATA, "samples": 16},
        "teacher": {
            "model": "encoder_decoder",
            "params": {"encoder": "timm:resnet10t", "width": 128},
            "checkpoint": str(teacher / "student.pt"),
        },
        "student": {"model": "encoder_decoder", "params": {"encoder": "torchvision:shufflenet_v2_x0_5", "width": 32}},
        "training": {"epochs": 2, "batch_size": 4},
        "precision": "float32",
        "tracking": {"tensorboard": False},
    }
    schedule = distpro.search(pair, tmp_path / "run", ["search.trials=2"])
    assert (
        "l1" in schedule.keys and sum(key.startswith("at:") for key in schedule.keys) == 4 and len(schedule.keys) == 9
    )
    assert schedule.weights.isfinite().all()
    with pytest.raises(UserError, match="criterion: calibrated is for a cross entropy; Depth has no rows"):
        distpro.search(pair, tmp_path / "other", ["search.criterion=calibrated"])
    with pytest.raises(UserError, match=r"terms.0 \(kd\): loss 'kd' compares probabilities of classes.*take loss l1"):
        distpro.search({**pair, "terms": [{"loss": "kd"}]}, tmp_path / "third")


def test_a_search_that_is_stopped_comes_to_the_same(search, teacher, tmp_path, monkeypatch):
    stop_after(monkeypatch, [2, 4])
    for resume in (False, True):
        with pytest.raises(Interrupted):
            searched(teacher, tmp_path, resume=resume)
    searched(teacher, tmp_path, resume=True)
    ours, theirs = (Schedule.load(folder / "alpha.pt") for folder in (tmp_path, search))
    assert torch.equal(ours.alpha_tilde, theirs.alpha_tilde) and torch.equal(ours.weights, theirs.weights)
    states = [load_safely(folder / "checkpoint.pt") for folder in (tmp_path, search)]
    for state in states:
        del state["seconds"]
    assert differences(*states) == []


@pytest.mark.parametrize("config", RETRAINS, ids=lambda path: path.stem)
def test_a_retrain(config, search, teacher, tmp_path):
    schedule = search / "alpha.pt" if config.stem == "sevenscenes_searched" else None
    result = distpro.retrain(config, schedule, tmp_path / "run", overrides_of(teacher, 2))
    assert result.metrics["step"] == 2 and result.metrics["rmse"] > 0
    assert all(math.isfinite(value) for value in result.metrics.values())
    found = distpro.evaluate(tmp_path / "run")
    assert found == pytest.approx({name: result.metrics[name] for name in found}, rel=1e-5)


def test_the_student_in_other_formats_says_the_same(teacher, tmp_path):
    """On test frames, in batches of another size than it was written with; and so do the errors."""
    from safetensors.torch import load_file

    run = tmp_path / "run"
    result = distpro.retrain(ROOT / "retrain_configs" / "sevenscenes_kd.yaml", None, run, overrides_of(teacher, 2))
    paths = {kind: export(run, kind) for kind in ("safetensors", "pt2")}
    state = load_safely(run / "student.pt")
    assert all(torch.equal(value, state[name]) for name, value in load_file(paths["safetensors"]).items())
    facts = json.loads((run / "data.json").read_text())
    data = load_data(DATA["name"], DATA["root"], **DATA["params"], mean=facts["mean"], std=facts["std"])
    program, metrics = torch.export.load(paths["pt2"]).module(), Depth().metrics()
    for batch in make_loader(data, data.test, 5, training=False).epoch(0):
        with torch.no_grad():
            metrics.update(program(batch.inputs), batch)
    found = metrics.compute()
    assert found == pytest.approx({name: result.metrics[name] for name in found}, rel=1e-4)


def test_a_plain_checkpoint_is_evaluated(teacher, tmp_path, capsys):
    from distpro.cli import main

    config = tmp_path / "plain.yaml"
    config.write_text(
        "task: depth\nprecision: float32\nthreads: 1\n"
        f"data: {json.dumps(DATA)}\n"
        "student: {model: encoder_decoder, params: {encoder: 'timm:resnet10t', width: 128}}\n"
    )
    torch.save({"state_dict": load_safely(teacher / "student.pt")}, tmp_path / "plain.pt")
    assert main(["evaluate", str(tmp_path / "plain.pt"), "--config", str(config)]) in (0, None)
    assert "rmse" in capsys.readouterr().out


def test_pictures_of_a_real_batch(data_folder):
    data = load_data(DATA["name"], DATA["root"], **DATA["params"])
    batch = data.example(4)
    shown = Depth().pictures(batch.target.unsqueeze(1), Batch(batch.inputs, batch.target, 4))
    assert shown.shape == (4, 3, 48, 192)
