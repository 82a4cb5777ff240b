"""Classification: cross entropy, top-1 and top-5 accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distpro.batch import Batch, stacked_call
from distpro.tasks.labels import as_labels, balanced, check_range, check_smoothing, check_weights
from pathways.call import Call
from pathways.registry import UserError
from pathways.taps import response_of


class Classification:
    """Task of predicting one of ``num_classes`` labels: ``target`` (N,) int64, or (N, K) probabilities.

    Args:
        label_smoothing: of the training loss; evaluation uses the plain cross entropy.
        class_weights: likewise, a factor per class on its samples' share of the mean, as of `torch.nn.CrossEntropyLoss` (in several
            processes of each one's part), or ``balanced``: N / (K · samples of the class) of the training part, as scikit-learn's.
    """

    headline = "accuracy"
    higher_is_better = True

    def __init__(self, label_smoothing: float = 0.0, class_weights: Sequence[float] | str | None = None):
        self.label_smoothing = check_smoothing("classification", label_smoothing)
        self.class_weights = check_weights("classification", class_weights)
        self._numbers = None if isinstance(self.class_weights, str) else self.class_weights
        self._weights: dict[torch.device, Tensor] = {}

    def model_arguments(self, data: Any) -> dict[str, Any]:
        if getattr(data, "vocabulary", None) is not None and type(self) is Classification:
            raise UserError(
                "task 'classification': the data are texts, whose padding it would not leave out: task: text"
            )
        if data.num_classes == 1:
            raise UserError("the data have one class: a single answer is always right, and nothing is learned")
        return {} if data.num_classes is None else {"num_classes": data.num_classes}

    def prepare(self, labels: Tensor | None) -> None:
        """Take in the labels of the training part, (N,) int64, None where they are not known. Raises UserError where balanced
        weights need them."""
        if self.class_weights == "balanced":
            self._numbers, self._weights = balanced("classification", labels), {}

    def call(self, batch: Batch, training: bool) -> Call:
        return stacked_call("classification", batch)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """Mean cross entropy of the response (N, K)."""
        response, target = response_of(output), _target(batch)
        fitting = response.shape if target.is_floating_point() else response.shape[:1]
        if response.dim() != 2 or target.shape not in (response.shape[:1], fitting):
            raise UserError(
                f"classification needs a row of classes and one label per sample, got a response {tuple(response.shape)} "
                f"and targets {tuple(target.shape)}; another task?"
            )
        if target.dim() == 1:
            check_range("classification", target, response.shape[1])
        return F.cross_entropy(response, target, self._weights_of(response), label_smoothing=self.label_smoothing)

    def _weights_of(self, response: Tensor) -> Tensor | None:
        """On the response's device. Raises UserError where they are not one per class."""
        if self._numbers is None:
            return None
        unseen = response.shape[1] - len(self._numbers)
        if self.class_weights == "balanced" and unseen > 0:
            self._numbers = self._numbers + [1.0] * unseen
        elif unseen:
            raise UserError(
                f"classification: {len(self._numbers)} class_weights for a response of {response.shape[1]} classes"
            )
        if response.device not in self._weights:
            self._weights[response.device] = torch.tensor(self._numbers, device=response.device)
        return self._weights[response.device].to(response.dtype)

    def response(self, output: Any) -> Tensor | None:
        return response_of(output)

    def labels(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        target = batch.target  # a loss of somebody's own may have targets of any kind
        if not isinstance(target, Tensor):
            return None, None
        return (target if target.is_floating_point() or target.is_complex() else target.long()), None

    def rows(self, output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        return response_of(output), _target(batch)

    def metrics(self) -> Accuracy:
        return Accuracy()


def _target(batch: Batch) -> Tensor:
    """Labels (N,) int64, or probabilities (N, K). Raises UserError for one-hot labels of whole numbers."""
    target = batch.target
    rows = isinstance(target, Tensor) and target.dim() == 2
    if rows and target.is_floating_point():
        return target
    if rows and target.shape[1] > 1 and bool(((target != 0).sum(1) == 1).all() and (target.amax(1) == 1).all()):
        kind = str(target.dtype).removeprefix("torch.")
        raise UserError(
            f"classification: one-hot labels {tuple(target.shape)} of {kind}: give class numbers, labels.argmax(1), or "
            "probabilities, labels.float()"
        )
    return as_labels("classification", target)


class Accuracy:
    """Percentage of samples whose label is the first, or among the first five, of the response (N, K); and the mean
    cross entropy. Sums stay on the device, so that nothing is read from it before the end."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._samples = 0

    def update(self, output: Any, batch: Batch) -> None:
        """Take in a batch with ``target`` (N,), or (N, K) of which the largest is the label. Raises UserError for a response that is no row of classes a sample."""
        response, target = response_of(output), _target(batch)
        soft = target.is_floating_point()
        if response.dim() != 2 or len(response) != len(target) or (target.dim() != 1 and not soft):
            raise UserError(
                f"accuracy needs one row of classes per label, got a response {tuple(response.shape)} for labels {tuple(target.shape)}"
            )
        if target.dim() == 1:
            check_range("classification", target, response.shape[1])
        labels = target.argmax(1) if target.dim() == 2 else target
        ranked = response.topk(min(5, response.shape[1]), dim=1).indices == labels[:, None]
        for name, value in (
            ("accuracy", 100 * ranked[:, 0].sum()),
            ("top5", 100 * ranked.any(1).sum()),
            ("loss", F.cross_entropy(response.float(), target, reduction="sum")),
        ):
            self._sums[name] = self._sums.get(name, 0) + value.double()
        self._samples += len(target)

    def state(self) -> dict[str, Any]:
        return {"sums": {name: value.cpu() for name, value in self._sums.items()}, "samples": self._samples}

    def merge(self, states: Sequence[Any]) -> None:
        names = next((list(state["sums"]) for state in states if state["sums"]), [])
        self._sums = {name: torch.stack([s["sums"][name] for s in states if s["sums"]]).sum(0) for name in names}
        self._samples = sum(state["samples"] for state in states)

    def compute(self) -> dict[str, float]:
        return {name: value.item() / self._samples for name, value in self._sums.items()}
