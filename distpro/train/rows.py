"""What the steps since the last row of a training's log came to."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distpro.features import TrainingPass
from distpro.train import distributed


class Row:
    """Losses and counts of some steps; they stay on the device until the row is written.

    Attributes:
        losses: (1 + N,) of each step: the task's and the terms'.
        parts: of the task loss, of each pass, where the task has them.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """A new row."""
        self.losses: list[Tensor] = []
        self.parts: list[dict[str, Tensor]] = []
        self.samples = 0
        self.go_on()

    def go_on(self) -> None:
        """From now on the time counts again."""
        self._since = time.perf_counter()

    def add(self, done: TrainingPass, samples: int) -> None:
        """A step, and the samples of this process in it."""
        self.losses.append(torch.cat([done.task.reshape(1), done.terms]))
        self.samples += samples

    def means(self) -> tuple[Tensor, list[float], dict[str, float]]:
        """Losses (steps, 1 + N), their means, and means of the parts by ``train/<part>``, over the steps and all processes."""
        losses = torch.stack(self.losses)
        distributed.average([losses])
        names = list(self.parts[0]) if self.parts else []
        parts = {name: torch.stack([p[name].float() for p in self.parts]).mean() for name in names}
        distributed.average(parts.values())
        return losses, losses.mean(0).tolist(), {f"train/{name}": mean.item() for name, mean in parts.items()}

    def rate(self) -> float:
        """Samples a second, of all processes."""
        return self.samples * distributed.world_size() / (time.perf_counter() - self._since)

    def share(self) -> None:
        """Make every process's row the mean of all."""
        distributed.average(self.losses)
        distributed.average(value for parts in self.parts for value in parts.values())

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "parts": self.parts}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        losses: Sequence[Tensor] = state["losses"]
        self.losses = [loss.to(device) for loss in losses]
        self.parts = [{n: value.to(device) for n, value in parts.items()} for parts in state.get("parts", [])]
