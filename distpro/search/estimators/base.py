"""What every hypergradient estimator is: it answers how the validation loss after a training step depends on the weights of the terms (Eq. 4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from distpro.batch import Batch
from distpro.features import Reader, TrainingPass
from distpro.objective import Objective
from distpro.search.estimators.start import Start
from distpro.search.estimators.step import StepDerivative
from distpro.search.estimators.swap import moved, swapped
from distpro.search.learned import LearnedScalars
from distpro.tasks import calibrated_loss
from distpro.train import distributed
from distpro.train.state import no_trace, set_random_state
from pathways.registry import Registry, UserError

ESTIMATORS = Registry("hypergradient estimator")
REPEATED = 1e-3
"""Largest difference of the losses of a pass that is done again, of the largest loss, that counts as rounding (of a GPU's
atomic sums)."""


def refuse_gradient_hooks(model: nn.Module) -> None:
    """Raise UserError where a parameter has a hook on its gradient: it changes the training step, and a hypergradient does not know
    how; a copy of the model has lost it."""
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise UserError(
                f"search: parameter '{name}' has a hook on its gradient, which a search does not follow; freeze what is not to be "
                "trained (requires_grad, `freeze`), use training.clip_norm, or search without the hook and retrain with it"
            )


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
        number: of the step in the training.
        scalars: the numbers beside the weights that are learned, (S,); None where there are none.
        weighted: scale · w as the pass was given it, where that has dropped terms; None: the product.
    """

    batch: Batch
    weights: Tensor
    scale: float | Tensor
    theta: dict[nn.Parameter, Tensor]
    state: dict[str, Tensor]
    done: TrainingPass
    number: int = 0
    scalars: Tensor | None = None
    weighted: Sequence[float] | Tensor | None = None


class Estimator:
    """Common part: the objective, the optimiser, and the gradient of the validation loss.

    Attributes:
        name: in a config.
        needs_views: whether the training backward has to keep every term's gradient by its inputs.
        window: training steps that one hypergradient looks at.
        learns_scalars: whether it gives the derivatives by numbers beside the weights.
        scalars: those numbers; None where there are none.
        start: what the last pass that counts began with besides parameters; None where that is not kept.
        calibrated: whether the validation loss is that of the task's ``rows`` at their best temperature, see `judge`.
    """

    name: ClassVar[str]
    needs_views = False
    window = 1
    learns_scalars: ClassVar[bool] = False
    scalars: LearnedScalars | None = None

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        max_norm: float | None = None,
        clip_by: str = "all",
    ):
        for model in (objective.student.model, objective.terms):
            refuse_gradient_hooks(model)
        self.objective, self.optimizer = objective, optimizer
        self.derivative = StepDerivative(optimizer, max_norm, objective.clip_groups(clip_by))
        self.validation_loss = torch.zeros(())
        self.calibrated = False
        self.start: Start | None = None

    def before_pass(self) -> None:
        """Before the forward pass of a step that counts."""
        self.start = Start(self.objective)

    def begin_again(self, step: TrainingStep) -> None:
        """Let everything besides the parameters be what the step's pass began with."""
        if self.start is not None:
            self.start.put_back()
        set_random_state(step.state)

    @contextmanager
    def repeating_at(self, theta: dict[nn.Parameter, Tensor]) -> Iterator[None]:
        """The parameters as a pass that is done again has them. What a model reads otherwise is then far off: a step alone may
        have moved it by less than rounding."""
        with moved(theta), swapped(self.objective, theta):
            yield

    def check(self, step: TrainingStep) -> None:
        """Raise UserError where the step's pass, done again, gives other losses. After ``optimizer.step()``."""
        if self.start is None or self.objective.backend is not None:
            return  # CUDA graphs would overwrite what the step has kept
        weighted = step.scale * step.weights if step.weighted is None else step.weighted
        with no_trace(self.objective.student, self.objective.terms), torch.enable_grad():
            self.begin_again(step)
            with self.repeating_at(step.theta):
                again = self.objective.training_pass(step.batch, weighted, teacher=step.done.teacher or None)
        before, after = (torch.cat([done.task.reshape(1), done.terms]).double() for done in (step.done, again))
        off = ((after - before).abs().max() / before.abs().max().clamp(min=1e-30)).item()
        if distributed.any_of(off > REPEATED):
            raise UserError(
                f"search: a training pass that is done again gives other losses (they differ by {off:.1e} of the largest), and the "
                "search would follow another training: the student or a loss writes to its input, keeps something that cannot "
                "be put back (a frozen parameter that it updates, a file, a library's object), or reads a weight by another way "
                "than its modules (from a function, a partial, an object, which search.estimator finite_difference follows)"
            )

    def before_step(self, step: TrainingStep) -> None:
        """After the backward pass of a step that counts, before clipping and ``optimizer.step()``."""
        self.derivative.before_step()

    def __call__(self, step: TrainingStep, validation: Sequence[Batch]) -> Tensor:
        """h = ∂L_val/∂w, (N,), after ``optimizer.step()``; and by the learned scalars behind it, (N + S,). L_val is the mean
        over the samples of the batches."""
        raise NotImplementedError

    def direction(self, step: TrainingStep, validation: Sequence[Batch]) -> dict[nn.Parameter, Tensor]:
        """u = (∂θ_{t+1}/∂g)ᵀ ∇L_val(θ_{t+1}). A forward and a backward pass of the student per batch."""
        return self.derivative(self.validation_gradient(validation), step.theta)

    def judge(self, output: Any, batch: Batch) -> Tensor:
        """L_val of a batch: the task loss; where ``calibrated``, that at its best temperature, see
        `distpro.tasks.calibration`."""
        if self.calibrated:
            task = self.objective.task
            logits, target = task.rows(Reader(task, batch).plain(output), batch)  # type: ignore[attr-defined]
            return calibrated_loss(logits, target, _averaged)
        return self.objective.task_loss_of(output, batch)

    def validation_gradient(self, batches: Sequence[Batch]) -> dict[nn.Parameter, Tensor]:
        """∇L_val at the student's parameters as they are now, of those that have one; notes the loss."""
        params = [p for p in self.objective.student.parameters() if p.requires_grad]
        samples = sum(batch.samples for batch in batches)
        loss, summed = torch.zeros(()), list[Tensor | None]([None] * len(params))
        with no_trace(self.objective.student):
            for number, batch in enumerate(batches):
                output, _ = self.objective.run_student(batch)
                part = self.judge(output, batch)
                part = part if len(batches) == 1 else part * (batch.samples / samples)
                gradients = torch.autograd.grad(part, params, allow_unused=True)
                summed = [g if s is None else s if g is None else s + g for s, g in zip(summed, gradients, strict=True)]
                loss = loss + part.detach() if number else part.detach()
        self.validation_loss = loss
        averaged = distributed.average_where_any(summed, params)
        return {p: g for p, g in zip(params, averaged, strict=True) if g is not None}


def _averaged(scalar: Tensor) -> Tensor:
    """Over all processes."""
    distributed.average([scalar])
    return scalar
