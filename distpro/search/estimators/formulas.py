"""Operators that PyTorch cannot differentiate twice, by formulas that it can.

Hardsigmoid has no second derivative, SiLU no forward-mode rule of its backward pass, and a Euclidean norm's second derivative is
nan at the zero vector, which a dead ReLU or a masked pixel is, where the first is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Formulas(TorchFunctionMode):
    """Inside, these operators are computed by formulas: the same values to rounding; every derivative of a norm at zero is 0."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        formula = _FORMULAS.get(func)
        found = None if formula is None else formula(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if found is None else found


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return _placed(lambda x: F.relu6(x + 3) / 6, input, inplace)


def _silu(input: Tensor, inplace: bool = False) -> Tensor:
    return _placed(lambda x: x * torch.sigmoid(x), input, inplace)


def _placed(formula: Callable[[Tensor], Tensor], x: Tensor, inplace: bool) -> Tensor:
    return x.copy_(formula(x.clone())) if inplace else formula(x)


def _euclidean(x: Tensor, dim: Any, keepdim: bool) -> Tensor:
    squares = x.square().sum() if dim is None else x.square().sum(dim, keepdim)
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0)


def _norm(
    input: Tensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, out: Any = None, dtype: Any = None
) -> Tensor | None:
    """None: another norm than the Euclidean of real numbers."""
    plain = input.is_floating_point() and out is None and not (dim is None and keepdim)
    if p not in (None, "fro", 2) or not plain:
        return None
    return _euclidean(input if dtype is None else input.to(dtype), dim, keepdim)


def _vector_norm(
    x: Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, out: Any = None
) -> Any:
    return _norm(x, ord, dim, keepdim, out, dtype)


def _normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Any = None) -> Tensor | None:
    if p != 2 or out is not None:
        return None
    return input / _euclidean(input, dim, True).clamp(min=eps)


def _cosine(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    lengths = (_euclidean(x, dim, False).clamp(min=eps) for x in (x1, x2))
    return (x1 * x2).sum(dim) / next(lengths) / next(lengths)


_C: Any = torch._C._nn
_FORMULAS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.hardsigmoid: _hardsigmoid,
    _C.hardsigmoid: _hardsigmoid,
    _C.hardsigmoid_: lambda input: _hardsigmoid(input, True),
    F.silu: _silu,
    _C.silu: _silu,
    _C.silu_: lambda input: _silu(input, True),
    F.normalize: _normalize,
    F.cosine_similarity: _cosine,
    torch.norm: _norm,
    Tensor.norm: _norm,
    torch.linalg.vector_norm: _vector_norm,
}
