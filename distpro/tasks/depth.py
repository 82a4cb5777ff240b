"""Monocular depth estimation: absolute error of the pixels that were measured, and the errors that its papers report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distpro.batch import Batch, stacked_call
from distpro.tasks.metrics import METRICS
from pathways.call import Call
from pathways.registry import UserError
from pathways.taps import response_of

DELTA = 1.25
"""Ratio of the threshold accuracies δ_k: below this to the power k."""


class Depth:
    """Task of predicting a distance per pixel: ``target`` (N, H, W) float, in metres, 0 where nothing was measured.

    The response (N, 1, h, w), or (N, h, w), is the depth itself. It is brought to the target's size by bilinear
    interpolation where it has another. The loss is S2D's, the mean absolute error over the pixels that were measured (Ma,
    Karaman: "Sparse-to-Dense", ICRA 2018). Losses that read no classes see measured pixels only (`Task.labels`).
    """

    headline = "rmse"
    higher_is_better = False
    targets = "depths"

    def model_arguments(self, data: Any) -> dict[str, Any]:
        return {"num_classes": 1}

    def call(self, batch: Batch, training: bool) -> Call:
        return stacked_call("depth", batch)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Mean absolute error over the pixels that were measured, in metres; 0 where none was."""
        target = _target(batch)
        measured = target > 0
        error = (_predicted(output, target) - target).abs()
        return error.masked_fill(~measured, 0).sum() / measured.sum().clamp(min=1)

    def response(self, output: Any) -> Tensor | None:
        return _maps(response_of(output))

    def labels(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if batch.target is None else (None, _target(batch) > 0)

    def metrics(self) -> DepthErrors:
        return DepthErrors(with_loss=True)

    def pictures(self, output: Any, batch: Batch, count: int = 4) -> Tensor | None:
        """For the log: image, measured depth and prediction of the first samples side by side, uint8 (count, 3, H, 3 W),
        near is bright, what was not measured is black. None where the inputs are no images (N, 1 or 3, H, W)."""
        images, target = batch.call.sole, _target(batch)[:count]
        if images is None or images.dim() != 4 or images.shape[1] not in (1, 3):
            return None
        shown = _stretched(images[:count].float().expand(-1, 3, -1, -1), (1, 2, 3))
        predicted, measured = _predicted(output, _target(batch))[:count], target > 0
        far = target.amax((1, 2), True).clamp(min=1e-6)
        near = target.masked_fill(~measured, float("inf")).amin((1, 2), True).minimum(far)
        grey = [
            255 - 223 * ((depth - near) / (far - near).clamp(min=1e-6)).clamp(0, 1) for depth in (target, predicted)
        ]
        grey[0] = grey[0].masked_fill(~measured, 0)
        maps = [depth.byte().unsqueeze(1).expand(-1, 3, -1, -1) for depth in grey]
        return torch.cat([F.interpolate(shown, tuple(target.shape[1:])), *maps], dim=3)


def _stretched(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    low, high = x.amin(dims, True), x.amax(dims, True)
    return (255 * (x - low) / (high - low).clamp(min=1e-6)).byte()


def _maps(response: Tensor) -> Tensor:
    """The response as (N, 1, h, w). Raises UserError for one that is no depth map."""
    maps = response.unsqueeze(1) if response.dim() == 3 else response
    if maps.dim() != 4 or maps.shape[1] != 1:
        raise UserError(f"depth needs a response (N, 1, H, W) or (N, H, W), got {tuple(response.shape)}")
    return maps


def _predicted(output: Any, target: Tensor) -> Tensor:
    """Predicted depth (N, H, W) at the target's size."""
    maps, size = _maps(response_of(output)), tuple(target.shape[1:])
    if len(maps) != len(target):
        raise UserError(f"depth: {len(maps)} predictions for {len(target)} depth maps")
    if tuple(maps.shape[2:]) == size:
        return maps[:, 0]
    (h, w), (height, width) = maps.shape[2:], size
    if abs(h * width - w * height) > height + width:  # rounding of strides aside, one shape is the other, scaled
        raise UserError(f"depth: a response of {h}x{w} does not fit depth maps of {height}x{width}: transposed?")
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)[:, 0]


def _target(batch: Batch) -> Tensor:
    """Depth maps (N, H, W) float. Values are looked at on the CPU only: elsewhere it would wait for the device."""
    target = batch.target
    if not isinstance(target, Tensor) or not target.is_floating_point():
        found = str(target.dtype).removeprefix("torch.") if isinstance(target, Tensor) else type(target).__name__
        raise UserError(f"depth: targets are floating-point maps in metres, got {found}")
    if target.dim() == 4 and target.shape[1] == 1:
        target = target[:, 0]
    if target.dim() != 3:
        raise UserError(f"depth: targets are maps (N, H, W), got {tuple(target.shape)}")
    if target.device.type == "cpu":
        wrong = target[~((target >= 0) & (target < float("inf")))]  # NaN is neither
        if len(wrong):
            raise UserError(
                f"depth: there is a target of {wrong[0].item():g}; allowed: 0 (not measured) and above, finite"
            )
    return target


@METRICS.register("depth_errors")
class DepthErrors:
    """Root mean square error in metres, absolute relative error and threshold accuracies, of the pixels that were measured.

        rmse = sqrt(mean (p - t)^2)    absrel = mean |p - t| / t    delta_k = share of max(p / t, t / p) < 1.25^k, percent

    Each is computed image by image and averaged over the images that have any measurement, as S2D's evaluation does, whose
    batches are single images; ``with_loss`` the mean absolute error over all pixels of the set too. Departure: a prediction
    of 0 or less is never within a threshold; S2D's ratio of two numbers of unlike sign is. Sums stay on the device and are
    added up over processes."""

    def __init__(self, with_loss: bool = False) -> None:
        self.with_loss = with_loss
        self._sums: Tensor | None = None  # of NAMES over images, then images, absolute errors, pixels: float64

    NAMES = ("rmse", "absrel", "delta1", "delta2", "delta3")

    def update(self, output: Any, batch: Batch) -> None:
        """Take in a batch with ``target`` (N, H, W)."""
        target = _target(batch)
        predicted, measured = _predicted(output, target).double(), target > 0
        target = target.double()
        pixels = measured.sum((1, 2))
        safe = target.masked_fill(~measured, 1)
        error = (predicted - safe).abs().masked_fill(~measured, 0)
        positive = predicted.clamp(min=0)
        ratio = torch.maximum(positive / safe, safe / positive)  # of a prediction of 0: infinite
        within = [100.0 * (measured & (ratio < DELTA**k)) for k in (1, 2, 3)]
        parts = [error.square(), error / safe, *within]
        means = torch.stack([part.sum((1, 2)) for part in parts]) / pixels.clamp(min=1)
        means[0] = means[0].sqrt()
        sums = torch.cat([means.sum(1), torch.stack([(pixels > 0).sum(), error.sum(), pixels.sum()])])
        self._sums = sums if self._sums is None else self._sums + sums

    def state(self) -> dict[str, Any]:
        return {} if self._sums is None else {"sums": self._sums.cpu()}

    def merge(self, states: Sequence[Any]) -> None:
        known = [state["sums"] for state in states if state]
        self._sums = torch.stack(known).sum(0) if known else None

    def compute(self) -> dict[str, float]:
        if self._sums is None:
            return {}
        *sums, images, error, pixels = self._sums.tolist()
        if not images:
            raise UserError(
                "depth: no pixel of the evaluation was measured (all are 0), there is nothing to compare with"
            )
        found = {name: value / images for name, value in zip(self.NAMES, sums, strict=True)}
        return found | ({"loss": error / pixels} if self.with_loss else {})
