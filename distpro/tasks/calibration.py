"""What a model knows, however sure of it it is: its cross entropy at the temperature at which that is smallest.

Distillation changes how sure a student is: a strong soft target leaves it overconfident or timid, and its cross entropy on held-out
samples rises while its accuracy does too. One temperature for all samples changes no prediction (Guo et al. 2017, temperature
scaling); at the best one, the cross entropy is a smooth measure that goes with accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distpro.batch import Batch

LOG_RANGE = 4.0  # of 1 / temperature, to both sides of 1: a factor of 55
GOLDEN = (5**0.5 - 1) / 2
ENOUGH = 2048
"""Positions of a sample that the temperature is found by; of a larger map, every few pixels."""

Rows = Callable[[Any, Batch], tuple[Tensor, Tensor]]
"""A task's ``rows(output, batch)``: logits (P, K) of all positions that count, and their labels (P,) or probabilities (P, K)."""


def calibrated_loss(logits: Tensor, target: Tensor, average: Callable[[Tensor], Tensor] = lambda loss: loss) -> Tensor:
    """The mean cross entropy of logits (P, K) at their best temperature, a scalar; 0 of no positions.

    The gradient by the logits is that at the temperature held fixed: at its optimum it moves nothing (envelope theorem).

    Args:
        average: of a scalar over several processes that each have a part of the positions, so that all take one temperature.
    """
    logits = logits.float()

    def loss(inverse: float) -> Tensor:
        return F.cross_entropy(inverse * logits, target) if len(logits) else logits.sum()

    with torch.no_grad():
        inverse = _smallest(lambda x: average(loss(x)))
    return loss(inverse)


def _smallest(loss: Callable[[float], Tensor], steps: int = 16) -> float:
    """1 / T at which a loss that is convex in it is smallest, by golden section in its logarithm, to 0.4 %."""
    low, high = -LOG_RANGE, LOG_RANGE
    inner = [high - GOLDEN * (high - low), low + GOLDEN * (high - low)]
    values = [loss(math.exp(x)).item() for x in inner]
    for _ in range(steps):
        if values[0] <= values[1]:
            high, inner, values = inner[1], [0.0, inner[0]], [0.0, values[0]]
            inner[0] = high - GOLDEN * (high - low)
            values[0] = loss(math.exp(inner[0])).item()
        else:
            low, inner, values = inner[0], [inner[1], 0.0], [values[1], 0.0]
            inner[1] = low + GOLDEN * (high - low)
            values[1] = loss(math.exp(inner[1])).item()
    return math.exp((low + high) / 2)


def _thinned(logits: Tensor, target: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Every k-th position, about ``most`` of them. k is odd: the sides of maps are even, and these would be whole columns."""
    step = -(-len(logits) // most) | 1 if len(logits) > most else 1
    return logits[::step], target[::step]


class CalibratedLoss:
    """`calibrated_loss` of a whole evaluation, as a metric: the cross entropy is summed up at each of a row of temperatures, and
    a parabola through the smallest and its neighbours says how small it gets. Of a dense response some `ENOUGH` positions a
    sample take part.

    Args:
        rows: of the task.
    """

    def __init__(self, rows: Rows):
        self._rows = rows
        self._inverse = torch.linspace(-LOG_RANGE, LOG_RANGE, 41, dtype=torch.float64).exp()
        self._sums, self._count = torch.zeros(len(self._inverse), dtype=torch.float64), 0

    def update(self, output: Any, batch: Batch) -> None:
        """Take in a batch."""
        logits, target = self._rows(output, batch)
        logits, target = _thinned(logits.float(), target, ENOUGH * batch.samples)
        losses = [F.cross_entropy(x * logits, target, reduction="sum") for x in self._inverse.tolist()]
        self._sums = self._sums.to(logits.device) + torch.stack(losses).double()  # read only at the end
        self._count += len(logits)

    def state(self) -> Any:
        return {"sums": self._sums.cpu(), "count": self._count}

    def merge(self, states: Sequence[Any]) -> None:
        self._sums = torch.stack([state["sums"] for state in states]).sum(0)
        self._count = sum(state["count"] for state in states)

    def compute(self) -> dict[str, float]:
        """``calibrated_loss``; nothing of no positions."""
        if not self._count:
            return {}
        losses = (self._sums / self._count).tolist()
        n = min(range(1, len(losses) - 1), key=losses.__getitem__)
        left, middle, right = losses[n - 1 : n + 2]
        curvature = left - 2 * middle + right
        lower = (left - right) ** 2 / (8 * curvature) if curvature > 0 and middle <= min(left, right) else 0.0
        return {"calibrated_loss": min(losses) - lower}
