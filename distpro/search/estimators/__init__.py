"""Hypergradients: how the validation loss after a training step depends on the weights of the terms (Eq. 4 and 5).

One file each: the derivative of the optimiser's step, forward mode (its tangents, and whether a student can have them),
finite differences, unrolled steps. Imports the
objective and what lies below it, and train's random state; never the searcher.
"""

from __future__ import annotations

from typing import Any

import torch

from distpro.objective import Objective
from distpro.search.estimators.base import ESTIMATORS, Estimator, TrainingStep
from distpro.search.estimators.choice import obstacle, second_obstacle
from distpro.search.estimators.finite_difference import FiniteDifference
from distpro.search.estimators.forward_mode import ForwardMode
from distpro.search.estimators.replay import Room
from distpro.search.estimators.step import StepDerivative
from distpro.search.estimators.sweep import Sweep

__all__ = [
    "ESTIMATORS",
    "Room",
    "Estimator",
    "FiniteDifference",
    "ForwardMode",
    "StepDerivative",
    "Sweep",
    "TrainingStep",
    "obstacle",
    "second_obstacle",
]


@ESTIMATORS.register("auto")
def _auto(
    objective: Objective, optimizer: torch.optim.Optimizer, max_norm: float | None = None, clip_by: str = "all"
) -> Estimator:
    """`forward_mode`; a run puts `finite_difference` in its place where that cannot be, see `distpro.build.runs`."""
    return ForwardMode(objective, optimizer, max_norm, clip_by)


@ESTIMATORS.register("unrolled")
def _unrolled(*args: Any, **params: Any) -> Estimator:
    from distpro.search.estimators.unrolled import Unrolled  # imports `higher`, which the others do not need

    return Unrolled(*args, **params)
