"""The README's examples run."""

from __future__ import annotations

import re

import pytest
import torch
import yaml

import distpro
from distpro.config.reading import read_config
from distpro.models import build_model
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language, number=0):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)[number]


def test_the_config_is_valid():
    config = read_config(yaml.safe_load(block("yaml")))
    assert config.pathways is not None and config.training.epochs == 40


def test_the_training_loop_runs_and_the_schedule_drives_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = [f"layer{i}:pre_relu<-layer{j}@conv1x1" for i in (1, 2) for j in (1, 2)]
    levels = torch.tensor([[i, j, 1] for i in (1, 2) for j in (1, 2)])
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]])
    distpro.Schedule(tuple(keys), levels, torch.ones(2, 4), weights, ("conv1x1",) * 4).save("alpha.pt")
    x = torch.randn(4, 3, 16, 16)
    names = {
        "teacher": build_model("resnet14", num_classes=5).eval(),
        "student": build_model("resnet8", num_classes=5),
        "x": x,
        "loader": [None] * 2,
        "epochs": 1,
        "batches": [(x, torch.tensor([0, 1, 2, 3]))] * 2,
    }
    exec(block("python"), names)
    parts, loss = names["parts"], names["loss"]
    expected = parts["task"] + sum(w * parts[key] for w, key in zip(weights[1].tolist(), keys, strict=True))
    assert torch.allclose(loss, expected)
    assert all(p.grad is not None for p in names["objective"].trainable_parameters())


def test_the_commands_exist(capsys):
    from distpro.cli import main

    for command in set(re.findall(r"^ {4}distpro (\w+)", README, re.MULTILINE)):
        try:
            main([command, "--help"])
        except SystemExit as end:
            assert end.code == 0
        assert command in capsys.readouterr().out
    for path in set(re.findall(r"\b(?:search_configs|retrain_configs|docs|tools|distpro)/[\w/.]+\.\w+", README)):
        assert (ROOT / path).exists(), path


@pytest.mark.slow
def test_own_data_and_models_run_as_objects(tmp_path, monkeypatch):
    """The block on data and models of one's own, with a config of a few steps."""
    monkeypatch.chdir(tmp_path)
    config = {"training": {"max_steps": 4, "batch_size": 8}, "tracking": {"tensorboard": False}}
    terms = [{"loss": "kd"}, {"loss": "l2", "student_taps": ["0"], "teacher_taps": ["0"]}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "terms": terms}))

    class MyDataset(torch.utils.data.Dataset):
        def __init__(self, part):
            generator = torch.Generator().manual_seed(len(part))
            self.x, self.y = torch.randn(40, 6, generator=generator), torch.arange(40) % 3

        def __len__(self):
            return len(self.x)

        def __getitem__(self, n):
            return self.x[n], self.y[n]

    teacher, student = (torch.nn.Sequential(torch.nn.Linear(6, n), torch.nn.Linear(n, 3)) for n in (8, 5))
    names = {"MyDataset": MyDataset, "teacher": teacher, "student": student, "distpro": distpro}
    exec(block("python", 1), names)
    assert names["schedule"].keys == ("kd", "l2") and names["result"].metrics["accuracy"] >= 0
