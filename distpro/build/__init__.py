"""The composition root: a checked config becomes live objects. The only folder that knows everyone below.

Never imports report or runs.
"""

from distpro.build.checks import check_names
from distpro.build.data import IMAGE_SETS, build_data, build_loader
from distpro.build.models import build_pair
from distpro.build.objective import PRECISIONS, build_deployed, build_objective, build_task, versions_of
from distpro.build.runs import build_optimizer, build_retrain, build_search
from distpro.build.terms import build_terms

__all__ = [
    "IMAGE_SETS",
    "PRECISIONS",
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
    "check_names",
    "versions_of",
]
