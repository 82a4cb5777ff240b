"""The raccoon configs as they are shipped, on few and small images and for a few steps: teacher, search, resume, retrains, export."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml

import distpro
from distpro import build
from distpro.build.models import build_network
from distpro.cli import main
from distpro.config.reading import read_config
from distpro.files import load_safely
from distpro.models import load_checkpoint
from distpro.runs.export import export
from distpro.schedule import Schedule
from distpro.train.tracking import read_metrics
from distpro.train.trainer import Interrupted
from tests.conftest import ROOT
from tests.onnx_files import answers
from tests.runs.test_resume import differences, stop_after

pytestmark = pytest.mark.slow

SMALL = [
    "threads=1",
    "data.samples=9",
    "data.params.test=4",
    "data.params.validation=4",
    "training.batch_size=3",
    "training.learning_rate.warmup_epochs=0",
    "tracking={tensorboard: false, log_every: 2}",
]
SIZE = "{channels: 32, min_size: 64, max_size: 64}"
PARTS = {"classification", "bbox_regression", "bbox_ctrness"}
SEARCH = ROOT / "search_configs" / "raccoon_resnet18_mobilenet_v3.yaml"
TEACHER = ROOT / "search_configs" / "raccoon_teacher.yaml"
RETRAINS = sorted(p for p in (ROOT / "retrain_configs").glob("raccoon_*.yaml") if "resnet50" not in p.stem)


@pytest.fixture(autouse=True)
def found(data_folder, monkeypatch):
    """Where the configs' relative root begins."""
    if not (data_folder / "detection").is_dir():
        pytest.skip(f"no raccoons in {data_folder}")
    monkeypatch.setenv("DISTPRO_DATA", str(data_folder))


@pytest.fixture
def teacher(made, tmp_path_factory):
    """The teacher's config, trained for three steps."""
    if "teacher" not in made:
        made["teacher"] = tmp_path_factory.mktemp("raccoon") / "teacher"
        overrides = [*SMALL, f"student.params={SIZE}", "training.max_steps=3"]
        result = distpro.train(TEACHER, made["teacher"], overrides)
        assert result.metrics["step"] == 3 and 0 <= result.metrics["map"] <= 100
    return made["teacher"]


def overrides_of(teacher, steps):
    models = [f"teacher.params={SIZE}", f"student.params={SIZE}", f"teacher.checkpoint={teacher / 'student.pt'}"]
    return [*SMALL, *models, f"training.max_steps={steps}"]


def searched(teacher, out, resume=False, *more):
    """Five steps, three of them an epoch."""
    return distpro.search(SEARCH, out, [*overrides_of(teacher, 5), "training.epochs=2", *more], resume)


@pytest.fixture
def search(made, teacher):
    if "search" not in made:
        made["search"] = teacher.parent / "search"
        searched(teacher, made["search"])
    return made["search"]


def test_the_search_learns_weights_of_its_terms(search):
    schedule = Schedule.load(search / "alpha.pt")
    assert len(schedule) == 5 and schedule.weights.isfinite().all()
    assert set(schedule.keys) == {f"backbone[{n}]<-backbone[{n}]@conv1x1" for n in range(3)} | {"hint", "cwd", "mgd"}
    assert (schedule.alpha_tilde[0] != schedule.alpha_tilde[-1]).all()
    assert schedule.meta["data"]["validation"] == 4 and len(schedule.meta["data"]["sha256"]) == 64
    assert yaml.safe_load((search / "config.yaml").read_text())["search"]["estimator"] == "forward_mode"


def test_the_parts_of_the_loss_are_logged(search):
    rows = [row for row in read_metrics(search) if "train/task_loss" in row]
    assert len(rows) == 4  # after steps 2, 3 (the epoch's end), 4 and 5
    for row in rows:
        parts = [row[f"train/{name}"] for name in PARTS]
        assert sum(parts) == pytest.approx(row["train/task_loss"], rel=1e-5)


