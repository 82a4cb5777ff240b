"""Small-image models of the field, one file a family, and models of other libraries by name.

Importing this package registers every file in it.
"""

import importlib
import pkgutil

from distpro.models.base import LIBRARIES, MODELS, StageTaps, accepted, build_model, stage_taps
from distpro.models.loading import LoadReport, load_checkpoint

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["LIBRARIES", "MODELS", "LoadReport", "StageTaps", "accepted", "build_model", "load_checkpoint", "stage_taps"]
