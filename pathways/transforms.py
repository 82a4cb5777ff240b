"""Transforms M_k by name: bring a student feature to the shape of a teacher feature (Section 3.1 and Fig. 4).

Shapes are per sample: (C, H, W) for feature maps, (L, D) for tokens. How the paper's three transforms differ in detail
is not stated; the docstrings give our reading. Common to all: the width is the teacher's channel count, there is no
activation at the end (targets are pre-activation features), sizes are aligned by nearest-neighbour interpolation as
ReviewKD does, and weights start Kaiming-uniform with a = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathways.registry import Registry, UserError

TRANSFORMS = Registry("transform", takes_code=True)

Shape = tuple[int, ...]


def _conv(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


def _check_map(name: str, *shapes: Shape) -> None:
    for shape in shapes:
        if len(shape) != 3:
            raise UserError(
                f"transform '{name}' needs feature maps (C, H, W), got shape {shape}; for tokens use 'tokens'"
            )


class MapTransform(nn.Module):
    """Common alignment: a map that has to shrink does so first (``resize: before``, the default) or last (``after``);
    one that has to grow does so before the 3×3 convolution, as in ReviewKD. In the 27 pathways of CIFAR `before` costs
    an eighth of `after` where maps shrink, and a third in all.

    ``transform(x, size)`` gives a map of another height and width than those that it was built for: of batches whose
    images have other sizes."""

    name = ""

    def __init__(self, in_shape: Shape, out_shape: Shape, resize: str = "before"):
        super().__init__()
        _check_map(self.name, in_shape, out_shape)
        if resize not in ("before", "after"):
            raise UserError(f"transform '{self.name}': resize must be before or after, got '{resize}'")
        self.size = tuple(out_shape[1:])
        shrinks = self.size[0] * self.size[1] < in_shape[1] * in_shape[2]
        self.resize_first = shrinks and resize == "before"
        self.resize_last = shrinks and resize == "after"

    def _align(self, x: Tensor, size: Shape | None) -> Tensor:
        size = size or self.size
        return x if tuple(x.shape[2:]) == size else F.interpolate(x, size=size, mode="nearest")


@TRANSFORMS.register("identity")
class Identity(nn.Module):
    """The feature itself, where both shapes agree."""

    def __init__(self, in_shape: Shape, out_shape: Shape):
        super().__init__()
        if tuple(in_shape) != tuple(out_shape):
            raise UserError(f"transform 'identity' needs equal shapes, got {tuple(in_shape)} and {tuple(out_shape)}")
        self.by_position = len(in_shape) == 2

    def forward(self, x: Tensor) -> Tensor:
        return x


@TRANSFORMS.register("conv1x1")
class Conv1x1(MapTransform):
    """1×1 convolution and BatchNorm."""

    name = "conv1x1"

    def __init__(self, in_shape: Shape, out_shape: Shape, resize: str = "before"):
        super().__init__(in_shape, out_shape, resize)
        self.project = _conv(in_shape[0], out_shape[0], 1)

    def forward(self, x: Tensor, size: Shape | None = None) -> Tensor:
        return self._align(self.project(self._align(x, size) if self.resize_first else x), size)


@TRANSFORMS.register("conv3x3")
class Conv3x3(MapTransform):
    """1×1 convolution and BatchNorm, then 3×3 convolution and BatchNorm."""

    name = "conv3x3"

    def __init__(self, in_shape: Shape, out_shape: Shape, resize: str = "before"):
        super().__init__(in_shape, out_shape, resize)
        self.project = _conv(in_shape[0], out_shape[0], 1)
        self.refine = _conv(out_shape[0], out_shape[0], 3)

    def forward(self, x: Tensor, size: Shape | None = None) -> Tensor:
        x = self.project(self._align(x, size) if self.resize_first else x)
        return self._align(self.refine(x), size) if self.resize_last else self.refine(self._align(x, size))


@TRANSFORMS.register("attention")
class SpatialAttention(Conv3x3):
    """The feature times a one-channel map σ(1×1 convolution with bias) of itself (Fig. 4b), then as `conv3x3`."""

    name = "attention"

    def __init__(self, in_shape: Shape, out_shape: Shape, resize: str = "before"):
        super().__init__(in_shape, out_shape, resize)
        self.attention = nn.Conv2d(in_shape[0], 1, 1)
        nn.init.kaiming_uniform_(self.attention.weight, a=1)
        nn.init.zeros_(self.attention.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, size: Shape | None = None) -> Tensor:
        x = self._align(x, size) if self.resize_first else x
        return super().forward(x * torch.sigmoid(self.attention(x)), size)


@TRANSFORMS.register("tokens")
class Tokens(nn.Module):
    """Linear projection between token sequences (L, D), or between tokens and a feature map (C, H, W).

    Sequences of equal length are projected position by position, whatever they stand for, unless their grids are known
    to differ. Otherwise tokens stand for a grid, row by row, behind ``prefix`` others (class, distillation or register
    tokens), and grids of different sizes are aligned by bilinear interpolation. Tokens in front meet their like; where
    the source has fewer of them than the target, the mean of its grid stands in for those that it lacks, and where it
    has more, these are dropped.

    Args:
        prefix: tokens in front of the grid, any number, one for both sides or (the student's, the teacher's); None:
            all that are more than the grid, and where that is not known either none if the length is a square, else
            the one or two that make it one.
        grid: (the student's, the teacher's), each (height, width); None: square. `build_pathways` finds it out.

    Raises UserError for lengths that differ where one of them does not fit.
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        prefix: int | Sequence[int] | None = None,
        grid: Sequence[Sequence[int] | None] | None = None,
    ):
        super().__init__()
        for shape in (in_shape, out_shape):
            if len(shape) not in (2, 3):
                raise UserError(
                    f"transform 'tokens' needs tokens (L, D) or a feature map (C, H, W), got shape {tuple(shape)}"
                )
        prefixes = (prefix, prefix) if prefix is None or isinstance(prefix, int) else tuple(prefix)
        if len(prefixes) != 2 or any(p is not None and (type(p) is not int or p < 0) for p in prefixes):
            raise UserError(f"transform 'tokens': prefix must be one or two counts of tokens, got {prefix!r}")
        ours, theirs = _pair_of_grids(grid)
        self.by_position = len(in_shape) == len(out_shape) == 2 and in_shape[0] == out_shape[0]
        if self.by_position and None not in (ours, theirs) and ours != theirs:
            self.by_position = False
        if not self.by_position:
            self.source, self.target = _Grid(in_shape, prefixes[0], ours), _Grid(out_shape, prefixes[1], theirs)
        in_channels, out_channels = (shape[0] if len(shape) == 3 else shape[1] for shape in (in_shape, out_shape))
        self.project = nn.Linear(in_channels, out_channels)
        nn.init.kaiming_uniform_(self.project.weight, a=1)
        nn.init.zeros_(self.project.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.by_position:
            return self.project(x)
        source, target = self.source, self.target
        tokens = self.project(x.flatten(2).transpose(1, 2) if source.is_map else x)
        prefix, grid = tokens[:, : min(source.prefix, target.prefix)], tokens[:, source.prefix :]
        lacking = target.prefix - prefix.shape[1]
        mean = grid.mean(1, True).expand(-1, lacking, -1) if lacking else prefix[:, :0]
        if source.size != target.size or target.is_map:
            grid = grid.transpose(1, 2).unflatten(2, source.size)
            if source.size != target.size:
                grid = F.interpolate(grid, size=target.size, mode="bilinear", align_corners=False)
            if target.is_map:
                return grid
            grid = grid.flatten(2).transpose(1, 2)
        return torch.cat([prefix, mean, grid], 1) if target.prefix else grid


class _Grid:
    """A shape read as a grid of vectors behind ``prefix`` others."""

    def __init__(self, shape: Shape, prefix: int | None, size: Shape | None = None):
        self.is_map = len(shape) == 3
        if self.is_map:
            self.size, self.prefix = tuple(shape[1:]), 0
            return
        length = shape[0]
        if size is not None:
            self.size, self.prefix = size, length - size[0] * size[1]
            if self.prefix < 0 or prefix not in (None, self.prefix):
                raise UserError(
                    f"transform 'tokens': {length} tokens are no grid of {size[0]}x{size[1]} behind "
                    + ("any others" if prefix is None else f"a prefix of {prefix}")
                )
            return
        for self.prefix in (0, 1, 2) if prefix is None else (prefix,):
            side = math.isqrt(max(length - self.prefix, 0))
            if side > 0 and self.prefix + side * side == length:
                self.size = (side, side)
                return
        behind = "with or without one or two tokens in front" if prefix is None else f"behind a prefix of {prefix}"
        raise UserError(
            f"transform 'tokens': {length} tokens are no square grid, {behind}; "
            "say with 'prefix' how many class, distillation or register tokens there are, or with 'grid' how many rows "
            "and columns"
        )


def _pair_of_grids(grid: Any) -> tuple[Shape | None, Shape | None]:
    """The student's and the teacher's grid. Raises UserError for what is no pair of (height, width) or None."""
    pair = (None, None) if grid is None else grid
    if isinstance(pair, Sequence) and len(pair) == 2 and all(size is None or _is_size(size) for size in pair):
        ours, theirs = (None if size is None else tuple(size) for size in pair)
        return ours, theirs
    raise UserError(f"transform 'tokens': grid must be two of (height, width) or none, got {grid!r}")


def _is_size(size: Any) -> bool:
    return isinstance(size, Sequence) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
