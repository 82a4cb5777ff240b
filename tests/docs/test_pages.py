"""The tutorial and the how-tos, run as they stand on a few small images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from distpro.files import save_atomically
from distpro.models import build_model
from tests.conftest import ROOT
from tests.docs.pages import SHORT, at, blocks_of, installed, run_page  # noqa: F401  # a fixture too

DOCS = ROOT / "docs"
FEW = [*SHORT, "training.max_steps=2"]


def coloured(count, seed):
    """Noise (N, 32, 32, 3) uint8 of four classes, each brighter in another place, and labels (N,)."""
    draw = np.random.default_rng(seed)
    images, labels = draw.integers(0, 120, (count, 32, 32, 3), np.uint8), np.arange(count) % 4
    for image, label in zip(images, labels, strict=True):
        image[16 * (label // 2) :, 16 * (label % 2) :][:16, :16] += 120
    return images, labels


@pytest.fixture
def arrays(at):  # noqa: F811
    """images.npz of 48 and 24 images."""
    parts = {}
    for seed, (part, count) in enumerate((("train", 48), ("test", 24))):
        parts[f"x_{part}"], parts[f"y_{part}"] = coloured(count, seed)
    np.savez("images.npz", **parts)
    return at


@pytest.mark.slow
def test_the_tutorial(at):  # noqa: F811
    for part, count in (("train", 32), ("test", 8)):
        for number, (image, label) in enumerate(zip(*coloured(count, count), strict=True)):
            folder = at / "photos" / part / ("cat", "dog", "fox", "owl")[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number}.png")
    ran = run_page(DOCS / "tutorial.md", [*FEW, "training.epochs=1"], optional=("onnx",), trials=["student.yaml"])
    assert ran == 11 + installed("onnx") and (at / "runs/search/alpha.png").is_file()
    assert (at / "student.onnx").is_file() == installed("onnx")


def model_of(at):  # noqa: F811
    """The teacher that the page on models names."""
    names = {}
    exec(next(text for language, text in blocks_of(DOCS / "howto/model.md") if language == "python"), names)
    save_atomically(names["small"](16, 4).state_dict(), at / "teacher.pt")


@pytest.mark.slow
def test_own_model(arrays):
    model_of(arrays)
    assert run_page(DOCS / "howto/model.md") == 4


@pytest.mark.slow
def test_own_data(arrays):
    assert run_page(DOCS / "howto/data.md", FEW) == 3


@pytest.mark.slow
def test_schedules(arrays):
    torch.manual_seed(0)
    save_atomically(build_model("resnet14", num_classes=4).state_dict(), arrays / "teacher.pt")
    assert run_page(DOCS / "howto/schedules.md", FEW, trials=["horizon.yaml"]) == 13


@pytest.mark.slow
def test_resume(arrays):
    assert run_page(DOCS / "howto/resume.md", SHORT) == 2


@pytest.mark.slow
def test_processes(arrays):
    run_page(DOCS / "howto/processes.md")


def test_own_loop(at):  # noqa: F811
    ran = run_page(DOCS / "howto/loop.md", optional=("lightning", "accelerate"))
    assert ran == 1 + installed("lightning") + installed("accelerate")
    assert (at / "student.pt").is_file()
    if not installed("lightning"):
        pytest.skip("the loops of PyTorch and accelerate ran; Lightning is not installed")
