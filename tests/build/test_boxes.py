"""What is refused of boxes before anything is trained: another task's, and taps of which each model chooses the rows itself."""

from __future__ import annotations

import pytest

from distpro import build
from distpro.config.reading import check
from pathways.registry import UserError
from tests.data.test_detection import table  # noqa: F401  # a fixture

SMALL = {"backbone": "mobilenet_v3_small", "channels": 16, "hidden": 16, "min_size": 32, "max_size": 48}


def composed(root, model="fasterrcnn_fpn", task="detection", tap="backbone[0]"):
    given = {
        "task": task,
        "data": {"name": "boxes_csv", "root": str(root), "params": {"test": 2}},
        "teacher": {
            "model": model,
            "params": SMALL if task == "detection" else {},
            "taps": [tap],
            "checkpoint": "none",
        },
        "student": {"model": model, "params": SMALL if task == "detection" else {}, "taps": [tap]},
        "pathways": {"connect": "same", "transforms": ["identity"], "distance": "l2"},
        "training": {"batch_size": 2},
    }
    config = check(given, "here")
    return build.compose(config, build.build_data(config), load=False)


def test_taps_behind_the_regions_are_refused(table):  # noqa: F811
    assert len(composed(table())[1].terms) == 1
    with pytest.raises(
        UserError, match="'roi_heads.box_head' lies behind the regions, of which teacher and student choose"
    ):
        composed(table(), tap="roi_heads.box_head")


def test_a_task_that_knows_nothing_of_boxes_is_refused(table):  # noqa: F811
    with pytest.raises(UserError, match="boxes around objects, of which Classification knows nothing: task: detection"):
        composed(table(), model="resnet8", task="classification", tap="layer1")
