"""Semantic segmentation: cross entropy of pixels, mean intersection over union, pixel accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distpro.batch import Batch, stacked_call
from distpro.tasks.labels import as_labels, check_range, check_smoothing
from distpro.tasks.metrics import METRICS
from distpro.tasks.windows import Views
from pathways.call import Call
from pathways.registry import UserError
from pathways.taps import response_of

VOID = 255
"""Label of pixels that do not count, in every label map here."""


class Segmentation:
    """Task of predicting one of ``num_classes`` labels per pixel: ``target`` (N, H, W) int64, 255 where it is void.

    The response (N, K, h, w) is brought to the target's size by bilinear interpolation where it is smaller. Of a model
    that gives ``{"out": ..., "aux": ...}`` (torchvision's) the auxiliary head's loss is added in training.

    Args:
        aux_weight: of the auxiliary head's loss (0.4 in PSPNet and IFVD; torchvision's own training has 0.5).
        label_smoothing: of the training loss.
        scales, flip, window, stride: how evaluation asks the student, see `Views`; by default each image once, as it is.
    """

    headline = "miou"
    higher_is_better = True
    targets = "maps"

    def __init__(
        self,
        aux_weight: float = 0.4,
        label_smoothing: float = 0.0,
        scales: Sequence[float] = (1.0,),
        flip: bool = False,
        window: int | Sequence[int] | None = None,
        stride: int | Sequence[int] | None = None,
    ):
        self.aux_weight = aux_weight
        self.label_smoothing = check_smoothing("segmentation", label_smoothing)
        self.views = Views.of("segmentation", scales, flip, window, stride)

    def model_arguments(self, data: Any) -> dict[str, Any]:
        return {} if data.num_classes is None else {"num_classes": data.num_classes}

    def call(self, batch: Batch, training: bool) -> Call:
        return stacked_call("segmentation", batch)

    def predict(self, model: nn.Module, batch: Batch) -> Any:
        """What the student says at evaluation: its whole output, or of several views one response (N, K, H, W)."""
        call = self.call(batch, False)
        if self.views.plain:
            return call.run(model)
        if call.sole is None:
            raise UserError("segmentation: scales, flip and windows are of a sole tensor of images (N, C, H, W)")
        return self.views.predict(lambda images: _map(response_of(model(images))), call.sole)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Mean cross entropy over the pixels that count, 0 where none does."""
        target = _target(batch)
        loss = pixel_cross_entropy(response_of(output), target, self.label_smoothing)
        aux = output.get("aux") if isinstance(output, Mapping) else None
        if aux is None or not self.aux_weight:
            return loss
        return loss + self.aux_weight * pixel_cross_entropy(aux, target, self.label_smoothing)

    def response(self, output: Any) -> Tensor | None:
        return response_of(output)

    def labels(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        if batch.target is None:
            return None, None
        target = _target(batch)
        return target, target != VOID

    def rows(self, output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        target = _target(batch)
        response = _at(response_of(output).float(), tuple(target.shape[1:]))
        counts = target != VOID
        return response.movedim(1, -1)[counts], target[counts]

    def metrics(self) -> ConfusionMatrix:
        return ConfusionMatrix(with_loss=True)

    def pictures(self, output: Any, batch: Batch, count: int = 4) -> Tensor | None:
        """For the log: image, labels and prediction of the first samples side by side, uint8 (count, 3, H, 3 W). None where
        the inputs are no images (N, 1 or 3, H, W)."""
        images, target = batch.call.sole, _target(batch)[:count]
        if images is None or images.dim() != 4 or images.shape[1] not in (1, 3):
            return None
        images = images[:count].float().expand(-1, 3, -1, -1)
        low, high = images.amin((1, 2, 3), True), images.amax((1, 2, 3), True)
        shown = (255 * (images - low) / (high - low).clamp(min=1e-6)).byte()
        size = tuple(target.shape[1:])
        predicted = _at(response_of(output)[:count], size).argmax(1)
        colours = palette(256).to(target.device)
        maps = [colours[labels].movedim(-1, 1) for labels in (target, predicted)]
        return torch.cat([F.interpolate(shown, size), *maps], dim=3)


def pixel_cross_entropy(response: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy of dense logits (N, K, h, w) at the size of label maps (N, H, W), over the pixels that count; 0
    where none does."""
    response = _at(response, tuple(target.shape[1:]))
    check_range("segmentation", target, response.shape[1], VOID)
    total = F.cross_entropy(
        response, target, ignore_index=VOID, label_smoothing=label_smoothing, reduction="sum"
    )  # the mean over no pixel would be nan
    return total / (target != VOID).sum().clamp(min=1)


def _map(response: Tensor) -> Tensor:
    if response.dim() != 4:
        raise UserError(f"segmentation needs a response (N, K, H, W), got {tuple(response.shape)}")
    return response


def _at(response: Tensor, size: tuple[int, ...]) -> Tensor:
    """The response at the size of the label maps. Raises UserError for one that is no map."""
    response = _map(response)
    if tuple(response.shape[2:]) == size:
        return response
    (h, w), (height, width) = response.shape[2:], size
    if abs(h * width - w * height) > height + width:  # rounding of strides aside, one shape is the other, scaled
        raise UserError(f"segmentation: a response of {h}x{w} does not fit label maps of {height}x{width}: transposed?")
    return F.interpolate(response, size, mode="bilinear", align_corners=False)


def _target(batch: Batch) -> Tensor:
    """Label maps (N, H, W) int64."""
    target = as_labels("segmentation", batch.target)
    if target.dim() != 3:
        raise UserError(f"segmentation: labels are maps (N, H, W), got {tuple(target.shape)}")
    return target


def palette(count: int) -> Tensor:
    """Colours of labels, uint8 (count, 3), as Pascal VOC draws them; 255 (void) is light grey."""
    labels = torch.arange(count)
    colours = torch.zeros(count, 3, dtype=torch.int64)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((labels >> (3 * bit + channel)) & 1) << (7 - bit)
    if count > VOID:
        colours[VOID] = 224
    return colours.byte()


@METRICS.register("confusion")
class ConfusionMatrix:
    """Mean intersection over union and pixel accuracy, in percent, over all pixels that count; ``with_loss`` the mean
    cross entropy too. A class that is neither in the labels nor in the predictions of the whole set is left out of the mean
    (Everingham et al., Pascal VOC). The matrix stays on the device and is added up over processes."""

    def __init__(self, with_loss: bool = False) -> None:
        self.with_loss = with_loss
        self._matrix: Tensor | None = None  # (K, K) int64: label, prediction
        self._loss: Tensor | None = None

    def update(self, output: Any, batch: Batch) -> None:
        """Take in a batch with ``target`` (N, H, W)."""
        target = _target(batch)
        response = _at(response_of(output).float(), tuple(target.shape[1:]))
        count = response.shape[1]
        check_range("segmentation", target, count, VOID)
        counts = target != VOID
        labels, predicted = target[counts], response.argmax(1)[counts]
        matrix = torch.bincount(labels * count + predicted, minlength=count**2).view(count, count)
        loss = F.cross_entropy(response, target, ignore_index=VOID, reduction="sum").double()
        self._matrix = matrix if self._matrix is None else self._matrix + matrix
        self._loss = loss if self._loss is None else self._loss + loss

    def state(self) -> dict[str, Any]:
        if self._matrix is None or self._loss is None:
            return {}
        return {"matrix": self._matrix.cpu(), "loss": self._loss.cpu()}

    def merge(self, states: Sequence[Any]) -> None:
        known = [state for state in states if state]
        self._matrix = torch.stack([state["matrix"] for state in known]).sum(0) if known else None
        self._loss = torch.stack([state["loss"] for state in known]).sum() if known else None

    def compute(self) -> dict[str, float]:
        if self._matrix is None or self._loss is None:
            return {}
        matrix, pixels = self._matrix.double(), self._matrix.sum()
        if pixels == 0:
            raise UserError("segmentation: every pixel of the evaluation is void (255), there is nothing to measure")
        hits = matrix.diagonal()
        union = matrix.sum(0) + matrix.sum(1) - hits
        seen = union > 0
        found = {
            "miou": 100 * (hits[seen] / union[seen]).mean().item(),
            "pixel_accuracy": 100 * (hits.sum() / pixels).item(),
        }
        return found | ({"loss": (self._loss / pixels).item()} if self.with_loss else {})
