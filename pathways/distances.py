"""Distances δ by name: compare two tensors of one shape, (N, C, H, W) or (N, L, D), and give a scalar."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from pathways.registry import Registry, UserError

DISTANCES = Registry("distance")


@DISTANCES.register("l1")
class L1(nn.Module):
    """Mean absolute difference."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.l1_loss(x, target)


@DISTANCES.register("l2")
class L2(nn.Module):
    """Mean squared difference."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(x, target)


@DISTANCES.register("smooth_l1")
class SmoothL1(nn.Module):
    """Mean Huber-like difference: quadratic below ``beta``, linear above (Girshick 2015)."""

    def __init__(self, beta: float = 1.0):
        super().__init__()
        self.beta = beta

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(x, target, beta=self.beta)


@DISTANCES.register("hcl")
class HCL(nn.Module):
    """Hierarchical context loss (ReviewKD, Chen et al., CVPR 2021, Section 3.3, as their code computes it).

    The MSE at full size plus the MSEs of poolings to l×l, each level weighing ``decay`` times the one before, divided
    by the sum of the weights used. Levels not smaller than the map are skipped.

    Args:
        levels: pooled sizes, largest first.
        level_weights: weight of the full size and of each pooled level; overrides ``decay``.
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
            return F.mse_loss(x, target)
        sizes = [level for level in self.levels if level < min(x.shape[2:])]
        weights = self.level_weights[: len(sizes) + 1]
        if self.pooling == "avg":
            # Average pooling is linear, so the difference is pooled once instead of both maps, and a level that
            # divides the one before is pooled from that one.
            difference = x - target
            loss = weights[0] * difference.square().mean()
            for size, weight in zip(sizes, weights[1:], strict=True):
                nested = all(side % size == 0 for side in difference.shape[2:])
                difference = F.adaptive_avg_pool2d(difference if nested else x - target, size)
                loss = loss + weight * difference.square().mean()
        else:
            loss = weights[0] * F.mse_loss(x, target)
            for size, weight in zip(sizes, weights[1:], strict=True):
                pooled, pooled_target = F.adaptive_max_pool2d(x, size), F.adaptive_max_pool2d(target, size)
                loss = loss + weight * F.mse_loss(pooled, pooled_target)
        return loss / sum(weights)


@DISTANCES.register("attention")
class Attention(nn.Module):
    """Mean squared difference of normalised spatial attention maps mean_c |f|^p (Zagoruyko & Komodakis, ICLR 2017)."""

    def __init__(self, p: float = 2.0):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self._map(x), self._map(target))

    def _map(self, f: Tensor) -> Tensor:
        channel = 1 if f.dim() == 4 else -1
        return F.normalize(f.abs().pow(self.p).mean(channel).flatten(1), dim=1)


@DISTANCES.register("cosine")
class Cosine(nn.Module):
    """1 − cosine similarity of the channel vectors, averaged over positions."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return (1 - F.cosine_similarity(x, target, dim=1 if x.dim() == 4 else -1)).mean()
