"""What every hypergradient estimator is: it answers how the validation loss after a training step depends on the weights of the terms (Eq. 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from distpro.batch import Batch
from distpro.features import TrainingPass
from distpro.objective import Objective
from distpro.search.estimators.step import StepDerivative
from distpro.train import distributed
from distpro.train.state import no_trace
from pathways.registry import Registry

ESTIMATORS = Registry("hypergradient estimator")


@dataclass
class TrainingStep:
    """One training step as an estimator has to know it.

    Attributes:
        batch: what was trained on.
        weights: w, (N,), without λ.
        scale: λ, or (N,) the factor on each entry of w.
        theta: trainable parameters before the step.
        state: random state before the forward pass.
        done: the forward pass, backward done.
    """

    batch: Batch
    weights: Tensor
    scale: float | Tensor
    theta: dict[nn.Parameter, Tensor]
    state: dict[str, Tensor]
    done: TrainingPass


class Estimator:
    """Common part: the objective, the optimiser, and the gradient of the validation loss.

    Attributes:
        name: in a config.
        needs_views: whether the training backward has to keep every term's gradient by its inputs.
        window: training steps that one hypergradient looks at.
    """

    name: ClassVar[str]
    needs_views = False
    window = 1

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        max_norm: float | None = None,
        clip_by: str = "all",
    ):
        self.objective, self.optimizer = objective, optimizer
        self.derivative = StepDerivative(optimizer, max_norm, objective.clip_groups(clip_by))
        self.validation_loss = torch.zeros(())

    def before_step(self, step: TrainingStep) -> None:
        """After the backward pass of a step that counts, before clipping and ``optimizer.step()``."""
        self.derivative.before_step()

    def __call__(self, step: TrainingStep, validation: Batch) -> Tensor:
        """h = ∂L_val/∂w, (N,), after ``optimizer.step()``."""
        raise NotImplementedError

    def direction(self, step: TrainingStep, validation: Batch) -> dict[nn.Parameter, Tensor]:
        """u = (∂θ_{t+1}/∂g)ᵀ ∇L_val(θ_{t+1}). One forward and one backward pass of the student."""
        params = [p for p in self.objective.student.parameters() if p.requires_grad]
        with no_trace(self.objective.student):
            output, _ = self.objective.run_student(validation)
            loss = self.objective.task_loss_of(output, validation)
            gradients = torch.autograd.grad(loss, params, allow_unused=True)
        self.validation_loss = loss.detach()
        averaged = distributed.average_where_any(gradients, params)
        v = {p: g for p, g in zip(params, averaged, strict=True) if g is not None}
        return self.derivative(v, step.theta)
