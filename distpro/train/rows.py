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
        weights: of the terms, (N,), at each step.
        parts: of the task loss, of each pass, where the task has them.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """A new row."""
        self.losses: list[Tensor] = []
        self.weights: list[Sequence[float] | Tensor] = []
        self.parts: list[dict[str, Tensor]] = []
        self.samples = 0
        self.go_on()

    def go_on(self) -> None:
        """From now on the time counts again."""
        self._since = time.perf_counter()

    def add(self, done: TrainingPass, samples: int) -> None:
        """A step, and the samples of this process in it."""
        self.losses.append(torch.cat([done.task.reshape(1), done.terms]))
        self.weights.append(done.weights)
        self.samples += samples

    def means(self) -> tuple[Tensor, dict[str, float]]:
        """Losses (steps, 1 + N), and means of the parts by ``train/<part>``, over all processes."""
        losses = torch.stack(self.losses)
        distributed.average([losses])
        names = list(self.parts[0]) if self.parts else []
        parts = {name: torch.stack([p[name].float() for p in self.parts]).mean() for name in names}
        distributed.average(parts.values())
        return losses.cpu(), {f"train/{name}": mean.item() for name, mean in parts.items()}

    def terms(self, keys: Sequence[str], losses: Tensor) -> dict[str, float]:
        """What there is to say of each term, ``losses`` (steps, 1 + N) being those of `means`:

        - ``weight/<key>``: what its loss was multiplied by in the last step.
        - ``term/<key>``: mean of its loss before the weight, over the steps that have computed it.
        - ``weighted/<key>``: mean over all steps of weight × loss: its part of the training's mean loss.

        A term that no step has computed, for its weight was 0, has no loss.
        """
        tensors = [row for row in self.weights if isinstance(row, Tensor)]
        fetched = iter(torch.stack(tensors).tolist() if tensors else ())  # one look at the device
        rows = [next(fetched) if isinstance(row, Tensor) else row for row in self.weights]
        weights, raw = torch.tensor(rows, dtype=torch.float64), losses[:, 1:].double()
        counts = ((weights != 0) | (raw != 0)).sum(0)
        term, weighted = raw.sum(0) / counts, (weights * raw).mean(0)
        computed = [(n, key) for n, key in enumerate(keys) if counts[n]]
        values = {f"term/{key}": term[n].item() for n, key in computed}
        values |= {f"weight/{key}": weights[-1, n].item() for n, key in enumerate(keys)}
        return values | {f"weighted/{key}": weighted[n].item() for n, key in computed}

    def rate(self) -> float:
        """Samples a second, of all processes."""
        return self.samples * distributed.world_size() / (time.perf_counter() - self._since)

    def share(self) -> None:
        """Make every process's row the mean of all."""
        distributed.average(self.losses)
        distributed.average(value for parts in self.parts for value in parts.values())

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "used_weights": self.weights, "parts": self.parts}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        losses: Sequence[Tensor] = state["losses"] if "used_weights" in state else ()  # not in checkpoints of before
        self.losses = [loss.to(device) for loss in losses]
        self.weights = [w.to(device) if isinstance(w, Tensor) else w for w in state.get("used_weights", ())]
        self.parts = [{n: value.to(device) for n, value in parts.items()} for parts in state.get("parts", [])]
