"""Metrics by name, for a config's ``metrics`` beside those of the task, and several as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distpro.batch import Batch
from distpro.task import Metrics
from pathways.registry import Registry, UserError

METRICS = Registry("metric", takes_code=True)


class OfPairs:
    """Metrics of all predictions and targets of a set together, such as ranks. Every pair is kept, in float64; several processes put
    theirs together first. A subclass says what is measured.

    Args:
        pair: (output, batch) → predictions and targets of one shape, (N,) or (N, D).
    """

    def __init__(self, pair: Callable[[Any, Batch], tuple[Tensor, Tensor]]):
        self._pair = pair
        self._pairs: list[Tensor] = []  # (2, N, ...)

    def update(self, output: Any, batch: Batch) -> None:
        self._pairs.append(torch.stack(self._pair(output, batch)).double())

    def state(self) -> dict[str, Any]:
        return {"pairs": torch.cat(self._pairs, 1).cpu()} if self._pairs else {}

    def merge(self, states: Sequence[Any]) -> None:
        self._pairs = [state["pairs"] for state in states if state]

    def compute(self) -> dict[str, float]:
        return self.measure(*torch.cat([pair.cpu() for pair in self._pairs], 1)) if self._pairs else {}

    def measure(self, said: Tensor, true: Tensor) -> dict[str, float]:
        """Metrics by name, of all predictions and targets, float64 on the CPU."""
        raise NotImplementedError


class Together:
    """Several metrics as one. Raises UserError, in `compute`, where two have one name."""

    def __init__(self, parts: Sequence[Metrics]):
        self.parts = list(parts)

    def update(self, output: Any, batch: Batch) -> None:
        for part in self.parts:
            part.update(output, batch)

    def state(self) -> list[Any]:
        return [part.state() for part in self.parts]

    def merge(self, states: Sequence[Any]) -> None:
        for n, part in enumerate(self.parts):
            part.merge([state[n] for state in states])

    def compute(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for part in self.parts:
            values = part.compute()
            twice = found.keys() & values.keys()
            if twice:
                raise UserError(f"metrics: two give '{min(twice)}'")
            found |= values
        return found
