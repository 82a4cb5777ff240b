"""Runs with parts of somebody's own (tests/spirals.py), for the tests."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from distpro.config.reading import merge

SOURCE = Path(__file__).with_name("spirals.py").read_text(encoding="utf-8")


def module_of(own, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module(own)


def plain(changes=None):
    """What a config says beside the parts."""
    taps = ["first", "second"]
    config = {
        "threads": 1,
        "precision": "float32",
        "student": {"model": "given", "taps": taps},
        "teacher": {"model": "given", "taps": taps},
        "terms": [{"loss": "kd"}, {"loss": "l2", "student_taps": ["second"], "teacher_taps": ["second"]}],
        "training": {"epochs": 3, "batch_size": 10, "optimizer": {"lr": 0.1}, "learning_rate": {"name": "constant"}},
        "tracking": {"tensorboard": False, "log_every": 2},
    }
    return merge(config, changes or {})


def teacher_of(module):
    torch.manual_seed(5)
    return module.Net(8)


def student_of(module):
    torch.manual_seed(0)
    return module.Net()


def by_name(own, module, data="parts", changes=None):
    """The config that names every part."""
    torch.save(teacher_of(module).state_dict(), "teacher.pt")
    named = {
        "data": {"name": f"{own}:{data}"},
        "task": {f"{own}:Margin": {"margin": 0.5}},
        "metrics": [{f"{own}:Hits": {"scale": 100}}],
        "teacher": {"model": f"{own}:Net", "params": {"width": 8}, "checkpoint": "teacher.pt"},
        "student": {"model": f"{own}:Net"},
        # no fused or known formula: a search needs one whose derivative is known, a retrain takes any
        "retrain": {"training": {"optimizer": {"name": f"{own}:Signs", "lr": 0.01, "params": {"decay": 0.25}}}},
    }
    return plain(merge(named, changes or {}))
