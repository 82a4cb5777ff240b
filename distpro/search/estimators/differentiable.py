"""Optimisers' steps as differentiable functions, (θ, state, g) → (θ', state'), written out so that autograd gives their adjoints.

They give what torch's own optimisers give, to rounding; the training itself is never stepped by them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pathways.registry import UserError

State = dict[str, Tensor]
"""What an optimiser keeps of one parameter, by the names that torch gives it."""


def _sgd(theta: Tensor, state: State, g: Tensor, group: Mapping[str, Any]) -> tuple[Tensor, State]:
    if group["weight_decay"]:
        g = g + group["weight_decay"] * theta
    if not group["momentum"]:
        return theta - group["lr"] * g, {}
    before = state.get("momentum_buffer")
    buffer = g if before is None else group["momentum"] * before + (1 - group["dampening"]) * g
    direction = g + group["momentum"] * buffer if group["nesterov"] else buffer
    return theta - group["lr"] * direction, {"momentum_buffer": buffer}


def _adam(theta: Tensor, state: State, g: Tensor, group: Mapping[str, Any]) -> tuple[Tensor, State]:
    beta1, beta2 = group["betas"]
    decayed = theta
    if group["decoupled_weight_decay"]:
        decayed = theta * (1 - group["lr"] * group["weight_decay"])
    elif group["weight_decay"]:
        g = g + group["weight_decay"] * theta
    step = float(state["step"]) + 1 if "step" in state else 1.0
    mean, square = (1 - beta1) * g, (1 - beta2) * g.square()
    if "exp_avg" in state:
        mean, square = beta1 * state["exp_avg"] + mean, beta2 * state["exp_avg_sq"] + square
    positive = square > 0  # the root's slope at zero would turn 0 · ∞ into nan
    root = torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)
    denominator = root / (1 - beta2**step) ** 0.5 + group["eps"]
    after = decayed - group["lr"] / (1 - beta1**step) * mean / denominator
    return after, {"exp_avg": mean, "exp_avg_sq": square}


_STEPS: dict[type, Callable[..., tuple[Tensor, State]]] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
}


def differentiable_step(optimizer: torch.optim.Optimizer) -> Callable[..., tuple[Tensor, State]]:
    """The step of the optimiser for one parameter: ``step(theta, state, g, group)``.

    Raises UserError for an optimiser, or an option of it, whose step is not written out here.
    """
    if type(optimizer) not in _STEPS:
        raise UserError(
            f"hypergradient: the step of {type(optimizer).__name__} has no known derivative (allowed: SGD, Adam, AdamW)"
        )
    if any(group.get("maximize") or group.get("amsgrad") for group in optimizer.param_groups):
        raise UserError("hypergradient: maximize and amsgrad are not supported")
    return _STEPS[type(optimizer)]


def clip(gradients: list[Tensor | None], groups: Sequence[Sequence[int]], max_norm: float) -> list[Tensor | None]:
    """As `torch.nn.utils.clip_grad_norm_` of each group, the places in ``gradients`` whose norm is taken together."""
    clipped = list(gradients)
    for group in groups:
        found = [n for n in group if gradients[n] is not None]
        if found:
            norm = torch.stack([gradients[n].square().sum() for n in found]).sum().sqrt()  # type: ignore[union-attr]
            factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for n in found:
                clipped[n] = gradients[n] * factor  # type: ignore[operator]
    return clipped
