"""Metrics of a trained student."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distpro.objective import Objective
from distpro.train import distributed


@torch.no_grad()
def test(objective: Objective, task: Any, loader: Any) -> dict[str, float]:
    """Mean metrics of the objective's student over a loader's epoch, in evaluation mode."""
    was_training = objective.training
    objective.eval()
    sums: dict[str, Tensor] = {}
    count = 0
    for batch in loader.epoch(0):
        if len(batch.y) == 0:  # this rank's part of a small last batch
            continue
        output = objective.predict(batch.x)
        for name, value in task.metrics(output, batch.y).items():
            sums[name] = sums.get(name, 0) + value.double()
        count += len(batch.y)
    objective.train(was_training)
    names = list(sums)
    found = torch.stack([sums[name] for name in names])
    *values, everything = distributed.total(torch.cat([found, found.new_tensor([count])])).tolist()
    return {name: value / everything for name, value in zip(names, values, strict=True)}
