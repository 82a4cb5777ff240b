"""distpro: learn when a student should listen to which part of its teacher.

schedule = distpro.search("search_configs/digits.yaml", out="runs/x")
result = distpro.retrain(schedule=schedule)
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distpro.losses import available_losses, build_loss
    from distpro.objective import Objective
    from distpro.runs.commands import Result, evaluate, retrain, search, train, tune
    from distpro.runs.distilling import distill
    from distpro.schedule import Schedule
    from distpro.term import Term
    from pathways.registry import UserError

    __version__: str

# Imported when first used, so that `distpro --help` and small uses do not pay for everything.
_HOMES = {
    "Objective": "distpro.objective",
    "Result": "distpro.runs.commands",
    "Schedule": "distpro.schedule",
    "Term": "distpro.term",
    "UserError": "pathways.registry",
    "available_losses": "distpro.losses",
    "build_loss": "distpro.losses",
    "distill": "distpro.runs.distilling",
    "evaluate": "distpro.runs.commands",
    "retrain": "distpro.runs.commands",
    "search": "distpro.runs.commands",
    "train": "distpro.runs.commands",
    "tune": "distpro.runs.commands",
}

__all__ = [
    "Objective",
    "Result",
    "Schedule",
    "Term",
    "UserError",
    "__version__",
    "available_losses",
    "build_loss",
    "distill",
    "evaluate",
    "retrain",
    "search",
    "train",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module 'distpro' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def _version() -> str:
    """The installed version; of a source tree that is not installed, unknown."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("distpro")
    except PackageNotFoundError:
        return "0+unknown"


class _Package(ModuleType):
    """`distpro.search` and `distpro.train` stay functions when the folders of these names are imported, which are read
    by ``from distpro.search.searcher import Searcher``."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
