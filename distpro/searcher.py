"""The bilevel search (Algorithm 1, lines 1-7): learns α̃ while the student trains.

The searcher has no loop of its own. The trainer asks it for the weights of a step, shows it the step before and after
the optimiser has moved the parameters, and keeps its state in checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from distpro.hypergradient import Batch, Estimator, TrainingStep
from distpro.objective import Objective
from distpro.schedule import Schedule
from distpro.weighting import Weighting, drop
from pathways.registry import UserError


class Searcher:
    """α̃, its optimiser and its history.

    One step t, in the paper's notation, with the passes that it takes (T teacher, S student):

        θ_{t+1} = step(θ_t, ∇_θ L_train(θ_t, α_t))      T forward, S forward, S backward     (the trainer's own step)
        v       = ∇_θ L_val(θ_{t+1})                    S forward, S backward
        h_p     = λ ⟨∇_θ ℓ_p(θ_t), (∂θ_{t+1}/∂g)ᵀ v⟩    S forward-mode pass, or two more passes of S and all terms
        α̃_{t+1} = optimiser step on (∂w/∂α̃)ᵀ h

    Args:
        objective: with the terms to be weighted; all of them are.
        estimator: hypergradient estimator on the same objective and optimiser.
        weighting: α̃ → w.
        validation: endless batches of D_val.
        total_steps: T_search.
        learning_rate, optimizer, betas, momentum: of α̃'s own optimiser, ``adam`` or ``sgd``.
        every: steps between two updates of α̃.
        threshold: τ, drops terms during the search (their computation too); None drops none.
        revive_every: with a threshold, all terms are computed again in the first of every so many updates, so that a
            dropped term has a signal and may come back; 0 never.
    """

    def __init__(
        self,
        objective: Objective,
        estimator: Estimator,
        weighting: Weighting,
        validation: Iterator[Batch],
        total_steps: int,
        learning_rate: float = 0.05,
        optimizer: str = "adam",
        betas: tuple[float, float] = (0.5, 0.999),
        momentum: float = 0.0,
        every: int = 1,
        threshold: float | None = None,
        revive_every: int = 0,
    ):
        if not objective.entries:
            raise UserError("search: there is no term to weight")
        self.objective, self.estimator, self.weighting = objective, estimator, weighting
        self.validation = validation
        self.every = max(every, estimator.window)
        self.threshold, self.revive_every = threshold, revive_every
        device = next(objective.student.parameters()).device
        count = len(objective.entries)
        self.alpha_tilde = torch.ones(count, device=device, requires_grad=True)
        if optimizer == "adam":
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam([self.alpha_tilde], lr=learning_rate, betas=betas)
        else:
            self.optimizer = torch.optim.SGD([self.alpha_tilde], lr=learning_rate, momentum=momentum)
        self.history = torch.zeros(2, total_steps, count, device=device)  # α̃ and w per step, kept on the device
        self.steps_done = 0
        self.validation_steps = 0
        self._current: TrainingStep | None = None
        self.seconds = 0.0

    # What the trainer asks

    @torch.no_grad()
    def weights(self, step: int) -> Tensor | list[float]:
        """w of this step, without λ: a tensor, or a list whose zeros are terms that the threshold has dropped."""
        weights = self.weighting(self.alpha_tilde)
        self.history[0, step], self.history[1, step] = self.alpha_tilde, weights
        self.steps_done = step + 1
        updates = step // self.every
        if self.threshold is None or (self.revive_every and updates % self.revive_every == 0):
            return weights
        return drop(weights, self.alpha_tilde, self.threshold).tolist()

    def updates_after(self, step: int) -> bool:
        """Whether α̃ moves after this step."""
        return (step + 1) % self.every == 0

    def watches(self, step: int) -> bool:
        """Whether the estimator has to see this step: the last ``window`` ones before each update."""
        return self.every - 1 - step % self.every < self.estimator.window

    def before_update(self, step: TrainingStep) -> None:
        """After the backward pass, before the parameters move."""
        self.estimator.before_step(step)
        self._current = step

    def after_update(self, step: int) -> None:
        """After the parameters have moved: update α̃ if this step is one to do so."""
        if self._current is None or not self.updates_after(step):
            return
        start = time.perf_counter()
        h = self.estimator(self._current, next(self.validation))
        self.validation_steps += 1
        self._current = None
        # A dropped term has no signal; neither its own hypergradient nor a share through the normalisation's
        # denominator would mean anything, so its h is 0 and only the denominator moves it.
        self.alpha_tilde.grad = self.weighting.pull_back(self.alpha_tilde, h)
        self.optimizer.step()
        self.seconds += time.perf_counter() - start

    # State

    def schedule(self, steps_per_epoch: float, meta: dict[str, Any]) -> Schedule:
        """What has been learned so far."""
        entries = self.objective.entries
        alpha_tilde, weights = self.history[:, : self.steps_done].cpu()
        return Schedule(
            keys=tuple(e.key for e in entries),
            levels=torch.tensor([e.level or (0, 0, 0) for e in entries], dtype=torch.int64),
            transforms=tuple(e.transform_name for e in entries),
            alpha_tilde=alpha_tilde,
            weights=weights,
            steps_per_epoch=steps_per_epoch,
            meta=meta,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed search needs to go on to the same numbers."""
        return {
            "alpha_tilde": self.alpha_tilde.detach().clone(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history[:, : self.steps_done].clone(),
            "validation_steps": self.validation_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Back to a state from `state_dict`. The caller sets `validation` to start at ``validation_steps``."""
        with torch.no_grad():
            self.alpha_tilde.copy_(state["alpha_tilde"])
            self.steps_done = state["history"].shape[1]
            self.history[:, : self.steps_done] = state["history"].to(self.history.device)
        self.optimizer.load_state_dict(state["optimizer"])
        self.validation_steps = state["validation_steps"]


class FixedWeights:
    """The retrain's side of the same questions: the objective's own processes (constants, or a followed schedule)."""

    def __init__(self, objective: Objective):
        self.objective = objective

    def weights(self, step: int) -> list[float]:
        return list(self.objective.weights_at(step))

    def watches(self, step: int) -> bool:
        return False

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
