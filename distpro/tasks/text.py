"""Text classification and regression: GLUE's metrics, and tokens that are padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distpro.batch import Batch
from distpro.tasks.classification import Classification
from distpro.tasks.labels import as_labels, check_finite, check_range
from distpro.tasks.metrics import OfPairs
from pathways.call import Call
from pathways.registry import UserError, nearest
from pathways.taps import response_of

HEADLINES = ("accuracy", "matthews", "f1")
SCORES = ("pearson", "spearman")


def tokens_of(batch: Batch) -> Tensor | None:
    """Which tokens are no padding, bool (N, L): the inputs' ``attention_mask``; None where they have none."""
    mask = batch.inputs.get("attention_mask") if isinstance(batch.inputs, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


class TextClassification(Classification):
    """Task of predicting a class of a text: ``target`` (N,) int64, the inputs a mapping such as ``input_ids`` and
    ``attention_mask`` (N, L).

    Args:
        headline: accuracy (GLUE's SST-2 and RTE), matthews (CoLA) or f1 (MRPC), which is of class 1 of two.
        label_smoothing, class_weights: of the training loss, see `Classification`.
    """

    def __init__(
        self,
        headline: str = "accuracy",
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | str | None = None,
    ):
        super().__init__(label_smoothing, class_weights)
        self.headline = _headline("text", headline, HEADLINES, "text_regression", SCORES)

    def model_arguments(self, data: Any) -> dict[str, Any]:
        if getattr(data, "regression", False):
            raise UserError("task 'text': the data have scores, not classes: task: text_regression")
        if self.headline == "f1" and data.num_classes not in (None, 2):
            raise UserError(f"task 'text': f1 is of two classes, the data have {data.num_classes}")
        return {**super().model_arguments(data), **_tokens_fact(data)}

    def tokens(self, batch: Batch) -> Tensor | None:
        return tokens_of(batch)

    def metrics(self) -> ClassCounts:  # type: ignore[override]
        return ClassCounts()


class TextRegression:
    """Task of predicting a score of a text (or of two, GLUE's STS-B): ``target`` (N,) floating point, the response (N, 1) or
    (N,), the loss the mean squared error.

    Args:
        headline: pearson or spearman.
    """

    higher_is_better = True

    def __init__(self, headline: str = "pearson"):
        self.headline = _headline("text_regression", headline, SCORES, "text", HEADLINES)

    def model_arguments(self, data: Any) -> dict[str, Any]:
        if not getattr(data, "regression", True):
            raise UserError("task 'text_regression': the data have classes, not scores: task: text")
        return {"num_classes": 1, **_tokens_fact(data)}

    def call(self, batch: Batch, training: bool) -> Call:
        return batch.call

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return F.mse_loss(*_scores(output, batch))

    def response(self, output: Any) -> Tensor | None:
        """None: a single number has no classes to soften. Terms read taps, or the output as ``logits`` of a module."""
        return None

    def labels(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        return batch.target, None

    def tokens(self, batch: Batch) -> Tensor | None:
        return tokens_of(batch)

    def metrics(self) -> Correlations:
        return Correlations()


def _headline(task: str, found: str, allowed: Sequence[str], other: str, of_other: Sequence[str]) -> str:
    if found not in allowed:
        hint = f"; it is one of task '{other}'" if found in of_other else nearest(found, allowed)
        raise UserError(f"task '{task}': headline '{found}'{hint} (allowed: {', '.join(allowed)})")
    return found


def _tokens_fact(data: Any) -> dict[str, Any]:
    vocabulary = getattr(data, "vocabulary", None)
    return {} if vocabulary is None else {"tokens": vocabulary}


def _scores(output: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Predictions and targets (N,)."""
    response, target = response_of(output), batch.target
    if isinstance(target, Tensor) and target.dim() == 2 and target.shape[1] == 1:
        target = target[:, 0]
    if not isinstance(target, Tensor) or target.dim() != 1 or not target.is_floating_point():
        raise UserError("text_regression: targets are scores (N,) of floating point")
    if response.shape not in ((len(target),), (len(target), 1)):
        raise UserError(f"text_regression needs one number per sample, got a response {tuple(response.shape)}")
    check_finite("text_regression", target)
    return response.reshape(len(target)).to(target.dtype), target


class ClassCounts:
    """Accuracy, and F1 of class 1 of two, in percent; Matthews' correlation coefficient, times 100; the mean cross entropy. All of
    counts, so that several processes come to the numbers of one.

    Matthews' coefficient is that of K classes (Gorodkin 2004). It and F1 are 0 where their denominator is.
    """

    def __init__(self) -> None:
        self._matrix: Tensor | None = None  # (K, K) int64: label, prediction
        self._loss: Tensor | None = None

    def update(self, output: Any, batch: Batch) -> None:
        """Take in a batch with ``target`` (N,)."""
        response, target = response_of(output), as_labels("text", batch.target)
        if response.dim() != 2 or target.shape != response.shape[:1]:
            raise UserError(
                f"text needs one row of classes per label, got a response {tuple(response.shape)} and targets "
                f"{tuple(target.shape)}"
            )
        count = response.shape[1]
        check_range("text", target, count)
        matrix = torch.bincount(target * count + response.argmax(1), minlength=count**2).view(count, count)
        loss = F.cross_entropy(response.float(), target, reduction="none").double().sum()
        self._matrix = matrix if self._matrix is None else self._matrix + matrix
        self._loss = loss if self._loss is None else self._loss + loss

    def state(self) -> dict[str, Any]:
        return {} if self._matrix is None or self._loss is None else {"m": self._matrix.cpu(), "loss": self._loss.cpu()}

    def merge(self, states: Sequence[Any]) -> None:
        known = [state for state in states if state]
        self._matrix = torch.stack([state["m"] for state in known]).sum(0) if known else None
        self._loss = torch.stack([state["loss"] for state in known]).sum() if known else None

    def compute(self) -> dict[str, float]:
        if self._matrix is None or self._loss is None:
            return {}
        matrix = self._matrix.cpu().double()
        samples, hits, said, true = matrix.sum(), matrix.trace(), matrix.sum(0), matrix.sum(1)
        spread = ((samples**2 - said @ said) * (samples**2 - true @ true)).sqrt()
        found = {
            "accuracy": 100 * (hits / samples).item(),
            "matthews": 100 * ((hits * samples - said @ true) / spread).item() if spread > 0 else 0.0,
        }
        if len(matrix) == 2:
            both = said[1] + true[1]
            found["f1"] = 100 * (2 * matrix[1, 1] / both).item() if both > 0 else 0.0
        return {**found, "loss": self._loss.item() / samples.item()}


class Correlations(OfPairs):
    """Pearson's and Spearman's correlation of predictions and targets, times 100, and the mean squared error. Every pair is kept,
    for ranks are of the whole set; several processes put theirs together first."""

    def __init__(self) -> None:
        super().__init__(_scores)

    def measure(self, said: Tensor, true: Tensor) -> dict[str, float]:
        return {
            "pearson": 100 * _pearson(said, true),
            "spearman": 100 * _pearson(_ranks(said), _ranks(true)),
            "loss": (said - true).square().mean().item(),
        }


def _pearson(x: Tensor, y: Tensor) -> float:
    """0 where one of them is constant, nan where a number is none."""
    if not (x.isfinite().all() and y.isfinite().all()):
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    size = (x.norm() * y.norm()).item()
    return (x @ y).item() / size if size > 0 else 0.0


def _ranks(x: Tensor) -> Tensor:
    """Ranks of (N,) values; equal ones share the mean of theirs. Of values that are no numbers there is no order: they come back."""
    if not x.isfinite().all():
        return x
    _, place, counts = x.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0)
    return (ends - (counts - 1) / 2).double()[place]
