"""In what a schedule's search differs from the training that replays it. None of it is an error, for schedules are meant to be
carried over; but weights, and the sizes that losses were divided by, are of what they were found with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distpro.config.schema import Config
from distpro.schedule import Schedule
from pathways.space import parse_spec


def said_of_schedule(schedule: Schedule, config: Config) -> list[str]:
    """A line for each: the task, the pathways' distance, the parameters of a loss. Nothing of a schedule without a config."""
    stored = schedule.meta.get("config")
    if not isinstance(stored, Mapping):
        return []
    here = config.model_dump()
    theirs, ours = ({"the task": _name(c.get("task")), **_distance(c), **_losses(c)} for c in (stored, here))
    return [
        f"{what}: {ours[what]} here, {theirs[what]} where the schedule was searched"
        for what in ours
        if what in theirs and theirs[what] != ours[what]
    ]


def _name(spec: Any) -> str:
    return parse_spec(spec, "task")[0]


def _distance(config: Mapping[str, Any]) -> dict[str, Any]:
    pathways = config.get("pathways") or {}
    return {"pathways.distance": _plain(pathways["distance"])} if "distance" in pathways else {}


def _losses(config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the first term of each loss."""
    terms: Sequence[Mapping[str, Any]] = config.get("terms") or ()
    return {f"parameters of {term['loss']}": term.get("params") or "none" for term in reversed(terms)}


def _plain(spec: Any) -> Any:
    """A distance without parameters as its name, however it is written."""
    name, params = parse_spec(spec, "pathways.distance")
    return {name: params} if params else name
