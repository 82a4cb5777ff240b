"""The keys of a search, of a retrain, and of what a search takes by its horizon."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from distpro.config.section import Section
from distpro.schedule_file import THRESHOLD
from pathways.space import Spec


class SearchConfig(Section):
    """How the weights are learned. What is null takes the value that goes with the horizon."""

    horizon: int | float | Literal["whole"] = Field(
        1,
        description="training steps that a gradient looks back: 1 (the paper, Section 3.2 and 3.3), a number of them, or a "
        "fraction of the training, whole: all of it",
    )
    rounds: int = Field(
        0,
        ge=0,
        description="in the place of one pass: whole trainings, each with a seed of its own and a gradient of all of it (the horizon is "
        "whole then), after which the weights move; what is worse is taken back",
    )
    knots: int = Field(
        1, ge=1, description="of rounds: moments between which log w is linear in time; 1: constant weights"
    )
    estimator: Spec = Field(
        "auto",
        description="auto: sweep with a horizon of several steps, else forward_mode, or finite_difference where the student "
        "has an operator without its rule",
    )
    weighting: Spec | None = Field(
        None,
        description="how weights are made of α̃ (`distpro list weightings`); null: biased_softmax, with a longer horizon log",
    )
    optimizer: Literal["adam", "sgd", "relative"] | None = Field(
        None, description="of α̃; null: adam, with a longer horizon relative"
    )
    learning_rate: float | None = Field(
        None, gt=0, description="γ; null: 0.05, of relative steps 4 divided by their number, after trials 2"
    )
    memory: float = Field(
        4.0,
        gt=0,
        description="GB that the steps of a horizon may take; where all do not fit, some are kept and the others trained again, and "
        "where that does not fit either it is shortened",
    )
    betas: tuple[float, float] = Field((0.5, 0.999), description="of adam on α̃")
    momentum: float | None = Field(
        None, ge=0, lt=1, description="of sgd and relative on α̃; null: 0, with a longer horizon 0.5"
    )
    per_rate: bool = Field(False, description="divide h by the learning rate's factor, to which it is proportional")
    every: int = Field(1, ge=1, description="steps between two updates of α; at least the horizon")
    trials: int | None = Field(
        None,
        ge=0,
        description="trainings on the search's part of the data, judged on its validation part: first for the strength of the "
        "equal weights that it starts from, then of what it has learned; null: 9 with a longer horizon, 0 with one of a step",
    )
    budget: float | None = Field(
        None,
        gt=0,
        description="trainings that a search over a longer horizon may cost in all, of which a pass is 4: trials, or rounds, are cut "
        "down to it; null: as they say",
    )
    criterion: Literal["task", "calibrated"] | None = Field(
        None,
        description="what of the validation part is to be small: the task loss (the paper), or the cross entropy at its best "
        "temperature, which does not ask how sure of itself a student is; null: task, with a longer horizon calibrated where the "
        "task's loss is a cross entropy",
    )
    validation_fraction: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="of the training samples, where the data have no validation part; null: 0.2, with a longer horizon more of few "
        "samples, so that there are 200 to judge by, but at most half",
    )
    normalise: Literal["none", "loss", "gradient"] | None = Field(
        None,
        description="make terms alike in size, see distpro.search.scales; null: by gradient, unless all are pathways",
    )
    normalise_batches: int = Field(4, gt=0, description="training batches to measure the terms' size on")
    validation_batch_size: int | None = Field(None, gt=0, description="samples; null: training.batch_size")
    validation_batches: int | None = Field(
        None,
        gt=0,
        description="batches of the validation part for one update; null: 1, with a longer horizon all of it",
    )
    threshold: float | None = Field(None, description="τ during the search; null drops nothing")
    revive_every: int = Field(0, ge=0, description="with a threshold: compute all terms in every so many updates")
    repeats: bool = Field(False, description="take each step again with the weights that it has led to")

    @field_validator("horizon")
    @classmethod
    def _some_steps(cls, horizon: Any) -> Any:
        if not isinstance(horizon, str) and not (horizon >= 1 if isinstance(horizon, int) else 0 < horizon < 1):
            raise ValueError("a number of steps from 1, a fraction between 0 and 1, or whole")
        return horizon

    @model_validator(mode="after")
    def _by_horizon(self) -> SearchConfig:
        if self.rounds:
            self.horizon = "whole"
        for name, (one, more) in _BY_HORIZON.items():
            if getattr(self, name) is None:
                setattr(self, name, one if self.horizon == 1 else more)
                self.model_fields_set.discard(name)  # nobody has stated it
        logarithmic = self.weighting in ("log", {"log": {}}, {"name": "log"})
        if self.trials is None:
            self.trials = TRIALS if self.horizon != 1 and logarithmic else 0
            self.model_fields_set.discard("trials")
        elif self.trials and not logarithmic:
            raise ValueError(
                f"trials need search.weighting log, which has a strength to choose; it is {self.weighting}"
            )
        if self.budget is not None:
            self._keep_to(self.budget)
        return self

    def _keep_to(self, budget: float) -> None:
        if self.horizon == 1:
            raise ValueError("a budget is for a longer search.horizon; one step back costs two or three trainings")
        assert self.trials is not None
        if self.rounds:
            before = self.trials_before
            most = int((budget - before - JUDGED_BY) / (PASS + JUDGED_BY))
            if most < 1:
                raise ValueError(
                    f"budget {budget:g}: a round and its judgement cost {PASS + JUDGED_BY} trainings, after {before + JUDGED_BY}"
                )
            self.rounds = min(self.rounds, most)
        elif budget < PASS:
            raise ValueError(f"budget {budget:g}: a pass alone costs {PASS} trainings")
        else:
            self.trials = min(self.trials, int(budget) - PASS)

    @property
    def trials_before(self) -> int:
        """Those of the trials that look for the strength from which a pass starts, at most. One pass has none where there are too few
        to find it: they are worth more behind it."""
        trials = self.trials or 0
        if self.rounds:
            return max(1, trials - AFTER) if trials else 0
        return trials - AFTER if trials >= AFTER + ENOUGH else 0

    @property
    def most_trials(self) -> int:
        """Trainings beside the passes, at most: for the start, and for what comes out."""
        if self.rounds:
            return self.trials_before + JUDGED_BY * (self.rounds + 1)
        return self.trials or 0

    def fraction_of(self, samples: int) -> float:
        """The validation part of so many training samples."""
        if self.validation_fraction is not None:
            return self.validation_fraction
        return 0.2 if self.horizon == 1 else min(max(0.2, 200 / max(samples, 1)), 0.5)

    def steps_back(self, total: int) -> int:
        """The horizon in steps, of a training of ``total``."""
        if self.horizon == "whole":
            return total
        steps = self.horizon if isinstance(self.horizon, int) else round(self.horizon * total)
        return min(max(steps, 1), total)


TRIALS = 9  # of a search over a longer horizon
PASS = 4
"""Trainings that the gradients of one are worth, rounded up (docs/performance.md)."""

AFTER = 4
"""Of the trials of a search in one pass, those that are kept for what it has learned."""

ENOUGH = 3
"""Trials that can find a strength: at it, and on both sides."""

JUDGED_BY = 2
"""Trainings, with seeds of their own, by which the weights that a round has led to are judged."""

_BY_HORIZON: dict[str, tuple[Any, Any]] = {
    "weighting": ("biased_softmax", "log"),
    "optimizer": ("adam", "relative"),
    "momentum": (0.0, 0.5),
    "criterion": ("task", "calibrated"),
}
"""What a search takes where its config says nothing: with a horizon of one step, and with a longer one."""


class RetrainConfig(Section):
    """How a schedule is replayed (Section 3.4). Start and threshold are what a search writes into its schedule; a retrain
    whose config says nothing of them, nor of λ (`training.distill_weight`, `distill_warmup`), takes the schedule's."""

    weights: Literal[
        "searched", "final", "mean", "shuffled", "permuted", "random", "equal", "uncertainty", "constant", "none"
    ] = Field("searched", description="the schedule, or a control, see distpro.weights.replay")
    start: float | None = Field(
        None,
        ge=0,
        le=1,
        description="fraction of the search that a replay leaves out at its beginning, where the weights are still on "
        "their way from where they all start (docs/results/one_step.md); 1: all but the last weights. null: a third, after a search "
        "over a longer horizon 1; the paper replays all of it, 0",
    )
    schedule: str | None = Field(None, description="an alpha.pt, if the command line gives none")
    threshold: float | None = Field(THRESHOLD, description="τ; null drops nothing")
    mapping: dict[str, str] = Field(
        {}, description="{term key: key in the schedule}, where they do not match by themselves"
    )
    training: dict[str, Any] = Field(
        {},
        description="what of `training` is different in a retrain; `training.` on the command line goes before what a file says here",
    )
