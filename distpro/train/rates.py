"""The learning rate in time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class LearningRate:
    """Factor on the base learning rate as a function of training progress.

    Args:
        name: ``constant``, ``cosine`` (to zero, per step), ``linear`` (from the end of the warm-up to zero, per step, as
            transformers' schedule), ``poly`` ((1 − progress)^power, per step) or ``step``.
        milestones: for ``step``: epochs, or fractions of the training if all are below 1.
        gamma: factor at each milestone.
        warmup_epochs: linear warm-up from zero.
        power: for ``poly`` (0.9 in DeepLab and most of the field's segmentation).
    """

    name: str = "constant"
    milestones: Sequence[float] = ()
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    power: float = 0.9

    def __call__(self, epoch: float, epochs: float) -> float:
        """Factor at a (fractional) epoch of a training of ``epochs``."""
        factor = 1.0
        if self.name == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * min(epoch / epochs, 1.0)))
        elif self.name == "linear":
            factor = min(1.0, max(0.0, (epochs - epoch) / max(epochs - self.warmup_epochs, 1e-12)))
        elif self.name == "poly":
            factor = (1 - min(epoch / epochs, 1.0)) ** self.power
        elif self.name == "step":
            in_fractions = all(m < 1 for m in self.milestones)
            reached = [m for m in self.milestones if epoch >= (m * epochs if in_fractions else m)]
            factor = self.gamma ** len(reached)
        return factor * min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs else factor
