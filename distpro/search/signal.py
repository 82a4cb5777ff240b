"""What a search's gradients said of each entry: in which direction, how steadily, and whether that is more than noise."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class Signal:
    """Mean and spread of a gradient (N,) over updates, and how often each entry's sign was that of its mean.

    Sums stay on the device: an update is not waited for.

    Args:
        count: N.
        device: of the gradients.
    """

    def __init__(self, count: int, device: torch.device | None = None):
        self.updates = 0
        self.sums = torch.zeros(3, count, dtype=torch.float64, device=device)  # of g, g², sign g

    @torch.no_grad()
    def add(self, gradient: Tensor) -> None:
        """One update's."""
        g = gradient.double()
        self.sums += torch.stack([g, g.square(), g.sign()])
        self.updates += 1

    def rows(self) -> list[dict[str, float]]:
        """Per entry ``mean``; ``spread``, the standard deviation (0 of one update); ``held``, the share of updates whose sign
        was the more frequent one; nothing before the first update."""
        n = self.updates
        if n == 0:
            return []
        total, squares, signs = self.sums.cpu()
        mean = total / n
        variance = (squares / n - mean.square()).clamp(min=0) * (n / max(1, n - 1))
        held = (1 + signs.abs() / n) / 2
        columns = (mean.tolist(), variance.sqrt().tolist(), held.tolist())
        return [{"mean": m, "spread": s, "held": h} for m, s, h in zip(*columns, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "sums": self.sums.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        self.sums.copy_(state["sums"])


def is_signal(mean: float, spread: float, updates: int) -> bool:
    """Whether a mean over updates is more than two of its standard errors. Of one update nothing can be said."""
    return updates > 1 and abs(mean) > 2 * spread / math.sqrt(updates)
