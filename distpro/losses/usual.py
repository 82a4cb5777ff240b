"""The usual weight of each loss: the constant beside the task loss in its source, as retrain_configs/methods has it."""

from __future__ import annotations

from collections.abc import Mapping

USUAL: Mapping[str, float] = {
    "afd": 200,
    "at": 1000,
    "cc": 0.02,
    "crd": 0.8,
    "ctkd": 0.9,
    "cwd": 50,
    "deit": 0.5,
    "dist": 1,
    "dist_plus": 2,
    "dkd": 1,
    "dkd_nontarget": 2,
    "dkd_target": 1,
    "ft": 200,
    "hcl": 0.6,
    "hint": 100,
    "ickd": 160,
    "ifvd": 200,
    "kd": 0.9,
    "logit_std": 9,
    "mlkd": 0.9,
    "nst": 50,
    "ofd": 1e-3,
    "pkt": 30000,
    "review": 0.6,
    "semckd": 400,
    "skd": 0.9,
    "sp": 3000,
}
"""Those that are not here have 1, where their source has a weight at all."""


def usual_weight(loss: str) -> float:
    """The weight that a loss usually has; 1 where nothing else is known."""
    return float(USUAL.get(loss, 1.0))
