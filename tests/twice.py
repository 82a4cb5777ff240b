"""A gradient differentiated once more along a direction, in two ways, and by central differences of itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from distpro.search.estimators.tangents import TangentRules

Value = Callable[[Sequence[Tensor]], Tensor]


def gradients(value: Value, at: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    found = torch.autograd.grad(value(at), at, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, at, strict=True)]


def by_differences(value: Value, at: Sequence[Tensor], along: Sequence[Tensor], epsilon: float = 1e-6) -> Tensor:
    plus, minus = (
        gradients(value, [(x + sign * epsilon * d).requires_grad_() for x, d in zip(at, along, strict=True)])
        for sign in (1, -1)
    )
    return flat([(p - m) / (2 * epsilon) for p, m in zip(plus, minus, strict=True)])


def by_double_backward(value: Value, at: Sequence[Tensor], along: Sequence[Tensor]) -> Tensor:
    at = [x.clone().requires_grad_() for x in at]
    product = sum((g * d).sum() for g, d in zip(gradients(value, at, True), along, strict=True))
    found = torch.autograd.grad(product, at, allow_unused=True)
    return flat([torch.zeros_like(x) if h is None else h for h, x in zip(found, at, strict=True)])


def by_forward_over_reverse(value: Value, at: Sequence[Tensor], along: Sequence[Tensor]) -> Tensor:
    with forward_ad.dual_level(), TangentRules():
        duals = [forward_ad.make_dual(x.clone().requires_grad_(), d) for x, d in zip(at, along, strict=True)]
        found = [forward_ad.unpack_dual(g).tangent for g in gradients(value, duals)]
        return flat([torch.zeros_like(x) if h is None else h for h, x in zip(found, at, strict=True)])


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
