"""The distillation losses of the field, one file a method. Importing this package registers every file in it."""

import importlib
import pkgutil

from distpro.losses.base import LOSSES, DistillationLoss, available_losses, build_loss

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["LOSSES", "DistillationLoss", "available_losses", "build_loss"]
