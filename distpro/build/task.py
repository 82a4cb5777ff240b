"""From a config to its task and metrics."""

from __future__ import annotations

from collections.abc import Callable

from distpro.build.given import Given, refuse_object
from distpro.config.schema import Config
from distpro.task import Metrics, Task
from distpro.tasks import METRICS, TASKS, Together
from pathways.space import parse_spec


def build_task(config: Config, given: Given | None = None) -> Task:
    """The config's task, or the one that was handed over."""
    if given is not None and given.task is not None:
        return given.task
    name, params = parse_spec(config.task, "task")
    refuse_object("task", name)
    task: Task = TASKS.build(name, **params)
    return task


def metrics_of(config: Config, task: Task) -> Callable[[], Metrics]:
    """Makes fresh metrics: the task's, and those that the config names beside them."""
    specs = [parse_spec(spec, "metrics") for spec in config.metrics]
    if not specs:
        return task.metrics
    return lambda: Together([task.metrics(), *(METRICS.build(name, **params) for name, params in specs)])
