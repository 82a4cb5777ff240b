"""The hypergradient by central differences of the term losses (Eq. 5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distpro.batch import Batch
from distpro.objective import Objective
from distpro.search.estimators.base import ESTIMATORS, Estimator, TrainingStep
from distpro.train.state import no_trace
from pathways.registry import UserError


@ESTIMATORS.register("finite_difference")
class FiniteDifference(Estimator):
    """Central difference of the vector of term losses along u (Eq. 5): two more passes of student and terms.

    h_p = λ [ℓ_p(θ_t + εu) − ℓ_p(θ_t − εu)] / 2ε with ε = ``epsilon`` / ‖u‖, 0.01 as in DARTS (u is −ξ∇L_val for plain
    SGD, so this is the paper's perturbation). The passes run in full precision: under bf16 the difference is noise.
    A term of weight zero is not computed: its h_p is 0.
    """

    name = "finite_difference"

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        max_norm: float | None = None,
        clip_by: str = "all",
        epsilon: float = 0.01,
    ):
        super().__init__(objective, optimizer, max_norm, clip_by)
        if epsilon <= 0:
            raise UserError(f"finite_difference: epsilon must be positive, got {epsilon}")
        self.epsilon = epsilon

    @contextmanager
    def repeating_at(self, theta: dict[nn.Parameter, Tensor]) -> Iterator[None]:
        """In place, wherever a model reads its parameters from."""
        after = {p: p.detach().clone() for p in theta}
        try:
            _assign(theta)
            yield
        finally:
            _assign(after)

    @torch.no_grad()
    def __call__(self, step: TrainingStep, validation: Sequence[Batch]) -> Tensor:
        with torch.enable_grad():
            u = self.direction(step, validation)
        norm = torch.nn.utils.get_total_norm(list(u.values()))
        epsilon = self.epsilon / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        with self.repeating_at(step.theta):
            plus, minus = (self._losses(step, {p: epsilon * sign * d for p, d in u.items()}) for sign in (1, -1))
        return step.scale * (plus - minus) / (2 * epsilon)

    def _losses(self, step: TrainingStep, shift: dict[nn.Parameter, Tensor]) -> Tensor:
        _assign({p: value + shift[p] if p in shift else value for p, value in step.theta.items()})
        with no_trace(self.objective.student, self.objective.terms):
            self.begin_again(step)
            _, features = self.objective.run_student(step.batch, autocast=False)
            # Under autocast the teacher's are half precision.
            floating = [p.dtype for p in self.objective.student.parameters() if p.is_floating_point()]
            wide = max(floating, key=lambda dtype: torch.finfo(dtype).bits, default=torch.get_default_dtype())
            teacher = {n: f.to(wide) if f.is_floating_point() else f for n, f in step.done.teacher.items()}
            active = (step.weights != 0).tolist()
            losses = self.objective.term_losses(features, teacher, step.batch, active, autocast=False)
        zero = step.weights.new_zeros(())
        return torch.stack([zero if value is None else value.to(zero.dtype) for value in losses])


def _assign(values: dict[nn.Parameter, Tensor]) -> None:
    torch._foreach_copy_([p.data for p in values], list(values.values()))
