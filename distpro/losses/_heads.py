"""What the losses of attention share: queries, keys and values (N, L, D) cut into heads, and which pairs of tokens count."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from distpro.losses._maps import matmul
from distpro.losses._masks import masks_of
from distpro.losses.base import Mask, Shape
from pathways.registry import UserError


def token_widths(what: str, shapes: Sequence[Shape]) -> list[int]:
    """D of tokens (L, D). Raises UserError for other shapes."""
    wrong = next((shape for shape in shapes if len(shape) != 2), None)
    if wrong is not None:
        raise UserError(f"{what} reads tokens (L, D), got {tuple(wrong)}")
    return [shape[1] for shape in shapes]


def check_heads(what: str, width: int, heads: int) -> None:
    """Raise UserError where a width is not that of so many heads."""
    if width % heads:
        raise UserError(f"{what}: {heads} heads do not divide the width {width}")


def scores(a: Tensor, b: Tensor, heads: int) -> Tensor:
    """a bᵀ / √d of each head, (N, heads, L, L), of tokens (N, L, heads · d)."""
    a, b = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (a, b))
    return matmul(a, b.transpose(2, 3)) / math.sqrt(a.shape[-1])


def token_mask(what: str, mask: Mask, tensors: Sequence[Tensor]) -> Tensor | None:
    """The one mask (N, L) of tensors of the same tokens, None where all count."""
    return next((m for m in masks_of(what, mask, tensors) if m is not None), None)
