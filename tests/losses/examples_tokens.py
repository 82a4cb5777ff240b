"""Shapes and options with which the conformance tests build the losses of tokens, which no map can stand for. Their configs are
those of the text task."""

from __future__ import annotations

from typing import Any

EXAMPLES: dict[str, dict[str, Any]] = {
    "minilm": {"student_shapes": [(5, 6)] * 3, "teacher_shapes": [(5, 8)] * 3, "params": {"relations": 2}},
    "tinybert": {"student_shapes": [(5, 6)] * 2, "teacher_shapes": [(5, 8)] * 2, "params": {}},
    "tinybert_attention": {
        "student_shapes": [(5, 6)] * 4,
        "teacher_shapes": [(5, 8)] * 4,
        "params": {"heads": [2, 2]},
    },
}
