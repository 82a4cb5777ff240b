"""Regression: numbers per sample, of images or anything else."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distpro.batch import Batch, stacked_call
from distpro.tasks.labels import check_finite
from distpro.tasks.metrics import OfPairs
from pathways.call import Call
from pathways.registry import UserError, nearest
from pathways.taps import response_of

LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss, "huber": F.huber_loss}
HEADLINES = {"rmse": False, "mae": False, "r2": True}
"""Metrics, and whether the largest is best."""


class Regression:
    """Task of predicting D numbers per sample: ``target`` (N,) or (N, D), the response (N, D), or (N,) of one.

    A response without classes has no probabilities to compare: losses that do are refused; ``l1`` compares responses as numbers.

    Args:
        loss: mse, l1, smooth_l1 or huber, the mean over all numbers.
        outputs: D, which a model's last layer has.
        headline: rmse, mae or r2.
    """

    exclusive = False

    def __init__(self, loss: str = "mse", outputs: int = 1, headline: str = "rmse"):
        for what, value, allowed in (("loss", loss, LOSSES), ("headline", headline, HEADLINES)):
            if value not in allowed:
                raise UserError(
                    f"regression: {what} '{value}'{nearest(value, allowed)} (allowed: {', '.join(allowed)})"
                )
        if outputs < 1:
            raise UserError(f"regression: outputs must be at least 1, got {outputs}")
        self._loss, self.outputs = LOSSES[loss], outputs
        self.headline, self.higher_is_better = headline, HEADLINES[headline]

    def model_arguments(self, data: Any) -> dict[str, Any]:
        return {"num_classes": self.outputs}

    def call(self, batch: Batch, training: bool) -> Call:
        return stacked_call("regression", batch)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return self._loss(*_pair(output, batch))  # type: ignore[operator, no-any-return]

    def response(self, output: Any) -> Tensor | None:
        return response_of(output)

    def labels(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """None: there are no classes."""
        return None, None

    def metrics(self) -> Errors:
        return Errors(self._loss)


def _pair(output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Predictions and targets (N, D). Values are looked at on the CPU only: elsewhere it would wait for the device."""
    response, target = response_of(output), batch.target
    if not isinstance(target, Tensor) or not target.is_floating_point():
        found = str(target.dtype).removeprefix("torch.") if isinstance(target, Tensor) else type(target).__name__
        raise UserError(f"regression: targets are floating-point numbers, got {found}")
    response, target = (x[:, None] if x.dim() == 1 else x for x in (response, target))
    if response.dim() != 2 or response.shape != target.shape:
        raise UserError(
            f"regression: a response {tuple(response.shape)} for targets {tuple(target.shape)}, both are (N, D); the task's outputs?"
        )
    check_finite("regression", target)
    return response, target.to(response.dtype)


class Errors(OfPairs):
    """Mean absolute error, root of the mean squared error, both over all numbers, and the coefficient of determination R², the mean
    over the D numbers (of targets that are all the same: 1 where they are met, else 0); and the mean loss. Every pair is kept, for
    R² is of the whole set; several processes put theirs together first."""

    def __init__(self, loss: Any = F.mse_loss) -> None:
        super().__init__(_pair)
        self._loss = loss

    def measure(self, said: Tensor, true: Tensor) -> dict[str, float]:
        squares = (said - true).square().sum(0)
        spread = (true - true.mean(0)).square().sum(0)
        constant = torch.where(squares == 0, 1.0, 0.0).double()
        determined = torch.where(spread > 0, 1 - squares / torch.where(spread > 0, spread, 1), constant)
        return {
            "mae": (said - true).abs().mean().item(),
            "rmse": (said - true).square().mean().sqrt().item(),
            "r2": determined.mean().item(),
            "loss": self._loss(said, true).item(),
        }
