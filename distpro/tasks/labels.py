"""Labels as a task's loss and metrics take them, checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pathways.registry import UserError


def as_labels(what: str, target: Any) -> Tensor:
    """A batch's class numbers as int64. Raises UserError for what is no tensor of whole numbers."""
    if not isinstance(target, Tensor):
        raise UserError(f"{what}: labels are a tensor of class numbers, got {type(target).__name__}")
    if target.is_floating_point() or target.is_complex() or target.dtype is torch.bool:
        raise UserError(f"{what}: labels are class numbers, got {str(target.dtype).removeprefix('torch.')}")
    return target.long()


def check_range(what: str, labels: Tensor, classes: int, void: int | None = None) -> None:
    """Raise UserError if a label is no class number below ``classes`` and not ``void``. Looked at on the CPU only: elsewhere
    it would wait for the device."""
    if labels.device.type != "cpu" or labels.numel() == 0:
        return
    counted = labels if void is None else labels.masked_fill(labels == void, 0)
    low, high = int(counted.min()), int(counted.max())
    if low < 0 or high >= classes:
        wrong = low if low < 0 else high
        aside = "" if void is None else f", and {void} where a position does not count"
        raise UserError(f"{what}: there is a label {wrong}, but the model's classes are 0 to {classes - 1}{aside}")


def check_smoothing(what: str, value: float) -> float:
    """``label_smoothing`` as it is. Raises UserError unless it is at least 0 and below 1."""
    if not 0 <= value < 1:
        raise UserError(f"{what}: label_smoothing must be at least 0 and below 1, got {value}")
    return value
