"""What the models do, one file a task: how a batch meets a model, task loss, metrics. See `distpro.task.Task`.

Imports batch and pathways; knows neither losses nor the trainer.
"""

from distpro.tasks.calibration import CalibratedLoss, calibrated_loss
from distpro.tasks.classification import Classification
from distpro.tasks.depth import Depth
from distpro.tasks.detection import Detection
from distpro.tasks.metrics import METRICS, Together
from distpro.tasks.multilabel import MultiLabel
from distpro.tasks.regression import Regression
from distpro.tasks.segmentation import Segmentation
from distpro.tasks.text import TextClassification, TextRegression
from pathways.registry import Registry

TASKS = Registry("task", takes_code=True)
TASKS.register("classification")(Classification)
TASKS.register("depth")(Depth)
TASKS.register("segmentation")(Segmentation)
TASKS.register("detection")(Detection)
TASKS.register("multi_label")(MultiLabel)
TASKS.register("regression")(Regression)
TASKS.register("text")(TextClassification)
TASKS.register("text_regression")(TextRegression)

__all__ = [
    "METRICS",
    "TASKS",
    "CalibratedLoss",
    "Classification",
    "Depth",
    "Detection",
    "MultiLabel",
    "Regression",
    "Segmentation",
    "TextClassification",
    "TextRegression",
    "Together",
    "calibrated_loss",
]
