"""The pages of docs/tasks: their configs and commands, run one after the other on a tiny sample."""

from __future__ import annotations

import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

from distpro.cli import main
from distpro.models import build_model
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

PAGES = ROOT / "docs" / "tasks"
BLOCK = re.compile(r"```(yaml|sh)\n(.*?)```", re.DOTALL)


def run_page(name, monkeypatch, folder):
    """Write each config that says its file's name, run each command of the page."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DISTPRO_DATA", raising=False)
    ran = 0
    for kind, text in BLOCK.findall((PAGES / name).read_text(encoding="utf-8")):
        if kind == "yaml":
            named = re.match(r"# (\w+\.yaml)\n", text)
            if named:
                (folder / named[1]).write_text(
                    f"threads: 1\nprecision: float32\n{text}" if "base:" not in text else text
                )
            continue
        for line in text.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "distpro"
            assert main(arguments) in (None, 0), line
            ran += 1
    return ran


@pytest.fixture
def squares(tmp_path):
    """`mine`, as the page lays it out: bright squares on dark ground, whose rim is void."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4), ("test", 4)):
        for n in range(count):
            labels = np.zeros((40, 40), np.uint8)
            top, left = rng.integers(0, 20, 2)
            labels[top : top + 18, left : left + 18] = 255
            labels[top + 1 : top + 17, left + 1 : left + 17] = 1
            picture = rng.integers(0, 80, (40, 40, 3)) + 150 * (labels == 1)[..., None]
            for folder, pixels in ((part, picture), (f"{part}annot", labels)):
                (tmp_path / "mine" / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "mine" / folder / f"{n}.png")
    return tmp_path


def test_segmentation(squares, monkeypatch):
    pytest.importorskip("segmentation_models_pytorch")
    assert run_page("segmentation.md", monkeypatch, squares) == 5


def test_vit(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    rng = np.random.default_rng(0)
    parts = {"train": 64, "test": 24}
    images = {f"x_{part}": rng.integers(0, 256, (n, 32, 32, 3), np.uint8) for part, n in parts.items()}
    np.savez(tmp_path / "small.npz", **images, **{f"y_{part}": np.arange(n) % 4 for part, n in parts.items()})
    torch.save(build_model("resnet8", num_classes=4).state_dict(), tmp_path / "teacher.pt")
    assert run_page("vit.md", monkeypatch, tmp_path) == 3
