"""The learning rate in time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FALLING = ("cosine", "linear", "poly")


@dataclass
class LearningRate:
    """Factor on the base learning rate as a function of training progress.

    Args:
        name: ``constant``; ``cosine``, ``linear`` (from the end of the warm-up, as transformers' schedule) and ``poly``
            ((1 − progress)^power), which fall to ``final`` with every step; or ``step``.
        milestones: for ``step``: epochs, or fractions of the training if all are below 1.
        gamma: factor at each milestone.
        warmup_epochs: linear warm-up from zero.
        power: for ``poly`` (0.9 in DeepLab and most of the field's segmentation).
        final: where cosine, linear and poly end.
        cooldown_epochs: for these: epochs at the end that stay there, as timm's and SuperGradients' schedules have.
    """

    name: str = "constant"
    milestones: Sequence[float] = ()
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    power: float = 0.9
    final: float = 0.0
    cooldown_epochs: float = 0.0

    def __call__(self, epoch: float, epochs: float) -> float:
        """Factor at a (fractional) epoch of a training of ``epochs``."""
        factor = 1.0
        falling = max(epochs - self.cooldown_epochs, 1e-12)
        if self.name == "cosine":
            factor = 0.5 * (1 + math.cos(math.pi * min(epoch / falling, 1.0)))
        elif self.name == "linear":
            factor = min(1.0, max(0.0, (falling - epoch) / max(falling - self.warmup_epochs, 1e-12)))
        elif self.name == "poly":
            factor = (1 - min(epoch / falling, 1.0)) ** self.power
        elif self.name == "step":
            in_fractions = all(m < 1 for m in self.milestones)
            reached = [m for m in self.milestones if epoch >= (m * epochs if in_fractions else m)]
            factor = self.gamma ** len(reached)
        if self.final and self.name in FALLING:
            factor = self.final + (1 - self.final) * factor
        return factor * min(1.0, epoch / self.warmup_epochs) if self.warmup_epochs else factor
