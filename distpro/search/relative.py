"""Steps of a given size, whatever the unit of the gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class RelativeStep(torch.optim.Optimizer):
    """θ ← θ − lr · m / max(‖m‖_∞, floor), m the moving average of the gradient.

    The entry whose gradient is largest in its group moves by ``lr``, the others in proportion; where all gradients are below
    ``floor`` (noise), all move less. On log-weights, ``lr`` 1 changes the most telling weight by a factor e.

    Args:
        params: as of any optimiser.
        lr: size of a step.
        momentum: share of the past in m.
        floor: size of a gradient that is no signal; of log-weights, in units of the validation loss.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 1.0, momentum: float = 0.5, floor: float = 0.002):
        super().__init__(params, {"lr": lr, "momentum": momentum, "floor": floor})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step on the gradients that there are."""
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            means = [self.state[p].setdefault("mean", torch.zeros_like(p)) for p in moving]
            for p, mean in zip(moving, means, strict=True):
                mean.lerp_(p.grad, 1 - group["momentum"])
            if means:
                largest = torch.stack([mean.abs().max() for mean in means]).max()
                for p, mean in zip(moving, means, strict=True):
                    p.sub_(mean * (group["lr"] / largest.clamp(min=group["floor"])))