def test_the_parts_of_the_loss_are_weighted(teacher, tmp_path):
    more = ["task={detection: {weights: {bbox_ctrness: 0, classification: 2}}}"]
    distpro.train(TEACHER, tmp_path, [*SMALL, f"student.params={SIZE}", "training.max_steps=1", *more])
    plain, weighted = (next(r for r in read_metrics(f) if "train/task_loss" in r) for f in (teacher, tmp_path))
    assert plain.keys() == weighted.keys()
    expected = weighted["train/bbox_regression"] + 2 * weighted["train/classification"]
    assert weighted["train/task_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_search_that_is_stopped_comes_to_the_same(search, teacher, tmp_path, monkeypatch):
    """After step 1, in the middle of a log row, and after step 4."""
    stop_after(monkeypatch, [1, 4])
    for resume in (False, True):
        with pytest.raises(Interrupted):
            searched(teacher, tmp_path, resume)
    searched(teacher, tmp_path, True)
    ours, theirs = (Schedule.load(folder / "alpha.pt") for folder in (tmp_path, search))
    assert torch.equal(ours.alpha_tilde, theirs.alpha_tilde) and torch.equal(ours.weights, theirs.weights)
    states = [load_safely(folder / "checkpoint.pt") for folder in (tmp_path, search)]
    for state in states:
        del state["seconds"]
    assert differences(*states) == []
    logged = [
        [{k: v for k, v in row.items() if "second" not in k and k != "time"} for row in read_metrics(folder)]
        for folder in (tmp_path, search)
    ]
    assert logged[0] == logged[1]


def test_a_search_over_a_horizon(teacher, tmp_path):
    """FCOS has second derivatives. Its trials are judged by the validation loss."""
    schedule = searched(teacher, tmp_path / "run", False, "training.epochs=1", "search.horizon=2", "search.trials=2")
    assert schedule.reading == "log" and schedule.weights.isfinite().all()
    rows = [json.loads(p.read_text()) for p in (tmp_path / "run" / "trials").glob("*/result.json")]
    assert len(rows) == 2 and all(0 <= row["map"] <= 100 and row["loss"] > 0 for row in rows)


def test_what_regions_forbid_is_said_by_name(teacher, tmp_path):
    def run(*more):
        student = ["student.model=fasterrcnn_fpn", f"student.params={SIZE}"]
        distpro.search(SEARCH, tmp_path / "run", [*overrides_of(teacher, 2), *student, *more])

    with pytest.raises(distpro.UserError, match="search.horizon: roi_align has no second derivative in PyTorch"):
        run("search.horizon=2", "search.trials=0")
    assert not (tmp_path / "run").exists()
    with pytest.raises(
        distpro.UserError, match="cache: images of several sizes are padded to the largest of their batch"
    ):
        run(f"cache={{folder: {tmp_path / 'cache'}}}")


@pytest.mark.parametrize("config", RETRAINS, ids=lambda path: path.stem)
def test_a_retrain(config, search, teacher, tmp_path):
    schedule = search / "alpha.pt" if config.stem == "raccoon_searched" else None
    overrides = overrides_of(teacher, 2)
    if config.stem in ("raccoon_ghnd", "raccoon_hnd"):
        overrides.append(f"student.checkpoint={teacher / 'student.pt'}")
    result = distpro.retrain(config, schedule, tmp_path / "run", overrides)
    assert result.metrics["step"] == 2 and 0 <= result.metrics["map"] <= 100
    assert all(math.isfinite(value) for value in result.metrics.values())
    found = distpro.evaluate(tmp_path / "run")
    assert found == pytest.approx({name: result.metrics[name] for name in found}, rel=1e-5)
    # a plain checkpoint of the same weights
    plain = distpro.evaluate(tmp_path / "run" / "student.pt", overrides, config=config)
    assert plain == pytest.approx(found, rel=1e-5)


def test_ghnd_trains_its_bottleneck_alone(teacher, tmp_path):
    overrides = [*overrides_of(teacher, 2), f"student.checkpoint={teacher / 'student.pt'}"]
    distpro.retrain(ROOT / "retrain_configs" / "raccoon_ghnd.yaml", None, tmp_path / "run", overrides)
    before, after = load_safely(teacher / "student.pt"), load_safely(tmp_path / "run" / "student.pt")
    outside = {name for name in before if not name.startswith("backbone.body.layer1.")}
    assert all(torch.equal(before[name], after[name]) for name in outside)
    inside = set(after) - outside
    assert inside and all(
        name.startswith(("backbone.body.layer1.encoder.", "backbone.body.layer1.decoder.")) for name in inside
    )
    resumed = tmp_path / "resumed"
    distpro.retrain(ROOT / "retrain_configs" / "raccoon_ghnd.yaml", None, resumed, overrides)
    assert differences(after, load_safely(resumed / "student.pt")) == []


def test_the_student_leaves(search, teacher, tmp_path):
    distpro.retrain(ROOT / "retrain_configs" / "raccoon_none.yaml", None, tmp_path / "run", overrides_of(teacher, 2))
    safetensors = pytest.importorskip("safetensors.torch")
    path = export(tmp_path / "run", "safetensors", tmp_path / "student.safetensors")
    assert differences(safetensors.load_file(path), load_safely(tmp_path / "run" / "student.pt")) == []
    found = distpro.evaluate(path, overrides_of(teacher, 2), config=SEARCH)
    assert found == pytest.approx(distpro.evaluate(tmp_path / "run"), rel=1e-5)


def test_the_student_leaves_as_a_program(search, teacher, tmp_path):
    """pt2 answers as the student does on an image of the size that it was written for, ONNX on images of several sizes."""
    run = tmp_path / "run"
    distpro.retrain(ROOT / "retrain_configs" / "raccoon_none.yaml", None, run, overrides_of(teacher, 2))
    config = read_config(run / "config.yaml")
    data, task = build.build_data(config), build.build_task(config)
    student = build_network(config.student, task.model_arguments(data), load=False).eval()
    load_checkpoint(student, run / "student.pt")
    images = task.call(data.example(4), False).args[0]
    assert len({image.shape for image in images}) > 1
    pt2 = torch.export.load(export(run, "pt2")).module()
    onnx = export(run, "onnx")
    for n, image in enumerate(images):
        with torch.no_grad():
            expected = student([image])[0]
        assert len(expected["boxes"])
        found = answers(onnx, image)
        for key in ("boxes", "scores", "labels"):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-3)  # of pixels
        if n == 0:
            for value, key in zip(pt2(image), ("boxes", "scores", "labels"), strict=True):
                torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-4)


