"""The bilevel search (Algorithm 1, lines 1-7): learns α̃ while the student trains.

The searcher has no loop of its own. The trainer asks it for the weights of a step, shows it the step before and after
the optimiser has moved the parameters, and keeps its state in checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from distpro.batch import Batch
from distpro.console import note
from distpro.features import TrainingPass
from distpro.objective import Objective
from distpro.schedule import Schedule, drop
from distpro.search.estimators.base import Estimator, TrainingStep
from distpro.search.learned import Constants, LearnedScalars
from distpro.search.relative import RelativeStep
from distpro.search.signal import Signal
from distpro.search.weighting import Weighting
from distpro.train import distributed
from pathways.registry import UserError


class Searcher:
    """α̃, its optimiser and its history.

    One step t, in the paper's notation, with the passes that it takes (T teacher, S student):

        θ_{t+1} = step(θ_t, ∇_θ L_train(θ_t, α_t))      T forward, S forward, S backward     (the trainer's own step)
        v       = ∇_θ L_val(θ_{t+1})                    S forward, S backward
        h_p     = λ ⟨∇_θ ℓ_p(θ_t), (∂θ_{t+1}/∂g)ᵀ v⟩    S forward-mode pass, or two more passes of S and all terms
        α̃_{t+1} = optimiser step on (∂w/∂α̃)ᵀ h

    Args:
        objective: with the terms to be weighted: those without a constant weight.
        estimator: hypergradient estimator on the same objective and optimiser.
        weighting: α̃ → w.
        validation: ``validation(start)`` gives the endless batches of D_val from number ``start`` on.
        total_steps: T_search.
        learning_rate, optimizer, betas, momentum: of α̃'s own optimiser, ``adam``, ``sgd`` or ``relative``.
        every: steps between two updates of α̃.
        threshold: τ, drops terms during the search (their computation too); None drops none.
        repeats: take each step again with the weights that it has led to, as DARTS and a literal Algorithm 1 do; about
            twice the cost.
        scale: λ, or a function of the step that gives it.
        measure: gives the factor on each entry's loss that makes the terms alike in size, (N,), see `distpro.search.scales`;
            called once, before the first step, see `measure`. None leaves the losses as they are.
        rate: the learning rate's factor in the present step, by which h is divided: h is proportional to the learning
            rate, and an optimiser of α̃ with a long memory (Adam) would take small steps for long after it has dropped.
        validation_batches: batches of D_val that one update looks at.
        shows_last_update: where the last step ends with an update, let the history's last row be what that has led to, in
            place of the weights that the step has had: of a few large updates, each counts.
        revive_every: with a threshold, all terms are computed again in the first of every so many updates, so that a
            dropped term has a signal and may come back; 0 never.
        scalars: names of the numbers beside the weights that are learned too, see `distpro.search.learned`. Their logarithms and
            α̃ are one group of the optimiser: of a weighting ``log``, all are changes by a factor, in one unit.

    Attributes:
        beside: those numbers.
        path: α̃ per step, (T, N), in the place of one that moves, of a search whose rounds move it; set it before the first step.
        signal: what the gradients by α̃, and by the logarithms of those numbers, said so far.

    Raises UserError where there is nothing to learn, and for scalars with an estimator that does not see them.
    """

    def __init__(
        self,
        objective: Objective,
        estimator: Estimator,
        weighting: Weighting,
        validation: Callable[[int], Iterator[Batch]],
        total_steps: int,
        learning_rate: float = 0.05,
        optimizer: str = "adam",
        betas: tuple[float, float] = (0.5, 0.999),
        momentum: float = 0.0,
        every: int = 1,
        threshold: float | None = None,
        revive_every: int = 0,
        repeats: bool = False,
        scale: float | Callable[[int], float] = 1.0,
        measure: Callable[[], Tensor] | None = None,
        rate: Callable[[], float] = lambda: 1.0,
        validation_batches: int = 1,
        shows_last_update: bool = False,
        scalars: Sequence[str] = (),
    ):
        check_learned(objective, estimator, scalars)
        learned = [n for n, constant in enumerate(objective.constants_at(0)) if constant is None]
        self.objective, self.estimator, self.weighting = objective, estimator, weighting
        self.beside = LearnedScalars(objective, scalars, total_steps)
        estimator.scalars = self.beside if scalars else None
        self._validation_from = validation
        self.validation = validation(0)
        self.every = max(every, estimator.window)
        self.threshold, self.revive_every, self.repeats = threshold, revive_every, repeats
        self.needs_views = estimator.needs_views
        device = next(objective.student.parameters()).device
        self.scale = scale if callable(scale) else lambda step: scale
        self.entries = [objective.entries[n] for n in learned]
        self.learned = torch.tensor(learned, device=device)
        self._measure, self._rate = measure, rate
        self.scales = torch.ones(len(learned), device=device)
        count = len(learned)
        self.signal = Signal(count + len(self.beside), device)
        self.validation_batches, self.shows_last_update = validation_batches, shows_last_update
        self.alpha_tilde = weighting.start(count).to(device).requires_grad_()
        moved = [self.alpha_tilde, self.beside.log] if scalars else [self.alpha_tilde]
        if optimizer == "relative":
            self.optimizer: torch.optim.Optimizer = RelativeStep(moved, lr=learning_rate, momentum=momentum)
        elif optimizer == "adam":
            self.optimizer = torch.optim.Adam(moved, lr=learning_rate, betas=betas)
        else:
            self.optimizer = torch.optim.SGD(moved, lr=learning_rate, momentum=momentum)
        self.history = torch.zeros(2, total_steps, count, device=device)  # α̃ and w per step, kept on the device
        self.steps_done = 0
        self.validation_steps = 0
        self._current: TrainingStep | None = None
        self._checked = False  # whether a pass can be done again
        self._known_constants: tuple[list[float], Tensor] = ([], torch.empty(0))
        self._weights = self._constants(0)
        self._weighted: Tensor | list[float] = self._weights
        self.path: Tensor | None = None

    # What the trainer asks

    @torch.no_grad()
    def weights(self, step: int) -> Tensor | list[float]:
        """λ·w of every entry: a tensor, or a list whose zeros are terms that the threshold has dropped."""
        if self.watches(step):
            self.estimator.before_pass()
        self.measure()
        alpha_tilde = self.alpha_tilde if self.path is None else self.path[step]
        weights = self.weighting(alpha_tilde)
        self.history[0, step], self.history[1, step] = alpha_tilde, weights
        self.beside.record(step)
        self.steps_done = step + 1
        updates = step // self.every
        dropping = self.threshold is not None and not (self.revive_every and updates % self.revive_every == 0)
        if dropping:
            weights = drop(weights, alpha_tilde, self.threshold)
        constants = self._constants(step)
        self._weights = constants.index_copy(0, self.learned, weights)
        effective = constants.index_copy(0, self.learned, self.scale(step) * self.scales * weights)
        self._weighted = effective.tolist() if dropping else effective
        return self._weighted

    def measure(self) -> None:
        """Make the terms alike in size, where that is not done yet."""
        if self._measure is not None:
            self.scales = self._measure()[self.learned].to(self.scales)
            self._measure = None

    def measured(self, scales: Tensor) -> None:
        """Take the terms' sizes, (N,), as another search has measured them."""
        self.scales, self._measure = scales.clone(), None

    @torch.no_grad()
    def last(self) -> Constants:
        """What the search has come to; what it begins with before its first step."""
        if self.steps_done:
            row = self.steps_done - 1
            return Constants(self.history[1, row].clone(), self.beside.history[row].clone())
        return Constants(self.weighting(self.alpha_tilde).clone(), self.beside.values())

    @torch.no_grad()
    def start_from(self, weights: Tensor) -> None:
        """Begin with other weights, (N,), of a search whose α̃ is log w."""
        self.alpha_tilde.copy_(weights.log())

    def play(self, process: Tensor) -> None:
        """Let log w, (T, N), be the history, of a search whose α̃ is log w."""
        self.history[:] = torch.stack([process, process.exp()])

    @torch.no_grad()
    def end_with(self, values: Constants) -> None:
        """Let other values be the last ones of the history, of a search whose α̃ is log w."""
        row = self.steps_done - 1
        self.history[0, row], self.history[1, row] = values.weights.log(), values.weights
        self.beside.history[row] = values.scalars

    def _constants(self, step: int) -> Tensor:
        """Weight of each entry that is not searched, (N,), 0 for those that are."""
        weights = [constant or 0.0 for constant in self.objective.constants_at(step)]
        if weights != self._known_constants[0]:  # a copy to the device only where a process has moved
            self._known_constants = weights, torch.tensor(weights, device=self.learned.device)
        return self._known_constants[1]

    def updates_after(self, step: int) -> bool:
        """Whether α̃ moves after this step."""
        return (step + 1) % self.every == 0

    def watches(self, step: int) -> bool:
        """Whether the estimator has to see this step: the last ``window`` ones before each update."""
        return self.every - 1 - step % self.every < self.estimator.window

    def resumable(self, steps: int) -> bool:
        """Not between the steps that one hypergradient looks at."""
        return steps % self.every == 0 or not self.watches(steps - 1)

    def before_update(self, step: int, batch: Batch, state: dict[str, Tensor], done: TrainingPass) -> None:
        """After the backward pass, before the parameters move. ``state``: random state before the forward pass."""
        theta = {p: p.detach().clone() for p in self.objective.trainable_parameters()}
        scale = torch.ones_like(self._weights).index_copy_(0, self.learned, self.scale(step) * self.scales)
        scalars = self.beside.values() if len(self.beside) else None
        self._current = TrainingStep(batch, self._weights, scale, theta, state, done, step, scalars, self._weighted)
        self.estimator.before_step(self._current)

    def after_update(self, step: int) -> bool:
        """After the parameters have moved: update α̃ if this step is one to do so, and say whether it was."""
        if self._current is None or not self.updates_after(step):
            return False
        validation = [next(self.validation) for _ in range(self.validation_batches)]
        if not self._checked:
            self.estimator.check(self._current)
            self._checked = True
        h = self.estimator(self._current, validation)
        self.validation_steps += len(validation)
        self._current = None
        h = h / (self._rate() or 1.0)
        distributed.average([h, self.estimator.validation_loss])
        if self.path is not None:
            return False
        if (
            self.estimator.window > 1 and not h.isfinite().all()
        ):  # one step back, that would be a look at every step's numbers
            if distributed.is_main():
                note(f"search: step {step + 1}: the gradient is not finite, the weights stay as they are")
            return False
        self.alpha_tilde.grad = self.weighting.pull_back(self.alpha_tilde, h[self.learned])
        self.beside.log.grad = self.beside.pull_back(h[len(self._weights) :])
        self.signal.add(torch.cat([self.alpha_tilde.grad, self.beside.log.grad]))
        self.optimizer.step()
        self.beside.moved()
        if self.shows_last_update and step + 1 == self.history.shape[1]:
            with torch.no_grad():
                self.history[0, step], self.history[1, step] = self.alpha_tilde, self.weighting(self.alpha_tilde)
            self.beside.record(step)
        return True

    def scalars(self) -> dict[str, Tensor]:
        """α̃ and w of every searched term, what is learned beside them, the validation loss once it was looked at."""
        looked = self.steps_done >= self.every
        values = {"search/validation_loss": self.estimator.validation_loss} if looked else {}
        for name, row in zip(("alpha_tilde", "alpha"), self.history[:, self.steps_done - 1].cpu(), strict=True):
            values |= {f"{name}/{entry.key}": value for entry, value in zip(self.entries, row, strict=True)}
        beside = self.beside.history[self.steps_done - 1].cpu()
        return values | {f"scalar/{name}": value for name, value in zip(self.beside.names, beside, strict=True)}

    # State

    def schedule(
        self,
        steps_per_epoch: float,
        meta: dict[str, Any],
        constant: Constants | None = None,
        process: Tensor | None = None,
        **meaning: Any,
    ) -> Schedule:
        """What has been learned so far; or ``constant`` values, or a ``process`` log w (T, N), of a search whose α̃ is log w.
        ``meaning``: what a replay makes of it, see `distpro.schedule_file.meaning_of`."""
        entries = self.entries
        if self.signal.updates:
            names = (*(e.key for e in entries), *self.beside.names)
            gradients = dict(zip(names, self.signal.rows(), strict=True))
            meta = {**meta, "gradients": {"updates": self.signal.updates, "of": gradients}}
        alpha_tilde, weights = self.history[:, : self.steps_done].cpu()
        beside = self.beside.history[: self.steps_done]
        if constant is not None:
            alpha_tilde, weights = constant.weights[None].log().cpu(), constant.weights[None].cpu()
            beside = constant.scalars[None]
        if process is not None:
            alpha_tilde, weights = process.cpu(), process.exp().cpu()
        return Schedule(
            keys=tuple(e.key for e in entries),
            levels=torch.tensor([e.level or (0, 0, 0) for e in entries], dtype=torch.int64),
            transforms=tuple(e.transform_name for e in entries),
            alpha_tilde=alpha_tilde,
            weights=weights,
            scales=self.scales.cpu(),
            steps_per_epoch=steps_per_epoch,
            meta=meta,
            scalars=self.beside.columns(beside),
            **meaning,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed search needs to go on to the same numbers."""
        beside = {"scalars": self.beside.state_dict(self.steps_done)} if len(self.beside) else {}
        swept = {} if self.path is None else {"per_step": self.estimator.per_step}  # type: ignore[attr-defined]
        return {
            **beside,
            **swept,
            "alpha_tilde": self.alpha_tilde.detach().clone(),
            "optimizer": self.optimizer.state_dict(),
            "scales": self.scales.clone(),
            "measured": self._measure is None,
            "history": self.history[:, : self.steps_done].clone(),
            "signal": self.signal.state_dict(),
            "validation_steps": self.validation_steps,
            "validation_loss": self.estimator.validation_loss,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Back to a state from `state_dict`."""
        with torch.no_grad():
            self.alpha_tilde.copy_(state["alpha_tilde"])
            self.scales.copy_(state["scales"])
            if state.get("measured", True):  # not of a run that was stopped inside its first window
                self._measure = None
            self.steps_done = state["history"].shape[1]
            self.history[:, : self.steps_done] = state["history"].to(self.history.device)
        if len(self.beside):
            self.beside.load_state_dict(state["scalars"])
        self.optimizer.load_state_dict(state["optimizer"])
        if "per_step" in state:
            self.estimator.per_step = state["per_step"].to(self.history.device)  # type: ignore[attr-defined]
        if "signal" in state:  # not in checkpoints of before
            self.signal.load_state_dict(state["signal"])
        self.validation_steps = state["validation_steps"]
        self.estimator.validation_loss = state["validation_loss"].to(self.history.device)
        self.validation = self._validation_from(self.validation_steps)


def check_learned(objective: Objective, estimator: Estimator | type[Estimator], scalars: Sequence[str]) -> None:
    """Raise UserError where there is nothing to learn, and for numbers beside the weights that an estimator does not see."""
    if all(constant is not None for constant in objective.constants_at(0)):
        raise UserError("search: there is no term whose weight is to be learned")
    if scalars and not estimator.learns_scalars:
        raise UserError(
            f"search: {', '.join(scalars)} can be learned by a search over a horizon alone (search.horizon: several steps, "
            f"search.estimator: sweep); this one has {estimator.name}"
        )
