"""Metrics by name, for a config's ``metrics`` beside those of the task, and several as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distpro.batch import Batch
from distpro.task import Metrics
from pathways.registry import Registry, UserError

METRICS = Registry("metric", takes_code=True)


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
