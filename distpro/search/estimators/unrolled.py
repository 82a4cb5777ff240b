"""Exact hypergradients through K training steps, with differentiable optimiser steps of `higher`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import higher
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from distpro.batch import Batch
from distpro.objective import Objective
from distpro.search.estimators.base import Estimator, TrainingStep
from distpro.search.estimators.formulas import Formulas
from distpro.search.estimators.start import Start
from distpro.search.estimators.swap import swapped
from distpro.train.state import no_trace, set_random_state
from pathways.registry import UserError


class _DifferentiableAdam(higher.optim.DifferentiableOptimizer):
    """Adam and AdamW as torch steps them. (higher's own Adam adds eps before the bias correction and has no decoupled
    weight decay, so its step is another one.)"""

    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        for number, (group, gradients) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
            beta1, beta2 = group["betas"]
            for n, (p, g) in enumerate(zip(group["params"], gradients, strict=True)):
                if g is None:
                    continue
                state = self.state[number][n]
                step = state["step"] = float(state.get("step", 0)) + 1
                if group["decoupled_weight_decay"]:
                    p = p * (1 - group["lr"] * group["weight_decay"])
                else:
                    g = g + group["weight_decay"] * p
                mean = state["exp_avg"] = beta1 * state.get("exp_avg", 0) + (1 - beta1) * g
                square = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", 0) + (1 - beta2) * g * g
                positive = square > 0  # the root's slope at zero would turn 0 · ∞ into nan
                root = torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)
                denominator = root / (1 - beta2**step) ** 0.5 + group["eps"]
                group["params"][n] = p - group["lr"] / (1 - beta1**step) * mean / denominator


_DIFFERENTIABLE = {
    torch.optim.SGD: higher.optim.DifferentiableSGD,
    torch.optim.Adam: _DifferentiableAdam,
    torch.optim.AdamW: _DifferentiableAdam,
}


class Unrolled(Estimator):
    """Exact derivative through K real steps with differentiable optimiser steps of `higher`.

    The K steps of a window are repeated from its first parameters with the same batches, weights and random numbers,
    keeping the graph, and L_val of the end point is differentiated back to w. Costs K more training steps and their
    memory. With ``steps = 1`` it is `forward_mode` by another road. A run stops, and keeps
    checkpoints, between windows only.
    """

    name = "unrolled"

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        max_norm: float | None = None,
        clip_by: str = "all",
        steps: int = 1,
    ):
        super().__init__(objective, optimizer, max_norm, clip_by)
        if steps < 1:
            raise UserError(f"unrolled: steps must be at least 1, got {steps}")
        self.window = steps
        self._steps: list[TrainingStep] = []
        self._first: Start | None = None
        self._learning_rates: list[dict[str, list[float]]] = []
        self._differentiable: Any = None

    def before_step(self, step: TrainingStep) -> None:
        if not self._steps:
            self._first = self.start
            params = [p for g in self.optimizer.param_groups for p in g["params"]]
            self._differentiable = _DIFFERENTIABLE[type(self.optimizer)](self.optimizer, params)
        self._steps.append(step)
        self._learning_rates.append({"lr": [float(g["lr"]) for g in self.optimizer.param_groups]})

    def __call__(self, step: TrainingStep, validation: Sequence[Batch]) -> Tensor:
        params = [p for g in self.optimizer.param_groups for p in g["params"]]
        values: Sequence[Tensor] = [self._steps[0].theta[p].detach().requires_grad_() for p in params]
        weights = step.weights.detach().clone().requires_grad_()
        place = {p: n for n, p in enumerate(params)}
        groups = [[place[p] for p in group] for group in self.derivative.groups]
        clip = None if self.derivative.max_norm is None else _clip(self.derivative.max_norm, groups)
        untraced = no_trace(self.objective.student, self.objective.terms)
        with untraced, torch.enable_grad(), Formulas(), sdpa_kernel(SDPBackend.MATH), _without_checkpointing():
            if self._first is not None:
                self._first.put_back()
            for past, rates in zip(self._steps, self._learning_rates, strict=True):
                set_random_state(past.state)
                with swapped(self.objective, dict(zip(params, values, strict=True))):
                    taught = past.done.teacher or None
                    loss = self.objective.training_pass(past.batch, past.scale * weights, teacher=taught).loss
                values = self._differentiable.step(loss, params=values, override=rates, grad_callback=clip)
            with swapped(self.objective, dict(zip(params, values, strict=True))):
                losses = [
                    self.judge(self.objective.run_student(batch)[0], batch) * batch.samples for batch in validation
                ]
            self.validation_loss = torch.stack(losses).sum() / sum(batch.samples for batch in validation)
            (h,) = torch.autograd.grad(self.validation_loss, weights)
        self.validation_loss = self.validation_loss.detach()
        self._steps, self._learning_rates = [], []
        return h


@contextmanager
def _without_checkpointing() -> Iterator[None]:
    """The last backward pass goes through all steps, and activation checkpointing would compute them again with the parameters of
    the moment. Raises UserError where the student does that."""
    reason = "unrolled: the student computes activations again in the backward pass (activation checkpointing), which has to be off"
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(reason):
            yield
    except RuntimeError as error:
        if reason in str(error):
            raise UserError(f"{reason}; or use search.estimator=sweep") from None
        raise


def _clip(max_norm: float, groups: Sequence[Sequence[int]]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """Clips the gradients at the places of each group together."""

    def scale(gradients: Sequence[Tensor]) -> list[Tensor]:
        scaled = list(gradients)
        for group in groups:
            squares = [gradients[n].square().sum() for n in group if gradients[n] is not None]
            if squares:
                factor = (max_norm / (torch.stack(squares).sum().sqrt() + 1e-6)).clamp(max=1.0)
                for n in group:
                    scaled[n] = scaled[n] if scaled[n] is None else scaled[n] * factor
        return scaled

    return scale
