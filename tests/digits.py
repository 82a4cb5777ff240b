"""A run on scikit-learn's digits that takes a second: 12 steps of ResNet-8, 4 an epoch in a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distpro.config.reading import merge
from distpro.files import save_atomically
from distpro.models import build_model

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


def random_teacher(folder: Path) -> Path:
    """Checkpoint of the settings' teacher, a ResNet-14, with random weights."""
    torch.manual_seed(0)
    path = folder / "teacher.pt"
    save_atomically(build_model("resnet14", num_classes=10).state_dict(), path)
    return path


def settings(teacher: str | Path | None = None, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """A config, with a teacher of the given checkpoint."""
    config = {
        "threads": 1,
        "precision": "float32",  # the same numbers on every machine
        "data": {
            "name": "digits",
            "samples": 100,
            "params": {"image_size": 8},
            "augment": [{"crop": {"padding": 1}}, "flip"],
        },
        "student": {"model": "resnet8"},
        "training": {
            "epochs": 3,
            "batch_size": 20,
            "optimizer": {"lr": 0.05, "momentum": 0.9},
            "learning_rate": {"name": "cosine"},
        },
        "tracking": {"tensorboard": False, "log_every": 3},
    }
    if teacher is not None:
        config |= {
            "teacher": {"model": "resnet14", "checkpoint": str(teacher)},
            "pathways": {"connect": "same", "transforms": ["conv1x1"]},
            "terms": [{"loss": "kd"}],
        }
    return merge(config, changes or {})
