"""From a config to its task and metrics."""

from __future__ import annotations

from collections.abc import Callable

from distpro.build.given import Given, refuse_object
from distpro.config.schema import Config
from distpro.task import METRIC_PARTS, TASK_PARTS, Metrics, Task, check_parts
from distpro.tasks import METRICS, TASKS, Together
from pathways.registry import UserError
from pathways.space import parse_spec


def build_task(config: Config, given: Given | None = None) -> Task:
    """The config's task, or the one that was handed over."""
    if given is not None and given.task is not None:
        return given.task
    name, params = parse_spec(config.task, "task")
    refuse_object("task", name)
    task: Task = TASKS.build(name, **params)
    check_parts(task, f"task '{name}'", TASK_PARTS)
    return task


def metrics_of(config: Config, task: Task) -> Callable[[], Metrics]:
    """Makes fresh metrics: the task's, and those that the config names beside them. Raises UserError for what are
    none."""
    specs = [parse_spec(spec, "metrics") for spec in config.metrics]
    own = task.metrics()
    check_parts(own, "metrics of the task", METRIC_PARTS)
    for name, params in specs:
        made = METRICS.build(name, **params)
        check_parts(made, f"metric '{name}'", METRIC_PARTS)
        if type(made) is type(own):
            raise UserError(f"metrics: '{name}' is what the task measures without being asked: leave it out")
    if not specs:
        return task.metrics
    return lambda: Together([task.metrics(), *(METRICS.build(name, **params) for name, params in specs)])
