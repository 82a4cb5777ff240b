"""distpro: learn when a student should listen to which part of its teacher.

schedule = distpro.search("search_configs/digits.yaml", out="runs/x")
result = distpro.retrain(schedule=schedule)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distpro.losses import available_losses, build_loss
    from distpro.objective import Objective
    from distpro.runs.commands import Result, evaluate, retrain, search, train
    from distpro.schedule import Schedule
    from distpro.term import Term
    from pathways.registry import UserError

# Imported when first used, so that `distpro --help` and small uses do not pay for everything.
_HOMES = {
    "Objective": "distpro.objective",
    "Result": "distpro.runs.commands",
    "Schedule": "distpro.schedule",
    "Term": "distpro.term",
    "UserError": "pathways.registry",
    "available_losses": "distpro.losses",
    "build_loss": "distpro.losses",
    "evaluate": "distpro.runs.commands",
    "retrain": "distpro.runs.commands",
    "search": "distpro.runs.commands",
    "train": "distpro.runs.commands",
}

__all__ = [
    "Objective",
    "Result",
    "Schedule",
    "Term",
    "UserError",
    "available_losses",
    "build_loss",
    "evaluate",
    "retrain",
    "search",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'distpro' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
