"""Shapes and options with which the conformance tests build the response- and relation-based losses."""

from __future__ import annotations

from typing import Any

import torch

_LOGITS = {"student_shapes": [(5,)], "teacher_shapes": [(5,)], "params": {}}
_EMBEDDINGS = {"student_shapes": [(6,)], "teacher_shapes": [(8,)], "params": {}}
_SAME = {"student_shapes": [(6, 8, 8), (8, 4, 4)], "teacher_shapes": [(6, 8, 8), (8, 4, 4)], "params": {}}

EXAMPLES: dict[str, dict[str, Any]] = {
    "kd": _LOGITS,
    "kd_logits": _LOGITS,
    "dkd": _LOGITS,
    "dkd_target": _LOGITS,
    "dkd_nontarget": _LOGITS,
    "dist": _LOGITS,
    "deit": {**_LOGITS, "params": {"hard": False}},
    "dist_plus": {"student_shapes": [(5,), (6, 4, 4)], "teacher_shapes": [(5,), (6, 4, 4)], "params": {}},
    "tf_kd": _LOGITS,
    "logit_std": _LOGITS,
    "ctkd": _LOGITS,
    "mlkd": _LOGITS,
    "skd": _LOGITS,
    "ls": _LOGITS,
    "ghnd": _SAME,
    "hnd": {"student_shapes": [(6, 4, 4)], "teacher_shapes": [(6, 4, 4)], "params": {}},
    "fsp": _SAME,
    "pkt": _EMBEDDINGS,
    "rkd": _EMBEDDINGS,
    "sp": {"student_shapes": [(6, 4, 4)], "teacher_shapes": [(8, 4, 4)], "params": {}},
    "cc": {**_EMBEDDINGS, "params": {"feat_dim": 7}},
    "crd": {**_EMBEDDINGS, "params": {"n_data": 30, "feat_dim": 7, "nce_k": 9}},
    "sskd": {"student_shapes": [(5,), (6,)], "teacher_shapes": [(5,), (8,)], "params": {}},
    "srrl": {**_EMBEDDINGS, "params": {"classifier": torch.linspace(-1, 1, 24).view(3, 8)}},
    "srd": {"student_shapes": [(5,), (6, 4, 4)], "teacher_shapes": [(5,), (8, 4, 4)], "params": {}},
}
