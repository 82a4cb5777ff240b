"""docs/tasks/detection.md, executed on a few drawn images."""

from __future__ import annotations

import re

import numpy as np
import pytest
import yaml
from PIL import Image

import distpro
from distpro.config.reading import merge
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "tasks" / "detection.md").read_text(encoding="utf-8")
SEARCH, REPLACED = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
(TABLE,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
SHORT = {"threads": 1, "training": {"max_steps": 1, "batch_size": 2}, "tracking": {"tensorboard": False}}


@pytest.mark.slow
def test_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raccoons" / "images").mkdir(parents=True)
    header, first, second = TABLE.splitlines()
    rows = [header, first, second]
    noise = np.random.default_rng(0)
    for n in range(1, 13):
        size = (123, 192, 3) if n != 2 else (138, 192, 3)
        Image.fromarray(noise.integers(0, 256, size, np.uint8)).save(f"raccoons/images/raccoon-{n}.jpg")
        rows += [first.replace("raccoon-1.jpg", f"raccoon-{n}.jpg")] if n > 2 else []
    (tmp_path / "raccoons" / "boxes.csv").write_text("\n".join(rows) + "\n")
    config = merge(SEARCH, SHORT)
    teacher = {**config, "student": {k: v for k, v in config["teacher"].items() if k != "checkpoint"}}
    trained = distpro.train({**teacher, "teacher": None, "pathways": None}, "teacher")
    assert trained.metrics.keys() >= {"map", "map50", "map75", "loss"}
    schedule = distpro.search(config, "search")
    assert len(schedule.keys) == 3
    replayed = distpro.retrain(config, "search/alpha.pt", "retrain")
    assert replayed.metrics["step"] == 1
    assert distpro.evaluate("retrain")["map"] == replayed.metrics["map"]
    result = distpro.retrain(merge({**config, "student": {}}, REPLACED), None, "hnd")
    assert result.metrics["step"] == 1
    with pytest.raises(distpro.UserError, match="logits"):
        distpro.retrain({**config, "pathways": None, "terms": [{"loss": "kd", "weight": 1}]}, None, "kd")
