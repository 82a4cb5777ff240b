"""Metrics of a trained student."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from distpro.batch import Batch
from distpro.objective import Objective
from distpro.task import Metrics
from distpro.train import distributed
from distpro.train.stopping import Cut


@torch.no_grad()
def evaluate(
    objective: Objective,
    metrics: Metrics,
    loader: Any,
    seen: Callable[[Any, Batch], None] | None = None,
    cut: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Metrics of the objective's student over a loader's first epoch and all processes, in evaluation mode.

    ``seen`` is called with the first batch's output and that batch. Raises `Cut` where ``cut`` says so before a batch.
    """
    was_training = objective.training
    objective.eval()
    for batch in loader.epoch(0):
        if cut():
            objective.train(was_training)
            raise Cut
        if batch.samples == 0:  # this rank's part of a small last batch
            continue
        output = objective.predict(batch)
        metrics.update(output, batch)
        if seen is not None:
            seen(output, batch)
            seen = None
    objective.train(was_training)
    metrics.merge(distributed.gather(metrics.state()))
    return {name: float(value) for name, value in metrics.compute().items()}