def test_replacing_what_is_not_there_is_refused(teacher, tmp_path, capsys):
    config = str(ROOT / "retrain_configs" / "raccoon_ghnd.yaml")
    for override, message in (
        ("student.replace={backbone.body.layer9: ghnd_bottleneck}", "no module 'backbone.body.layer9'"),
        (
            "student.replace={backbone.body.layer1: ghnd_botleneck}",
            "unknown model 'ghnd_botleneck'; did you mean 'ghnd_bottleneck'",
        ),
        ("student.replace={backbone.body.layer1: {ghnd_bottleneck: {decodr: [3]}}}", "decodr"),
        ("teacher.replace={backbone.body.layer1: ghnd_bottleneck}", "teacher.replace: only a student has one"),
    ):
        overrides = [*overrides_of(teacher, 2), f"student.checkpoint={teacher / 'student.pt'}", override]
        assert main(["retrain", config, *overrides, "--out", str(tmp_path / "run")]) == 2
        assert message in capsys.readouterr().err


def test_a_schedule_runs_no_code_that_replaces_a_module(search):
    from distpro.runs.commands import _code_named_in

    config = read_config(SEARCH, ["student.replace={backbone.body: 'mylab.models:body', head: 'torchvision:resnet18'}"])
    assert _code_named_in(config) == [("student.replace.backbone.body", "mylab.models:body")]
