"""The CamVid configs as they are shipped, on small images and for a few steps: teacher, search, resume, retrains."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path

import pytest
import torch

import distpro
from distpro import build
from distpro.config.reading import read_config
from distpro.files import load_safely
from distpro.models import build_model, load_checkpoint
from distpro.report.cost import describe
from distpro.schedule import Schedule
from distpro.train.trainer import Interrupted, Trainer
from tests.conftest import ROOT
from tests.runs.test_resume import differences, stop_after

pytestmark = pytest.mark.slow

SMALL = [
    "threads=1",
    "precision=float32",
    "data.samples=16",
    "data.params={image_size: [48, 64]}",
    "data.augment=[{scale: {range: [0.75, 1.5]}}, {crop: {size: [32, 48]}}, flip]",
    "training.batch_size=4",
    "tracking={tensorboard: false, log_every: 1}",
]
SEARCH = ROOT / "search_configs" / "camvid_deeplabv3_lraspp.yaml"
RETRAINS = sorted((ROOT / "retrain_configs").glob("camvid_*.yaml"))


PARTS = {"train": 24, "val": 10, "test": 24}


@pytest.fixture(scope="module")
def fewer(data_folder, tmp_path_factory):
    """A folder with a few pictures of each part of CamVid, spread over it."""
    archive = data_folder / "camvid" / "camvid_160x120.zip"
    if not archive.is_file():
        pytest.skip(f"no CamVid in {data_folder}")
    folder = tmp_path_factory.mktemp("fewer")
    (folder / "camvid").mkdir()
    with zipfile.ZipFile(archive) as whole, zipfile.ZipFile(folder / "camvid" / archive.name, "w") as out:
        for part, count in PARTS.items():
            lines = whole.read(f"{part}.txt").decode().splitlines()
            kept = lines[:: len(lines) // count][:count]
            out.writestr(f"{part}.txt", "\n".join(kept) + "\n")
            names = {Path(word).stem for line in kept for word in line.split()}
            for name in whole.namelist():
                if Path(name).parts[0] in (part, f"{part}annot") and Path(name).stem in names:
                    out.writestr(name, whole.read(name))
    return folder


@pytest.fixture(autouse=True)
def found(fewer, monkeypatch):
    """Where the configs' relative root begins."""
    monkeypatch.setenv("DISTPRO_DATA", str(fewer))


@pytest.fixture
def teacher(made, tmp_path_factory):
    """The teacher's config, trained for two steps."""
    if "teacher" not in made:
        made["teacher"] = tmp_path_factory.mktemp("camvid") / "teacher"
        overrides = [*SMALL, "training.max_steps=2"]
        result = distpro.train(ROOT / "search_configs" / "camvid_teacher.yaml", made["teacher"], overrides)
        assert result.metrics["step"] == 2 and 0 <= result.metrics["miou"] <= 100
    return made["teacher"]


def overrides_of(teacher, steps):
    return [*SMALL, f"teacher.checkpoint={teacher / 'student.pt'}", f"training.max_steps={steps}"]


def searched(teacher, out, resume=False):
    """Seven steps, four of them an epoch."""
    return distpro.search(SEARCH, out, [*overrides_of(teacher, 7), "training.epochs=2"], resume)


@pytest.fixture
def search(made, teacher):
    if "search" not in made:
        made["search"] = teacher.parent / "search"
        searched(teacher, made["search"])
    return made["search"]


def test_a_search_over_a_horizon(teacher, tmp_path):
    overrides = [*overrides_of(teacher, 4), "training.epochs=1", "search.horizon=2", "search.trials=2"]
    schedule = distpro.search(SEARCH, tmp_path / "run", overrides)
    assert schedule.reading == "log" and (schedule.weights[1] != schedule.weights[2]).all()
    found = [json.loads(p.read_text()) for p in (tmp_path / "run" / "trials").glob("*/result.json")]
    assert len(found) == 2 and all(0 <= result["miou"] <= 100 and result["loss"] > 0 for result in found)


def test_the_search_learns_weights_of_its_terms(search):
    schedule = Schedule.load(search / "alpha.pt")
    assert len(schedule) == 7 and schedule.weights.isfinite().all() and len(schedule.keys) == len(set(schedule.keys))
    assert {"kd", "cwd", "ifvd"} <= set(schedule.keys)
    assert sum("<-" in key for key in schedule.keys) == 6  # three pairs of places, two transforms
    assert (schedule.alpha_tilde[0] != schedule.alpha_tilde[-1]).all()
    assert schedule.meta["data"]["validation"] == PARTS["val"]
    result = json.loads((search / "result.json").read_text())
    assert 0 <= result["miou"] <= 100 and math.isfinite(result["loss"])


