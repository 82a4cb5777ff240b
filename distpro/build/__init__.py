"""The composition root: a checked config becomes live objects. The only folder that knows everyone below.

Never imports report or runs.
"""

from distpro.build.cache import versions_of
from distpro.build.checks import check_accumulate, check_learns, check_names, check_search
from distpro.build.data import as_stored, blank_data, build_data, build_loader
from distpro.build.given import Given
from distpro.build.models import build_pair
from distpro.build.objective import PRECISIONS, build_deployed, build_objective, compose
from distpro.build.optimizer import OPTIMIZERS, build_optimizer
from distpro.build.runs import build_retrain, build_search, calibrates, fitting
from distpro.build.task import build_task, metrics_of
from distpro.build.terms import build_terms

__all__ = [
    "Given",
    "OPTIMIZERS",
    "PRECISIONS",
    "as_stored",
    "blank_data",
    "build_data",
    "build_deployed",
    "build_loader",
    "build_objective",
    "build_optimizer",
    "build_pair",
    "build_retrain",
    "build_search",
    "build_task",
    "build_terms",
    "calibrates",
    "check_accumulate",
    "check_learns",
    "check_names",
    "check_search",
    "compose",
    "fitting",
    "metrics_of",
    "versions_of",
]
