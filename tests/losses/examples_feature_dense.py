"""Shapes and options with which the conformance tests build the feature-based and dense losses."""

from __future__ import annotations

from typing import Any

_MAPS = {"student_shapes": [(6, 8, 8), (8, 4, 4)], "teacher_shapes": [(8, 8, 8), (12, 4, 4)]}
_SAME = {"student_shapes": [(6, 8, 8), (8, 4, 4)], "teacher_shapes": [(6, 8, 8), (8, 4, 4)]}
_MAP = {"student_shapes": [(6, 4, 4)], "teacher_shapes": [(8, 4, 4)]}

EXAMPLES: dict[str, dict[str, Any]] = {
    "ab": {**_MAPS, "params": {}},
    "afd": {"student_shapes": [(6, 8, 8), (8, 4, 4)], "teacher_shapes": [(8, 8, 8)], "params": {"dim": 8}},
    "at": {**_MAPS, "params": {}},
    "cwd": {**_MAPS, "params": {}},
    "dab": {**_MAPS, "params": {}},
    "ft": {**_MAP, "params": {}},
    "hcl": {**_SAME, "params": {}},
    "hint": {**_MAPS, "params": {}},
    "ickd": {**_MAPS, "params": {}},
    "ifvd": {**_MAP, "params": {"num_classes": 3}},
    "kdsvd": {**_SAME, "params": {}},
    "ktaad": {**_MAP, "params": {}},
    "l1": {**_SAME, "params": {}},
    "l2": {**_MAPS, "params": {}},
    "mgd": {**_MAPS, "params": {}},
    "nst": {**_MAPS, "params": {}},
    "ofd": {**_MAPS, "params": {}},
    "pad_l2": {"student_shapes": [(6,)], "teacher_shapes": [(8,)], "params": {}},
    "review": {
        "student_shapes": [(6, 8, 8), (8, 4, 4), (8, 1, 1)],
        "teacher_shapes": [(8, 8, 8), (12, 4, 4), (12, 1, 1)],
        "params": {},
    },
    "semckd": {**_MAPS, "params": {"batch_size": 4}},
    "simkd": {**_MAP, "params": {}},
    "structured": {**_MAPS, "params": {}},
    "vid": {**_MAPS, "params": {}},
}
