"""Positions that count: masks at a map's size, and losses that neither padding nor void pixels can reach.

What does not count is set to zero before a loss's layers and before maps are pooled, so that it has no influence on
value or gradient, and means are taken over what counts. A mask that is True everywhere changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distpro.losses._maps import PairedLevels, pairs, pooled, same_size
from distpro.losses.base import Mask, Tensors
from pathways.registry import UserError


class MaskedLevels(PairedLevels):
    """`PairedLevels` that can leave positions out.

    A subclass implements ``level(i, student, teacher, mask)``. There, what does not count is zero in both tensors, and
    ``mask`` has the size of one of them, see `distpro.losses.base.Mask`.
    """

    masked = True

    def forward(
        self,
        student: Tensors,
        teacher: Tensors,
        target: Tensor | None = None,
        index: Tensor | None = None,
        mask: Mask = None,
    ) -> Tensor:
        return self.levels(student, teacher, target, index, mask).sum()

    def levels(
        self,
        student: Tensors,
        teacher: Tensors,
        target: Tensor | None = None,
        index: Tensor | None = None,
        mask: Mask = None,
    ) -> Tensor:
        """Losses per level (L,). Raises UserError if the numbers of student and teacher tensors or masks differ."""
        tensors = pairs(self.what, student, teacher)
        masks = masks_of(self.what, mask, [s for s, _ in tensors])
        return torch.stack(
            [
                self.level(i, counted(s, fitted(m, s)), counted(t, fitted(m, t)), m)
                for i, ((s, t), m) in enumerate(zip(tensors, masks, strict=True))
            ]
        )

    def pretrain(
        self,
        student: Tensors,
        teacher: Tensors,
        target: Tensor | None = None,
        index: Tensor | None = None,
        mask: Mask = None,
    ) -> Tensor:
        if mask is None or not self.pretrain_reads:
            return super().pretrain(student, teacher, target, index)
        return self(student, teacher, target, index, mask)

    def level(self, i: int, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        raise NotImplementedError


def masks_of(what: str, mask: Mask, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """One mask, or None, for each of the tensors. Raises UserError if their number, type or dimensions are others."""
    if mask is None:
        return [None] * len(tensors)
    masks: list[Tensor | None] = [mask] if isinstance(mask, Tensor) else [*mask]
    if len(masks) != len(tensors):
        raise UserError(f"{what} takes one mask per tensor, got {len(masks)} for {len(tensors)}")
    for m, x in zip(masks, tensors, strict=True):
        if m is not None and (m.dtype != torch.bool or m.dim() != x.dim() - 1 or len(m) != len(x)):
            found = f"{str(m.dtype).removeprefix('torch.')} {tuple(m.shape)}"
            raise UserError(f"{what}: the mask of a tensor {tuple(x.shape)} is bool, without its channels, got {found}")
    return masks


def fitted(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask (N, H, W) at the size of a map (N, C, H', W'), where a position counts if any that it covers does.

    The mask of any other tensor has its size already.
    """
    return mask if mask is None or like.dim() != 4 else _at(mask, like.shape[2:])


def _at(mask: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(mask.shape[1:]) == tuple(size):
        return mask
    return F.adaptive_max_pool2d(mask[:, None].float(), tuple(size))[:, 0] > 0  # type: ignore[arg-type]


def counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x``, (N, C, H, W), (N, L, D) or (N, D), with zeros where its mask, ``x``'s shape without C or D, is False.

    Values without channels, (N, HW), take a mask of their own shape.
    """
    if mask is None:
        return x
    return x.masked_fill(~(mask if mask.dim() == x.dim() else mask.unsqueeze(1 if x.dim() == 4 else -1)), 0)


def resized_counted(
    x: Tensor, mask: Tensor | None, size: Sequence[int], resize: Callable[[Tensor, Sequence[int]], Tensor] = pooled
) -> Tensor:
    """Map (N, C, H, W) brought to ``size`` by ``resize``, of counted positions alone; zero where nothing counts."""
    own = fitted(mask, x)
    x = counted(x, own)
    if own is None or tuple(x.shape[2:]) == tuple(size):
        return resize(x, size)
    share = resize(own[:, None].to(x.dtype), size)
    assert mask is not None
    return counted(resize(x, size) / share.clamp(min=1e-6), _at(mask, size))


def same_size_counted(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Two maps (N, C, H, W) and their mask at the smaller of their sizes, by average pooling of what counts; zero
    elsewhere."""
    if mask is None:
        return *same_size(student, teacher), None
    size = [min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    return resized_counted(student, mask, size), resized_counted(teacher, mask, size), _at(mask, size)


def mean_counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of the entries of ``x`` at positions that count, a scalar; 0 where none does."""
    if mask is None:
        return x.mean()
    return counted(x, mask).sum() / (mask.sum().clamp(min=1) * (x.numel() // mask.numel()))


def mean_square(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared error of two tensors of one shape over the positions that count, a scalar."""
    return F.mse_loss(student, teacher) if mask is None else mean_counted((student - teacher).square(), mask)
