"""The numbers beside the weights that a search over a horizon learns: the task's weight, and scalars of the terms' losses.

Each is above 0 and moves as its logarithm does, as the weights do: a step is a factor, whatever the number's unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distpro.objective import Objective, Term
from distpro.schedule import TASK, owner_of
from pathways.registry import UserError, nearest


class Constants(NamedTuple):
    """Weights (N,) and the numbers beside them (S,), at every step alike."""

    weights: Tensor
    scalars: Tensor

    def times(self, factor: float) -> Constants:
        """Terms that pull harder by a factor; the numbers beside the weights stay."""
        return Constants(self.weights * factor, self.scalars)

    def halfway(self, other: Constants) -> Constants:
        """The geometric mean of both."""
        return Constants(*((a * b).sqrt() for a, b in zip(self, other, strict=True)))


class LearnedScalars:
    """S numbers of an objective, their logarithms as a leaf for an optimiser, and what they were at every step.

    Args:
        objective: whose task weight and losses they are; it says where the search starts.
        names: ``task``, or ``<term key>.<name>``, see `distpro.schedule.Schedule.scalars`.
        total_steps: of the search.

    Attributes:
        log: logarithms, (S,).
        history: values per step, (T, S).

    Raises UserError for a name that is no number above 0 of the task or of a term's loss, and for one that may not become
    every number above 0.
    """

    def __init__(self, objective: Objective, names: Sequence[str], total_steps: int):
        self.objective, self.names = objective, tuple(names)
        by_key = {term.key: term for term in objective.terms if isinstance(term, Term)}
        self.places = [None if name == TASK else _place(name, by_key) for name in self.names]
        start = [_start(name, self._read(place)) for name, place in zip(self.names, self.places, strict=True)]
        for name, place in zip(self.names, self.places, strict=True):
            _check_free(name, place)
        self.log = torch.tensor([math.log(x) for x in start], device=objective.device).requires_grad_()
        self.history = torch.zeros(total_steps, len(self.names), device=objective.device)
        self._numbers: list[float] = start

    def __len__(self) -> int:
        return len(self.names)

    @torch.no_grad()
    def values(self) -> Tensor:
        """As they are now, (S,)."""
        return self.log.exp()

    def moved(self) -> None:
        """After the logarithms have moved: the objective computes with the new values."""
        self._numbers = self.values().tolist()
        self._give(self._numbers)

    @contextmanager
    def held(self, values: Sequence[float | Tensor]) -> Iterator[None]:
        """Inside, the objective computes with other values, S numbers or tensors (), which may have derivatives."""
        self._give(values)
        try:
            yield
        finally:
            self._give(self._numbers)

    def pull_back(self, gradient: Tensor) -> Tensor:
        """The gradient by the logarithms of one by the values, (S,)."""
        return (gradient * self.values()).to(self.log.dtype)

    @torch.no_grad()
    def record(self, step: int) -> None:
        """Note what the values are at a step."""
        self.history[step] = self.log.exp()

    def columns(self, values: Tensor) -> dict[str, Tensor]:
        """Values per step, (T, S), as a schedule's ``scalars``."""
        return {name: values[:, n].cpu() for n, name in enumerate(self.names)}

    def state_dict(self, steps: int) -> dict[str, Any]:
        """What a resumed search needs after so many steps."""
        return {"log": self.log.detach().clone(), "history": self.history[:steps].clone()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Back to a state from `state_dict`."""
        self.log.copy_(state["log"])
        self.history[: len(state["history"])] = state["history"].to(self.history.device)
        self.moved()

    def _read(self, place: tuple[Term, str] | None) -> Any:
        if place is None:
            return self.objective.task_weight
        attribute, _, item = place[1].partition(".")
        value = getattr(place[0].loss, attribute)
        return value[int(item)] if item else value

    def _give(self, values: Sequence[float | Tensor]) -> None:
        for place, value in zip(self.places, values, strict=True):
            if place is None:
                self.objective.task_weight = value  # type: ignore[assignment]
            else:
                place[0].move(place[1], value)


def _place(name: str, by_key: dict[str, Term]) -> tuple[Term, str]:
    """The term of a scalar, and the path of the scalar in its loss."""
    owner = owner_of(name, list(by_key))
    if owner is None:
        known = ", ".join(by_key) or "none"
        raise UserError(
            f"search: scalar '{name}' is of no term{nearest(name.rpartition('.')[0], by_key)} (there are: {known})"
        )
    term, path = by_key[owner], name[len(owner) + 1 :]
    attribute, _, item = path.partition(".")
    allowed = getattr(term.loss, "scalars", None)
    if not hasattr(term.loss, attribute) or (allowed is not None and attribute not in allowed):
        raise UserError(
            f"search: '{path}' of term '{owner}' cannot move (allowed: {', '.join(allowed or ()) or 'none'})"
        )
    value = getattr(term.loss, attribute)
    count = len(value) if isinstance(value, (list, tuple)) else 0
    if count and not (item.isdecimal() and int(item) < count):
        raise UserError(
            f"search: '{path}' of term '{owner}' is a list: name an item, {attribute}.0 to {attribute}.{count - 1}"
        )
    return term, path


def _start(name: str, value: Any) -> float:
    if not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise UserError(
            f"search: scalar '{name}' starts from {value!r}; a learned one moves as its logarithm: state a start above 0, "
            "{learned: {initial: 1}}"
        )
    return float(value)


def _check_free(name: str, place: tuple[Term, str] | None) -> None:
    """Raise UserError for a scalar whose range leaves some positive numbers out."""
    allowed = getattr(place[0].loss, "ranges", {}).get(place[1].partition(".")[0]) if place else None
    if allowed is not None and (allowed.low > 0 or allowed.high < math.inf):
        raise UserError(f"search: scalar '{name}' must be {allowed}; one that is learned may become any number above 0")
