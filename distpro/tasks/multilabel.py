"""Multi-label classification: any number of the classes are right, each a question of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distpro.batch import Batch, stacked_call
from distpro.tasks.labels import check_weights
from distpro.tasks.metrics import OfPairs
from pathways.call import Call
from pathways.registry import UserError
from pathways.taps import response_of


class MultiLabel:
    """Task of saying of each of K classes whether it is there: ``target`` (N, K), 0 or 1, or probabilities. The response (N, K) holds
    logits, the loss is the mean binary cross entropy.

    Its classes do not exclude each other, so that losses that compare softmaxes are refused for it; ``l1`` compares logits as
    numbers.

    Args:
        pos_weight: a factor per class on the loss where it is there, as of `torch.nn.BCEWithLogitsLoss`.
    """

    headline = "map"
    higher_is_better = True
    exclusive = False

    def __init__(self, pos_weight: Sequence[float] | None = None):
        if isinstance(pos_weight, str):
            raise UserError(f"multi_label: pos_weight is a number of at least 0 per class, got {pos_weight!r}")
        self.pos_weight = check_weights("multi_label", pos_weight)

    def model_arguments(self, data: Any) -> dict[str, Any]:
        return {} if data.num_classes is None else {"num_classes": data.num_classes}

    def call(self, batch: Batch, training: bool) -> Call:
        return stacked_call("multi_label", batch)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        response, target = _pair(output, batch)
        weight = None
        if self.pos_weight is not None:
            weight = torch.tensor(self.pos_weight).to(response, non_blocking=True)
            if len(weight) != response.shape[1]:
                raise UserError(f"multi_label: {len(weight)} pos_weight for a response of {response.shape[1]} classes")
        return F.binary_cross_entropy_with_logits(response, target, pos_weight=weight)

    def response(self, output: Any) -> Tensor | None:
        return response_of(output)

    def labels(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """None: there is no one label a sample."""
        return None, None

    def metrics(self) -> LabelMetrics:
        return LabelMetrics()


def _pair(output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Response and targets (N, K). Values are looked at on the CPU only: elsewhere it would wait for the device."""
    response, target = response_of(output), batch.target
    if not isinstance(target, Tensor) or response.dim() != 2 or target.shape != response.shape:
        found = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise UserError(
            f"multi_label needs a logit and a target per class, both (N, K), got a response {tuple(response.shape)} and targets {found}"
        )
    target = target.to(response.dtype)
    if target.device.type == "cpu" and not ((target >= 0) & (target <= 1)).all():
        raise UserError("multi_label: targets are 0 or 1, or probabilities in between")
    return response, target


class LabelMetrics(OfPairs):
    """Mean average precision over the classes that occur, F1 at a probability of 1/2 as the mean over classes (``f1``) and of all
    decisions together (``f1_micro``), in percent; and the mean binary cross entropy. Every score is kept: a precision is of the
    whole set, and several processes put theirs together first. A target above 1/2 counts as 1."""

    def __init__(self) -> None:
        super().__init__(_pair)

    def measure(self, scores: Tensor, targets: Tensor) -> dict[str, float]:
        said, true = scores > 0, targets > 0.5
        precisions = [average_precision(s, t) for s, t in zip(scores.T, true.T, strict=True) if t.any()]
        hits, both = (said & true).sum(0).double(), (said.sum(0) + true.sum(0)).double()
        return {
            "map": 100 * sum(precisions) / max(1, len(precisions)),
            "f1": 100 * (2 * hits / both.clamp(min=1)).mean().item(),
            "f1_micro": 100 * (2 * hits.sum() / both.sum().clamp(min=1)).item(),
            "loss": F.binary_cross_entropy_with_logits(scores, targets).item(),
        }


def average_precision(scores: Tensor, true: Tensor) -> float:
    """Σ (R_n − R_(n−1)) P_n over the distinct thresholds of scores (N,), of which ``true`` (N,) bool are right; some must be."""
    order = scores.argsort(descending=True)
    scores, hits = scores[order], true[order].double().cumsum(0)
    last = torch.cat([scores[1:] != scores[:-1], scores.new_ones(1, dtype=torch.bool)])  # of those that are equal
    hits, count = hits[last], torch.arange(1, len(scores) + 1)[last]
    gained = torch.diff(hits, prepend=hits.new_zeros(1))
    return (gained / hits[-1] * hits / count).sum().item()
