"""What a loader gives and a training step takes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """``x`` (N, C, H, W) inputs, normalised; ``y`` (N,) int64 labels, or (N, K) probabilities where augmentation mixes samples; ``index`` (N,) int64 sample numbers in the set as
    stored, or None. All on one device. With rotations, ``x`` has four rows per sample: plain, 90, 180, 270 degrees."""

    x: Tensor
    y: Tensor
    index: Tensor | None = None  # type: ignore[assignment]  # hides tuple.index, which nobody calls here
