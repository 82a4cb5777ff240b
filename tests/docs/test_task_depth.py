"""docs/tasks/depth.md: its configs run, on a few small images."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import distpro
from distpro.config.reading import read_config
from distpro.data import DATASETS
from distpro.losses import LOSSES
from distpro.models import build_model
from distpro.models.encoder_decoder import DECODERS
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "tasks" / "depth.md").read_text(encoding="utf-8")
BLOCKS = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
QUICK = ["threads=1", "precision=float32", "training.batch_size=2", "tracking.tensorboard=false"]


def write(root, parts, image, depth):
    """Four rooms' walls a part: brighter is nearer."""
    for part in parts:
        for n in range(4):
            near = np.linspace(0.2, 1, 64 * 64).reshape(64, 64) ** (n + 1)
            for name, values in ((image, (near * 255).astype(np.uint8)), (depth, (1000 / near).astype(np.uint16))):
                path = root / name.format(part=part, n=n)
                path.parent.mkdir(parents=True, exist_ok=True)
                picture = Image.fromarray(values)
                (picture.convert("RGB") if values.dtype == np.uint8 else picture).save(path)


@pytest.mark.slow
def test_a_layout_of_one_s_own_trains(tmp_path):
    write(tmp_path, ("train", "val", "test"), "{part}/room/color_{n}.jpg", "{part}/room/depth_{n}.png")
    overrides = [*QUICK, f"data.root={tmp_path}", "training.max_steps=2"]
    result = distpro.train(BLOCKS[0], tmp_path / "run", overrides)
    assert result.metrics["rmse"] > 0


@pytest.mark.slow
def test_a_search_and_a_retrain_of_its_schedule(tmp_path):
    write(tmp_path / "set", ("train", "test"), "{part}/{n}.jpg", "{part}/{n}.png")
    teacher = build_model(BLOCKS[1]["teacher"]["model"], **BLOCKS[1]["teacher"]["params"])
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    overrides = [*QUICK, f"data.root={tmp_path / 'set'}", f"teacher.checkpoint={tmp_path / 'teacher.pt'}"]
    distpro.search(BLOCKS[1], tmp_path / "search", [*overrides, "training.epochs=2", "search.trials=1"])
    result = distpro.retrain(None, tmp_path / "search" / "alpha.pt", tmp_path / "run", ["retrain.training.epochs=1"])
    assert result.metrics["rmse"] > 0
    assert distpro.evaluate(tmp_path / "run")["rmse"] == pytest.approx(result.metrics["rmse"])


def test_what_the_page_names_is_there():
    for config in BLOCKS:
        read_config(config)
    for line in re.findall(r"`(terms: \[.*?\])`", PAGE):
        assert all(term["loss"] in LOSSES for term in yaml.safe_load(line)["terms"])
    for path in re.findall(r"\b(?:search_configs|retrain_configs)/[\w/]+\.yaml", PAGE):
        assert (ROOT / path).is_file(), path
    assert all(f"`{name}`" in PAGE for name in ("depth", "sevenscenes", "nyuv2") if name in DATASETS)
    assert all(f"`{name}`" in PAGE for name in DECODERS)
