"""What a loader gives and a training step takes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """One batch of samples, all tensors on one device.

    ``x`` (N, C, H, W) inputs, normalised; with rotations four rows per sample: plain, 90, 180, 270 degrees. ``y`` (N,)
    int64 labels, or (N, K) probabilities where augmentation mixes samples. ``index`` (N,) int64 sample numbers in the
    set as stored, or None.
    """

    x: Tensor
    y: Tensor
    index: Tensor | None = None  # type: ignore[assignment]  # hides tuple.index, which nobody calls here