def test_a_search_that_is_stopped_and_one_that_dies_come_to_the_same(search, teacher, tmp_path, monkeypatch):
    """Stopped after step 3; resumed, it fails after 6 and goes on from the checkpoint of the epoch's end, 4."""
    stop_after(monkeypatch, [3])
    with pytest.raises(Interrupted):
        searched(teacher, tmp_path)
    original = Trainer.train_step

    def die(self, batch):
        if self.step == 6:
            raise MemoryError
        original(self, batch)

    monkeypatch.setattr(Trainer, "train_step", die)
    with pytest.raises(MemoryError):
        searched(teacher, tmp_path, resume=True)
    assert load_safely(tmp_path / "checkpoint.pt")["step"] == 4
    monkeypatch.setattr(Trainer, "train_step", original)
    searched(teacher, tmp_path, resume=True)
    ours, theirs = (Schedule.load(folder / "alpha.pt") for folder in (tmp_path, search))
    assert torch.equal(ours.alpha_tilde, theirs.alpha_tilde) and torch.equal(ours.weights, theirs.weights)
    states = [load_safely(folder / "checkpoint.pt") for folder in (tmp_path, search)]
    for state in states:
        del state["seconds"]
    assert differences(*states) == []


@pytest.mark.parametrize("config", RETRAINS, ids=lambda path: path.stem)
def test_a_retrain(config, search, teacher, tmp_path):
    schedule = search / "alpha.pt" if config.stem == "camvid_searched" else None
    result = distpro.retrain(config, schedule, tmp_path / "run", overrides_of(teacher, 2))
    assert result.metrics["step"] == 2 and 0 <= result.metrics["miou"] <= 100
    assert all(math.isfinite(value) for value in result.metrics.values())
    found = distpro.evaluate(tmp_path / "run")
    assert found == pytest.approx({name: result.metrics[name] for name in found}, rel=1e-5)


def test_the_metrics_are_those_of_scikit_learn_and_torchmetrics(teacher):
    """On a trained network's predictions for real pictures: intersection over union of each class and their mean, pixels."""
    sklearn = pytest.importorskip("sklearn.metrics")
    torchmetrics = pytest.importorskip("torchmetrics")
    config = read_config(teacher / "config.yaml")
    data = build.build_data(config)
    student = build_model(config.student.model, num_classes=11, **config.student.params).eval()
    load_checkpoint(student, teacher / "student.pt")
    loader = build.build_loader(config, data, data.test, training=False)
    target, predicted = [], []
    with torch.no_grad():
        for batch in loader.epoch(0):
            target.append(batch.target.long())
            predicted.append(student(batch.inputs)["out"].argmax(1))
    target, predicted = torch.cat(target), torch.cat(predicted)
    assert len(target) == PARTS["test"]
    found = json.loads((teacher / "result.json").read_text())
    counts = target != 255
    labels, answers = target[counts].numpy(), predicted[counts].numpy()
    seen = sorted({*labels.tolist(), *answers.tolist()})
    by_class = sklearn.jaccard_score(labels, answers, labels=seen, average=None)
    assert found["miou"] == pytest.approx(100 * by_class.mean(), rel=1e-5)
    assert found["pixel_accuracy"] == pytest.approx(100 * sklearn.accuracy_score(labels, answers), rel=1e-5)
    measured = torchmetrics.JaccardIndex("multiclass", num_classes=11, ignore_index=255, average="none")
    measured.update(predicted, target)
    assert found["miou"] == pytest.approx(100 * measured.compute()[seen].mean().item(), rel=1e-5)


CONNECTIONS = ROOT / "search_configs" / "camvid_connections.yaml"


@pytest.mark.parametrize(("connect", "pathways"), [("all", 16), ("review", 10), ("same", 4)])
def test_the_connections_that_a_study_asks_about(connect, pathways):
    pytest.importorskip("segmentation_models_pytorch")
    pytest.importorskip("timm")
    d = describe(read_config(CONNECTIONS, [f"pathways.connect={connect}"]), searching=True)
    levels = [level[:2] for _, level, _, _ in d.terms]
    assert len(levels) == pathways
    assert (connect == "all") == any(i > j for i, j in levels)  # from a deeper level of the teacher to a shallower one


def test_a_search_among_all_connections(tmp_path):
    """Models of segmentation-models-pytorch, which are evaluated in windows whose sides 32 divides."""
    pytest.importorskip("segmentation_models_pytorch")
    pytest.importorskip("timm")
    small = [
        "threads=1",
        "precision=float32",
        "data.samples=16",
        "tracking={tensorboard: false}",
        "training.max_steps=2",
    ]
    distpro.train(ROOT / "search_configs" / "camvid_connections_teacher.yaml", tmp_path / "teacher", small)
    more = [f"teacher.checkpoint={tmp_path / 'teacher' / 'student.pt'}", "pathways.connect=all", "search.trials=1"]
    schedule = distpro.search(CONNECTIONS, tmp_path / "search", [*small, *more])
    assert len(schedule.keys) == 16 and (schedule.weights[-1] != schedule.weights[0]).any()
