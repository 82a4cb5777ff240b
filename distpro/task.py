"""What a task is: how a batch meets a model, the task loss, what logit losses read, and the metrics.

`distpro.tasks` holds one file a task; ``package.module:name`` in a config, or an object in Python, brings one's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor

from distpro.batch import Batch
from pathways.call import Call
from pathways.registry import UserError


class Metrics(Protocol):
    """Running metrics of one evaluation. A fresh one is made for each."""

    def update(self, output: Any, batch: Batch) -> None:
        """Take in a batch: the model's whole output and the batch."""

    def state(self) -> Any:
        """What has been counted so far, in tensors, numbers, lists and dicts: what another process can be told."""

    def merge(self, states: Sequence[Any]) -> None:
        """Replace what has been counted by that of several processes, this one's among them, each `state` of one."""

    def compute(self) -> dict[str, float]:
        """The metrics by name."""


class Task(Protocol):
    """What the models do. Optional: ``rows(output, batch)``, see `distpro.tasks.calibration`, of a task whose loss is a cross
    entropy; ``predict(model, batch)``, what an evaluation is given of a model where that is not one pass of ``call``;
    ``parts(output)``, the parts of the loss by name, and ``pictures(output, batch)``, predictions as images (N, 3, H, W), both
    for the log; and ``tokens(batch)``, which tokens of the inputs are no padding, bool (N, L), where the response has no such
    positions, as a text's class; ``prepare(labels)``, which before a training is told its labels, (N,) int64, None where they are not
    known. And ``targets``, what a data set that is not there has in a dry run: ``classes`` (the default),
    ``maps`` of them, ``depths`` or ``boxes``.

    Attributes:
        headline: name of the metric that tables report.
        higher_is_better: whether the best evaluation is the one with the largest headline.
        exclusive (optional): False where the response is not a row of classes of which one is right, so that losses that compare
            softmaxes, or read a label, are refused.
    """

    headline: str
    higher_is_better: bool

    def model_arguments(self, data: Any) -> dict[str, Any]:
        """Arguments that a model needs to fit the data, for instance ``{"num_classes": 10}``."""

    def call(self, batch: Batch, training: bool) -> Call:
        """How a batch meets a model: the forward pass's arguments."""

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """The task loss, a scalar, of a model's whole output."""

    def response(self, output: Any) -> Tensor | None:
        """What logit losses read of a model's output: (N, K), (N, K, H, W) or (N, L, K); None if it has no such."""

    def labels(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """Targets of the losses, int64 of the response's positions, (N,), (N, H, W) or (N, L), and a bool mask of the
        same shape of the positions that count; each None where there is none (no mask: all count)."""

    def metrics(self) -> Metrics:
        """Fresh metrics for one evaluation."""


def ask(task: Task, model: Any, batch: Batch) -> Any:
    """The output of a model that is evaluated: by the task's ``predict`` if it has one."""
    predict = getattr(task, "predict", None)
    return (
        task.call(batch, bool(model.training)).run(model)
        if predict is None or model.training
        else predict(model, batch)
    )


TASK_PARTS = ("headline", "higher_is_better", "model_arguments", "call", "loss", "response", "labels", "metrics")
METRIC_PARTS = ("update", "state", "merge", "compute")


def check_parts(value: Any, what: str, parts: Iterable[str]) -> None:
    """Raise UserError, beginning with ``what``, for an object that lacks one of these attributes, and for a class."""
    if isinstance(value, type):
        raise UserError(f"{what} is the class {value.__name__}: give one of it, {value.__name__}(...)")
    missing = [part for part in parts if not hasattr(value, part)]
    if missing:
        raise UserError(
            f"{what} is {type(value).__name__}, which has no {', '.join(missing)} (needed: {', '.join(parts)})"
        )
