"""What the models do: task loss and metrics, by name."""

from distpro.tasks.classification import Classification
from pathways.registry import Registry

TASKS = Registry("task")
TASKS.register("classification")(Classification)

__all__ = ["TASKS", "Classification"]
