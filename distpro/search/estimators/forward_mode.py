"""The exact hypergradient by one forward-mode pass of the student."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distpro.batch import Batch
from distpro.features import Reader
from distpro.objective import Objective, entries_of
from distpro.search.estimators.base import ESTIMATORS, Estimator, TrainingStep
from distpro.search.estimators.tangents import forward_mode
from distpro.train.state import no_trace
from pathways.call import Call
from pathways.registry import UserError


@ESTIMATORS.register("forward_mode")
class ForwardMode(Estimator):
    """Exact directional derivative, without ε: h_p = ⟨∂(λℓ_p)/∂f, ḟ⟩ summed over the features f that term p reads.

    The training backward has already computed λ w_p ∂ℓ_p/∂f (`TrainingPass.views`), so one forward-mode pass of the
    student alone along u gives the tangents ḟ and with them every h_p. Parameters of a term's own (transforms) come in
    only where clipping gives u a part along them; their gradient is theirs alone and known too.

    A term of weight zero has no signal: its h_p is 0. Raises UserError where a term's parameters are the student's too or, with
    clipping, another term's.

    Args:
        precision: ``float32`` or ``bfloat16`` for the forward-mode pass; None is the training's own precision. In
            bfloat16 h differs by 2.5 % (median), where another validation batch moves it by 114 % (docs/performance.md).
    """

    name = "forward_mode"
    needs_views = True

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        max_norm: float | None = None,
        clip_by: str = "all",
        precision: str | None = None,
    ):
        super().__init__(objective, optimizer, max_norm, clip_by)
        allowed = {None: objective.precision, "float32": None, "bfloat16": torch.bfloat16}
        if precision not in allowed:
            raise UserError(f"forward_mode: precision is '{precision}' (allowed: float32, bfloat16)")
        self.precision = allowed[precision]
        if shared := shares_parameters(objective, max_norm is not None):
            raise UserError(f"forward_mode: {shared}; use finite_difference")

    def __call__(self, step: TrainingStep, validation: Sequence[Batch]) -> Tensor:
        u = self.direction(step, validation)
        tangents = self.feature_tangents(step, u)
        clipped = self.derivative.clip_factors()
        result = []
        for term, views in zip(self.objective.terms, step.done.views, strict=True):
            if len(entries_of(term)) > 1:
                raise UserError(f"forward_mode: term '{term.key}' has several weights; use finite_difference")
            parts = [_inner(v.grad, tangents[tap]) for tap, v in views.items() if v.grad is not None]
            if clipped:
                parts += [_inner(p.grad, u[p]) / clipped[p] for p in term.parameters() if p in u and p.grad is not None]
            result.append(sum(parts) if parts else step.weights.new_zeros(()))
        h = torch.stack(result).to(step.weights.dtype)  # type: ignore[arg-type]
        return torch.where(step.weights != 0, h / step.weights, torch.zeros_like(h))

    def feature_tangents(self, step: TrainingStep, u: dict[nn.Parameter, Tensor]) -> dict[str, Tensor]:
        """ḟ of the student's taps and output along u at θ_t: one forward-mode pass on the training batch."""
        student = StudentFeatures(self.objective)
        with no_trace(student, self.objective.terms):
            self.begin_again(step)
            tangents = forward_mode(
                student,
                {name: step.theta.get(p, p) for name, p in student.named_parameters()},
                {name: u[p] for name, p in student.named_parameters() if p in u},
                Call((step.batch,)),
                self.precision,
            )
        return {name: tangent.to(step.weights.dtype) for name, tangent in tangents.items()}


def shares_parameters(objective: Objective, clipped: bool) -> str:
    """Which term has trained parameters of the student, which no tap shows, or, where gradients are clipped, of another term,
    whose gradients are then not its own, in words; "" where none has."""
    owners: dict[nn.Parameter, str] = dict.fromkeys(objective.student.parameters(), "the student")
    for term in objective.terms:
        own = {p for p in term.parameters() if p.requires_grad}
        if owner := next((owners[p] for p in own if p in owners), None):
            return f"term '{term.key}' shares parameters with {owner}"
        owners |= dict.fromkeys(own, f"term '{term.key}'") if clipped else {}
    return ""


class StudentFeatures(nn.Module):
    """batch → everything that terms may read of the student, the response's counted positions too."""

    def __init__(self, objective: Objective):
        super().__init__()
        self.student = objective.student  # the objective's own, whose parameters functional_call swaps for a pass
        self._objective = (objective,)  # in a tuple: not a submodule

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        (objective,) = self._objective
        _, features = objective.run_student(batch, autocast=None)
        if any(term.by_position for term in objective.terms):
            features = Reader(objective.task, batch).with_positions(features)
        return dict(features)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    # In the order in which ``a`` lies in memory, so that channels_last features are not copied to be flattened.
    order = sorted(range(a.dim()), key=a.stride, reverse=True)
    return torch.dot(a.permute(order).reshape(-1).to(b.dtype), b.permute(order).reshape(-1))
