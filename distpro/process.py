"""Numbers that move in time by a written rule: a term's weight, or another scalar of it, as a function of the step.

A config writes ``{name: {parameters}}``, for instance ``weight: {cosine: {initial: 1, final: 0, start: 10, by: epoch}}``.
``by`` is the unit of ``start``, ``end``, ``at`` and ``period``: ``step``, ``epoch``, or ``fraction`` of the training
(1 is its last step).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distpro.schedule import REDUCTIONS, Schedule
from pathways.registry import Registry, UserError, check_parameters, nearest

PROCESSES = Registry("process")
UNITS = ("step", "epoch", "fraction")


@dataclass(frozen=True)
class Clock:
    """How long a training is: its steps, and how many of them make an epoch."""

    total_steps: int
    steps_per_epoch: float = 1.0

    def time(self, step: int, unit: str) -> float:
        """The moment of a step in a unit of `UNITS`."""
        if unit == "fraction":
            return step / max(self.total_steps - 1, 1)
        return step if unit == "step" else step / self.steps_per_epoch

    def end(self, unit: str) -> float:
        """The moment of the last step."""
        return self.time(self.total_steps - 1, unit)


class Process(ABC):
    """A number as a function of the training step."""

    @abstractmethod
    def at(self, step: int, clock: Clock) -> float:
        """The value at a step (from 0) of a training that lasts as ``clock`` says."""

    def bind(self, clock: Clock) -> Callable[[int], float]:
        """The process of one training: ``step → value``."""
        return lambda step: self.at(step, clock)


@PROCESSES.register("constant")
@dataclass(frozen=True)
class Constant(Process):
    """``value`` at every step."""

    value: float

    def at(self, step: int, clock: Clock) -> float:
        return self.value


@dataclass(frozen=True)
class _Ramp(Process):
    """From ``initial`` at ``start`` to ``final`` at ``end`` (None: the last step), constant before and after."""

    initial: float
    final: float
    start: float = 0.0
    end: float | None = None
    by: str = "fraction"

    def at(self, step: int, clock: Clock) -> float:
        now = clock.time(step, self.by)
        end = clock.end(self.by) if self.end is None else self.end
        part = min(max((now - self.start) / (end - self.start), 0.0), 1.0) if end > self.start else float(now >= end)
        return self.initial + (self.final - self.initial) * self.shape(part)

    def shape(self, part: float) -> float:
        """How much of the way is done, 0 to 1, after a part of the time."""
        raise NotImplementedError


@PROCESSES.register("linear")
class Linear(_Ramp):
    """In a straight line."""

    def shape(self, part: float) -> float:
        return part


@PROCESSES.register("cosine")
class Cosine(_Ramp):
    """Along half a cosine: slow at both ends."""

    def shape(self, part: float) -> float:
        return (1 - math.cos(math.pi * part)) / 2


@PROCESSES.register("warmup")
@dataclass(frozen=True)
class Warmup(Process):
    """From 0 in a straight line to ``value`` at ``end``, and constant from there."""

    value: float
    end: float
    by: str = "epoch"

    def at(self, step: int, clock: Clock) -> float:
        return self.value * min(clock.time(step, self.by) / self.end, 1.0) if self.end > 0 else self.value


@PROCESSES.register("step")
@dataclass(frozen=True)
class Step(Process):
    """``value``, times ``gamma`` from each of the ``milestones`` on."""

    value: float
    milestones: Sequence[float]
    gamma: float = 0.1
    by: str = "fraction"

    def at(self, step: int, clock: Clock) -> float:
        now = clock.time(step, self.by)
        return self.value * self.gamma ** sum(now >= moment for moment in self.milestones)


@PROCESSES.register("cyclic")
@dataclass(frozen=True)
class Cyclic(Process):
    """Between ``low`` and ``high`` and back once per ``period``, from ``low``: a ``triangle`` or a ``cosine``."""

    low: float
    high: float
    period: float
    shape: str = "triangle"
    by: str = "fraction"

    def __post_init__(self) -> None:
        if self.shape not in ("triangle", "cosine"):
            raise UserError(f"process 'cyclic': shape is '{self.shape}' (allowed: triangle, cosine)")
        if self.period <= 0:
            raise UserError(f"process 'cyclic': period is {self.period}, must be above 0")

    def at(self, step: int, clock: Clock) -> float:
        part = clock.time(step, self.by) / self.period % 1.0
        height = 1 - abs(2 * part - 1) if self.shape == "triangle" else (1 - math.cos(2 * math.pi * part)) / 2
        return self.low + (self.high - self.low) * height


@PROCESSES.register("schedule")
@dataclass(frozen=True)
class FromSchedule(Process):
    """What a schedule file says of one term in a training of this length, as `Objective.follow` plays it: λ · s · w,
    without the beginning and what the threshold drops, times ``scale``. Or one of the file's scalars.

    Args:
        file: path of an ``alpha.pt``.
        key: name of the column or scalar; may be left out where the (reduced) schedule has only one column.
        reduction: how the schedule is summed up first, see `Schedule.reduce`.
        scale: one more factor.
    """

    file: str
    key: str | None = None
    reduction: str | None = None
    scale: float = 1.0

    def bind(self, clock: Clock) -> Callable[[int], float]:
        schedule = Schedule.load(self.file)
        played, strength = schedule.played(clock.total_steps), schedule.strengths(clock.total_steps)
        if self.key is not None and self.key in played.scalars and self.reduction is None:
            numbers = (played.scalars[self.key].double() * self.scale).tolist()
            return lambda step: numbers[min(step, len(numbers) - 1)]
        column = self._column_of(played if self.reduction is None else played.reduce(self.reduction))
        values = ((column.weights * column.scales)[:, 0].double() * self.scale).tolist()
        return lambda step: strength(step) * values[min(step, len(values) - 1)]

    def at(self, step: int, clock: Clock) -> float:
        return self.bind(clock)(step)

    def _column_of(self, schedule: Schedule) -> Schedule:
        key = self.key if self.key is not None or len(schedule.keys) > 1 else schedule.keys[0]
        if key not in schedule.keys:
            found = "key is missing" if key is None else f"no column '{key}'{nearest(key, schedule.keys)}"
            names = schedule.keys if self.reduction is not None else (*schedule.keys, *schedule.scalars)
            raise UserError(f"{self.file}: {found} (it has: {', '.join(names)})")
        return schedule.take([schedule.keys.index(key)])


def reduction_of(spec: Any) -> str | None:
    """The word of ``{schedule: word}``: a reduction of the schedule that the run follows; None for anything else."""
    inner = spec.get("schedule") if isinstance(spec, Mapping) else None
    return inner if isinstance(inner, str) else None


def parse_process(spec: Any) -> Process:
    """A number, or ``{name: {parameters}}`` or ``{name: ..., parameters}``, as a process.

    >>> parse_process({"linear": {"initial": 1, "final": 0}}).at(5, Clock(total_steps=11))
    0.5

    Raises UserError for an unknown name, unit or parameter.
    """
    if isinstance(spec, (int, float)) and not isinstance(spec, bool):
        return Constant(float(spec))
    params = dict(spec) if isinstance(spec, Mapping) else {}
    name = params.pop("name", None)
    if name is None:
        if len(params) != 1:
            raise UserError(
                f"{spec!r} is not a process (a number, or one of {', '.join(PROCESSES)} with its parameters)"
            )
        ((name, inner),) = params.items()
        if name == "schedule" and isinstance(inner, str):
            allowed = ", ".join(REDUCTIONS)
            raise UserError(f"unknown reduction '{inner}' in schedule{nearest(inner, REDUCTIONS)} (allowed: {allowed})")
        if name in PROCESSES and not isinstance(inner, Mapping):
            raise UserError(f"process '{name}' needs its parameters as a mapping, got {inner!r}")
        params = dict(inner) if isinstance(inner, Mapping) else {}
    entry, unit = PROCESSES[name], params.get("by", UNITS[0])
    if unit not in UNITS:
        raise UserError(f"process '{name}': by is '{unit}'{nearest(unit, UNITS)} (allowed: {', '.join(UNITS)})")
    check_parameters(f"process '{name}'", entry, params)
    for key, found in params.items():
        for number in found if isinstance(found, list | tuple) else [found]:
            if isinstance(number, bool) or (isinstance(number, float) and not math.isfinite(number)):
                raise UserError(f"process '{name}': {key}: expected a finite number, found {number}")
    process: Process = PROCESSES.build(name, **params)
    return process


@dataclass(frozen=True)
class Learned:
    """A number that a search moves and a schedule says; in a config ``learned``, or ``{learned: {initial: 4}}``.

    Attributes:
        initial: what the search starts from, above 0; for a list of numbers, a list; None: what is there by default.
    """

    initial: float | list[float] | None = None

    def __post_init__(self) -> None:
        given = self.initial if isinstance(self.initial, list) else [] if self.initial is None else [self.initial]
        for number in given:
            if not isinstance(number, (int, float)) or isinstance(number, bool) or not 0 < number < math.inf:
                raise UserError(f"learned: initial: expected a finite number above 0, found {number!r}")


def learned_of(spec: Any) -> Learned | None:
    """What a config says of a number that is learned; None for anything else. Raises UserError for a wrong parameter."""
    if spec == "learned":
        return Learned()
    named = dict(spec) if isinstance(spec, Mapping) else {}
    if named.pop("name", None) == "learned":
        params: Any = named
    elif isinstance(spec, Mapping) and list(spec) == ["learned"]:
        params = spec["learned"]
    else:
        return None
    if not isinstance(params, Mapping):
        raise UserError(f"learned: needs its parameters as a mapping, {{initial: 4}}, found {params!r}")
    check_parameters("learned", Learned, params)
    return Learned(**params)


def is_process(value: Any) -> bool:
    """Whether a parameter's value in a config is written as a process: a mapping that names one."""
    return isinstance(value, Mapping) and (
        value.get("name") in PROCESSES or (len(value) == 1 and next(iter(value)) in PROCESSES)
    )
