"""Who says what the weights of the terms are at a step: the protocol, and the replay of a schedule or a control."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from distpro.objective import Evaluation, Objective
from distpro.schedule import Schedule
from pathways.registry import UserError


class Weights(Protocol):
    """Who says what the weights are: `Searcher` or `Replay`."""

    def weights(self, step: int) -> Sequence[float] | Tensor:
        """λ·w of every entry of the vector of term losses."""

    def watches(self, step: int) -> bool:
        """Whether `before_update` and `after_update` are to be called for this step."""

    needs_views: bool
    """Whether watched steps need each term's own gradient."""
    repeats: bool
    """Whether a step is taken again after the weights have moved (a literal Algorithm 1)."""

    def before_update(self, step: int, batch: Any, state: dict[str, Tensor], evaluation: Evaluation) -> None:
        """After the backward pass of a watched step; ``state`` is the random state before it."""

    def after_update(self, step: int) -> bool:
        """After the parameters have moved in a watched step; says whether the weights have moved too."""

    def resumable(self, steps: int) -> bool:
        """Whether a run that is left after so many steps can be gone on with to the same numbers."""

    def scalars(self) -> dict[str, Tensor]:
        """What to log."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


CONTROLS: dict[str, Callable[[Schedule, int], Schedule]] = {
    "searched": lambda schedule, seed: schedule,
    "final": lambda schedule, seed: schedule.final(),
    "mean": lambda schedule, seed: schedule.mean(),
    "shuffled": Schedule.shuffled,
    "permuted": Schedule.permuted,
    "random": Schedule.random,
}
"""What a retrain does with a schedule, by the name in ``retrain.weights``."""


class Replay:
    """The weights that an objective's own processes say: constants, or the schedule that it follows."""

    needs_views = repeats = False

    def __init__(self, objective: Objective):
        self.objective = objective

    def weights(self, step: int) -> Sequence[float]:
        return self.objective.weights_at(step)

    def watches(self, step: int) -> bool:
        return False

    def resumable(self, steps: int) -> bool:
        return True

    def before_update(self, step: int, batch: Any, state: dict[str, Tensor], evaluation: Evaluation) -> None:
        raise AssertionError("a replay watches no step")

    def after_update(self, step: int) -> bool:
        return False

    def scalars(self) -> dict[str, Tensor]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def replay(
    objective: Objective,
    how: str,
    total_steps: int,
    schedule: Schedule | None = None,
    threshold: float | None = None,
    scale: float | Callable[[int], float] = 1.0,
    mapping: Mapping[str, str] | None = None,
    start: float = 0.0,
    seed: int = 0,
) -> Replay:
    """Let ``objective`` follow a schedule or a control.

    Args:
        how: ``searched`` (the schedule, interpolated to ``total_steps``), one of its controls ``final`` (its last
            weights at every step), ``mean``, ``shuffled``, ``permuted`` and ``random`` (see `Schedule`), ``equal``
            (1/L for each of the L terms without a constant weight, times its scale if a schedule has one),
            ``constant`` (every term's own weight) or ``none`` (no term at all).
        threshold, scale, mapping: see `Objective.follow`.
        start: fraction of the search that is left out at its beginning, where its weights are still those that it has
            started from.
        seed: of the random controls.

    Raises UserError if there is no schedule where one is needed, or one that does not fit.
    """
    if how == "none":
        objective.keep([])
    elif how == "equal":
        scales = {} if schedule is None else dict(zip(schedule.keys, schedule.scales.tolist(), strict=True))
        objective.follow_equal(scale, scales)
    elif how in CONTROLS:
        if schedule is None:
            raise UserError(f"retrain.weights is '{how}', which needs a schedule: give --schedule alpha.pt")
        objective.follow(CONTROLS[how](schedule.after(start), seed), total_steps, threshold, scale, mapping)
    return Replay(objective)
