"""The derivative of an optimiser's step by its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pathways.registry import UserError


class StepDerivative:
    """The derivative of an optimiser's step by the gradient, transposed and applied to a vector.

    SGD: −lr, × (1 − dampening) once the momentum buffer exists, × (1 + momentum) with Nesterov. Heavy-ball momentum and
    weight decay add nothing. Adam and AdamW: the update is differentiated elementwise. `clip_grad_norm_` of each of
    ``groups`` (None: of all parameters together) to ``max_norm`` contributes its factor and the dependence of that
    factor on every gradient of the group.

    Call `before_step` after the backward pass and before clipping; call the object after ``optimizer.step()`` while
    ``.grad`` still holds the (clipped) gradients.

    Raises UserError for other optimisers and for options whose derivative is not known here (amsgrad, maximize).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        max_norm: float | None = None,
        groups: Sequence[Sequence[nn.Parameter]] | None = None,
    ):
        self.optimizer, self.max_norm = optimizer, max_norm
        self.groups = groups or [[p for group in optimizer.param_groups for p in group["params"]]]
        kinds = {torch.optim.SGD: self._sgd, torch.optim.Adam: self._adam, torch.optim.AdamW: self._adam}
        if type(optimizer) not in kinds:
            raise UserError(
                f"hypergradient: the step of {type(optimizer).__name__} has no known derivative (allowed: SGD, Adam, AdamW)"
            )
        for group in optimizer.param_groups:
            if group.get("maximize") or group.get("amsgrad"):
                raise UserError("hypergradient: maximize and amsgrad are not supported")
        self._factor: Callable[..., Any] = kinds[type(optimizer)]
        self._norms: list[Tensor] = []
        self._first: set[Tensor] = set()
        self._moments: dict[nn.Parameter, tuple[Tensor, ...]] = {}

    def before_step(self) -> None:
        """Note what the step will overwrite: the gradient norm, and which momentum buffers are new."""
        params = [p for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        states = {p: self.optimizer.state[p] for p in params}
        self._first = {p for p, state in states.items() if state.get("momentum_buffer") is None}
        self._moments = {
            p: tuple(
                state[name].clone() if name in state else torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")
            )
            for p, state in states.items()
            if self._factor == self._adam
        }
        if self.max_norm is not None:
            gradients = [[p.grad for p in group if p.grad is not None] for group in self.groups]
            self._norms = [torch.nn.utils.get_total_norm(g) for g in gradients]

    def __call__(
        self, vector: dict[nn.Parameter, Tensor], theta: dict[nn.Parameter, Tensor]
    ) -> dict[nn.Parameter, Tensor]:
        """u = (∂θ_{t+1}/∂g)ᵀ · vector; ``theta`` are the parameters before the step. Entries that are zero are absent."""
        with torch.no_grad():
            result = {
                p: self._factor(p, group, theta) * vector[p]
                for group in self.optimizer.param_groups
                for p in group["params"]
                if p.grad is not None and p in vector
            }
            if self.max_norm is None:
                return result
            clipped = [self._through_clipping(result, *pair) for pair in zip(self.groups, self._norms, strict=True)]
            return {p: u for group in clipped for p, u in group.items()}

    def _sgd(self, p: nn.Parameter, group: dict[str, Any], theta: Any) -> float:
        factor = -float(group["lr"])
        if group["momentum"]:
            if group["nesterov"]:
                factor *= 1 + group["momentum"]
            elif p not in self._first:
                factor *= 1 - group["dampening"]
        return factor

    def _adam(self, p: nn.Parameter, group: dict[str, Any], theta: dict[nn.Parameter, Tensor]) -> Tensor:
        state, (beta1, beta2) = self.optimizer.state[p], group["betas"]
        gradient = p.grad
        assert gradient is not None
        if group["weight_decay"] and not group["decoupled_weight_decay"]:
            gradient = gradient + group["weight_decay"] * theta[p]
        # With m = β1 m0 + (1-β1) g, v = β2 v0 + (1-β2) g², D = √v/c + ε, c = √(1-β2ᵗ), the derivative of m/D by g is
        # [(1-β1) ε + ((1-β1) β2 v0 - (1-β2) β1 m0 g) / (c √v)] / D²: written so, because dm/D and m·dD/D² cancel.
        mean, square = self._moments[p]
        step = torch.as_tensor(state["step"], dtype=torch.float64)  # stored in float32, too short for 1-β2ᵗ
        c = (1 - beta2**step).sqrt().to(p.dtype)
        root = state["exp_avg_sq"].sqrt()
        denominator = root / c + group["eps"]
        rest = ((1 - beta1) * beta2 * square - (1 - beta2) * beta1 * mean * gradient) / (c * root)
        numerator = (1 - beta1) * group["eps"] + torch.where(root > 0, rest, 0)
        return (-group["lr"] / (1 - beta1**step)).to(p.dtype) * numerator / denominator.square()

    def _through_clipping(
        self, u: dict[nn.Parameter, Tensor], group: Sequence[nn.Parameter], norm: Tensor
    ) -> dict[nn.Parameter, Tensor]:
        # clip_grad_norm_ multiplies g by s = min(1, c / (n + 1e-6)), n = ‖g‖. The transposed Jacobian is
        # s·u − [s < 1] · c / (n + 1e-6)² / n · ⟨g, u⟩ · g, and it reaches parameters outside the vector too.
        assert self.max_norm is not None
        params = [p for p in group if p.grad is not None]
        along = [(p.grad * u[p]).sum() for p in params if p in u]  # type: ignore[operator]
        if not along:
            return {}
        shifted, s = norm + 1e-6, self._clip_factor(norm)
        slope = torch.where(s < 1, self.max_norm / shifted.square() / norm * torch.stack(along).sum() / s, 0.0)
        return {p: s * u.get(p, torch.zeros_like(p)) - slope / s * p.grad for p in params}  # type: ignore[operator]

    def _clip_factor(self, norm: Tensor) -> Tensor:
        assert self.max_norm is not None
        return (self.max_norm / (norm + 1e-6)).clamp(max=1.0)

    def clip_factors(self) -> dict[nn.Parameter, Tensor]:
        """By parameter, the factor by which clipping has shrunk its gradient in this step; empty without clipping."""
        return {
            p: self._clip_factor(norm) for group, norm in zip(self.groups, self._norms, strict=False) for p in group
        }
