"""Distances δ by name: compare two tensors of one shape, (N, C, H, W) or (N, L, D), and give a scalar."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathways.registry import Registry, UserError

DISTANCES = Registry("distance", takes_code=True)


def over_tokens(distance: nn.Module, x: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """A distance of tokens (N, L, D) of which those count where ``mask`` (N, L) is True: it is given the mask where it is
    ``masked``, else the tokens that count, (1, M, D)."""
    if getattr(distance, "masked", False):
        return distance(x, target, mask)
    return distance(x[mask][None], target[mask][None])


def _wide(x: Tensor) -> torch.dtype:
    """dtype to reduce in: float32 at least, whatever precision the features come in."""
    return torch.promote_types(x.dtype, torch.float32)


def _mean(x: Tensor) -> Tensor:
    return x.mean(dtype=_wide(x))


@DISTANCES.register("l1")
class L1(nn.Module):
    """Mean absolute difference."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return _mean((x - target).abs())


@DISTANCES.register("l2")
class L2(nn.Module):
    """Mean squared difference."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return _mean((x - target).square())


@DISTANCES.register("smooth_l1")
class SmoothL1(nn.Module):
    """Mean Huber-like difference: quadratic below ``beta``, linear above (Girshick 2015)."""

    def __init__(self, beta: float = 1.0):
        super().__init__()
        self.beta = beta

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return _mean(F.smooth_l1_loss(x, target, beta=self.beta, reduction="none"))


@DISTANCES.register("hcl")
class HCL(nn.Module):
    """Hierarchical context loss (ReviewKD, Chen et al., CVPR 2021, Section 3.3, as their code computes it).

    The MSE at full size plus the MSEs of poolings to l×l, each level weighing ``decay`` times the one before, divided
    by the sum of the weights used. Levels not smaller than the map are skipped.

    Args:
        levels: pooled sizes, largest first.
        level_weights: weights of the full size and of the pooled levels in use, in turn; overrides ``decay``.
        decay: ratio of one level's weight to the one before.
        pooling: ``avg`` (ReviewKD's code) or ``max`` (as the reproduction study writes it).

    Tensors without two spatial dimensions are compared by their MSE alone.
    """

    def __init__(
        self,
        levels: Sequence[int] = (4, 2, 1),
        level_weights: Sequence[float] | None = None,
        decay: float = 0.5,
        pooling: str = "avg",
    ):
        super().__init__()
        if pooling not in ("avg", "max"):
            raise UserError(f"distance 'hcl': pooling must be avg or max, got '{pooling}'")
        if level_weights is not None and len(level_weights) != len(levels) + 1:
            raise UserError(
                f"distance 'hcl': level_weights has {len(level_weights)} entries, needs {len(levels) + 1} (full size, then levels)"
            )
        self.levels = tuple(levels)
        self.level_weights = tuple(level_weights or (decay**i for i in range(len(self.levels) + 1)))
        self.pooling = pooling

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        if x.dim() != 4:
            return _mean((x - target).square())
        sizes = [level for level in self.levels if level < min(x.shape[2:])]
        weights = self.level_weights[: len(sizes) + 1]
        if self.pooling == "max":
            pools = [F.adaptive_max_pool2d(x, size) - F.adaptive_max_pool2d(target, size) for size in sizes]
            loss = sum(w * _mean(level.square()) for w, level in zip(weights, [x - target, *pools], strict=True))
        else:
            # Average pooling is linear, so the difference is pooled instead of both maps.
            difference = x - target
            even = all(big % small == 0 for side in x.shape[2:] for big, small in pairwise([side, *sizes]))
            if even and not any(isinstance(w, Tensor) for w in weights):
                squares = _PyramidSquares if torch.compiler.is_compiling() else _PyramidSquaresWithTangents
                loss = squares.apply(difference, sizes, weights)
            else:  # uneven windows overlap, so their means cannot be averaged again; a weight's own derivative is wanted
                levels = [difference, *(F.adaptive_avg_pool2d(difference, size) for size in sizes)]
                loss = sum(w * _mean(level.square()) for w, level in zip(weights, levels, strict=True))
        return loss / sum(weights)  # type: ignore[return-value]  # sum() may give a float, of nothing


class _PyramidSquares(torch.autograd.Function):
    """Σ_l w_l mean(d_l²) of a difference d_0 (N, C, H, W) and its poolings d_l to sizes that divide each other.

    What autograd would record takes about fifteen passes over d; this takes two forward and five backward.
    """

    @staticmethod
    def forward(ctx: Any, d: Tensor, sizes: Sequence[int], weights: Sequence[float]) -> Tensor:
        ctx.save_for_backward(d)
        ctx.sizes, ctx.weights = sizes, weights
        levels = _pyramid(d, sizes)
        return torch.stack([w * _mean(level.square()) for w, level in zip(weights, levels, strict=True)]).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (d,) = ctx.saved_tensors
        result = None
        for level, weight in zip(reversed(_pyramid(d, ctx.sizes)), reversed(ctx.weights), strict=True):
            own = level * (2 * weight / level.numel() * gradient)
            if result is not None:  # a window's mean hands its gradient down in equal shares
                share = result.shape[2] * result.shape[3] / (level.shape[2] * level.shape[3])
                own = own + F.interpolate(result * share, size=level.shape[2:], mode="nearest")
            result = own
        assert result is not None
        return result, None, None


class _PyramidSquaresWithTangents(_PyramidSquares):
    """The same with a forward-mode rule, which torch.compile takes for a reason not to compile."""

    @staticmethod
    def forward(ctx: Any, d: Tensor, sizes: Sequence[int], weights: Sequence[float]) -> Tensor:
        ctx.save_for_forward(d)
        return _PyramidSquares.forward(ctx, d, sizes, weights)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (d,) = ctx.saved_tensors
        levels = zip(ctx.weights, _pyramid(d, ctx.sizes), _pyramid(tangent, ctx.sizes), strict=True)
        return torch.stack([2 * w * _mean(level * moved) for w, level, moved in levels]).sum()


def _pyramid(d: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    levels = [d]
    for size in sizes:
        levels.append(F.adaptive_avg_pool2d(levels[-1], size))
    return levels


@DISTANCES.register("attention")
class Attention(nn.Module):
    """Mean squared difference of normalised spatial attention maps mean_c |f|^p (Zagoruyko & Komodakis, ICLR 2017)."""

    masked = True  # a sample's map is normalised over its own positions

    def __init__(self, p: float = 2.0):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return F.mse_loss(self._map(x), self._map(target))
        x, target = (f.masked_fill(~mask[..., None], 0) for f in (x, target))
        return (self._map(x) - self._map(target)).square().sum() / mask.sum()

    def _map(self, f: Tensor) -> Tensor:
        channel = 1 if f.dim() == 4 else -1
        return F.normalize(f.to(_wide(f)).abs().pow(self.p).mean(channel).flatten(1), dim=1)


@DISTANCES.register("cosine")
class Cosine(nn.Module):
    """1 − cosine similarity of the channel vectors, averaged over positions."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x, target = x.to(_wide(x)), target.to(_wide(target))  # 1 − cosine cancels where both nearly agree
        return (1 - F.cosine_similarity(x, target, dim=1 if x.dim() == 4 else -1)).mean()
