"""Labels as a task's loss and metrics take them, checked."""

from __future__ import annotations

from collections.abc import Sequence
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


def check_finite(what: str, target: Tensor) -> None:
    """Raise UserError for a target that is no finite number. Looked at on the CPU only, as `check_range` does."""
    if target.device.type == "cpu" and not target.isfinite().all():
        raise UserError(f"{what}: there is a target that is no finite number")


def check_smoothing(what: str, value: float) -> float:
    """``label_smoothing`` as it is. Raises UserError unless it is at least 0 and below 1."""
    if not 0 <= value < 1:
        raise UserError(f"{what}: label_smoothing must be at least 0 and below 1, got {value}")
    return value


def check_weights(what: str, weights: Any) -> list[float] | str | None:
    """``class_weights`` as numbers, or ``balanced``, or None. Raises UserError for anything else, and for weights below 0 or that are
    all 0."""
    if weights is None or weights == "balanced":
        return weights  # type: ignore[no-any-return]
    numbers = isinstance(weights, Sequence) and all(
        isinstance(w, (int, float)) and not isinstance(w, bool) and 0 <= w < float("inf") for w in weights
    )
    if isinstance(weights, str) or not numbers or not any(weights):
        raise UserError(f"{what}: class_weights are 'balanced' or a number of at least 0 per class, got {weights!r}")
    return [float(w) for w in weights]


def balanced(what: str, labels: Tensor | None) -> list[float]:
    """N / (K · samples of the class) of labels (N,), K classes that occur; 1 of a class below the largest that does not."""
    if labels is None:
        raise UserError(
            f"{what}: class_weights: balanced counts the training labels, which these data do not have without reading every sample (a "
            "Dataset may have them as `targets`); state the weights"
        )
    counts = torch.bincount(labels.flatten().long()).double()
    occurring = int((counts > 0).sum())
    return torch.where(counts > 0, labels.numel() / (occurring * counts.clamp(min=1)), 1.0).tolist()  # type: ignore[no-any-return]
