"""In what a schedule's search differs from the training that replays it. None of it is an error, for schedules are meant to be
carried over; but weights, and the sizes that losses were divided by, are of what they were found with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distpro.config.reading import check
from distpro.config.schema import Config
from distpro.schedule import Schedule
from pathways.registry import UserError
from pathways.space import parse_spec


def said_of_schedule(schedule: Schedule, config: Config) -> list[str]:
    """A line for each: the task, the pathways' distance, the parameters of a loss. Nothing of a schedule whose config is not there, or
    not one of today's."""
    stored = schedule.meta.get("config")
    try:
        theirs = _compared(check(stored, "schedule")) if isinstance(stored, Mapping) else {}
    except UserError:
        return []
    ours = _compared(config)
    return [
        f"{what}: {ours[what]} here, {theirs[what]} where the schedule was searched"
        for what in ours
        if what in theirs and theirs[what] != ours[what]
    ]


def _compared(config: Config) -> dict[str, Any]:
    """What is compared, by what it is called; of the terms the first of each loss."""
    found: dict[str, Any] = {"the task": parse_spec(config.task, "task")[0]}
    if config.pathways is not None:
        name, params = parse_spec(config.pathways.distance, "pathways.distance")
        found["pathways.distance"] = {name: params} if params else name
    return found | {f"parameters of {term.loss}": term.params or "none" for term in reversed(config.terms)}
