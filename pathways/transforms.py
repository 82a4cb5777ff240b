"""Transforms M_k by name: bring a student feature to the shape of a teacher feature (Section 3.1 and Fig. 4).

Shapes are per sample: (C, H, W) for feature maps, (L, D) for tokens. How the paper's three transforms differ in detail
is not stated; the docstrings give our reading. Common to all: the width is the teacher's channel count, there is no
activation at the end (targets are pre-activation features), sizes are aligned by nearest-neighbour interpolation as
ReviewKD does, and weights start Kaiming-uniform with a = 1.
"""

from __future__ import annotations

import math

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


class _MapTransform(nn.Module):
    """Common alignment: a map that has to shrink does so first (``resize: before``, the default) or last (``after``);
    one that has to grow does so before the 3×3 convolution, as in ReviewKD. In the 27 pathways of CIFAR `before` costs
    an eighth of `after` where maps shrink, and a third in all."""

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

    def _align(self, x: Tensor) -> Tensor:
        return x if tuple(x.shape[2:]) == self.size else F.interpolate(x, size=self.size, mode="nearest")


@TRANSFORMS.register("identity")
class Identity(nn.Module):
    """The feature itself, where both shapes agree."""

    def __init__(self, in_shape: Shape, out_shape: Shape):
        super().__init__()
        if tuple(in_shape) != tuple(out_shape):
            raise UserError(f"transform 'identity' needs equal shapes, got {tuple(in_shape)} and {tuple(out_shape)}")

    def forward(self, x: Tensor) -> Tensor:
        return x


@TRANSFORMS.register("conv1x1")
class Conv1x1(_MapTransform):
    """1×1 convolution and BatchNorm."""

    name = "conv1x1"

    def __init__(self, in_shape: Shape, out_shape: Shape, resize: str = "before"):
        super().__init__(in_shape, out_shape, resize)
        self.project = _conv(in_shape[0], out_shape[0], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self._align(self.project(self._align(x) if self.resize_first else x))


@TRANSFORMS.register("conv3x3")
class Conv3x3(_MapTransform):
    """1×1 convolution and BatchNorm, then 3×3 convolution and BatchNorm."""

    name = "conv3x3"

    def __init__(self, in_shape: Shape, out_shape: Shape, resize: str = "before"):
        super().__init__(in_shape, out_shape, resize)
        self.project = _conv(in_shape[0], out_shape[0], 1)
        self.refine = _conv(out_shape[0], out_shape[0], 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(self._align(x) if self.resize_first else x)
        return self._align(self.refine(x)) if self.resize_last else self.refine(self._align(x))


@TRANSFORMS.register("attention")
class SpatialAttention(Conv3x3):
    """The feature times a one-channel map σ(1×1 convolution with bias) of itself (Fig. 4b), then as `conv3x3`."""

    name = "attention"

    def __init__(self, in_shape: Shape, out_shape: Shape, resize: str = "before"):
        super().__init__(in_shape, out_shape, resize)
        self.attention = nn.Conv2d(in_shape[0], 1, 1)
        nn.init.kaiming_uniform_(self.attention.weight, a=1)
        nn.init.zeros_(self.attention.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = self._align(x) if self.resize_first else x
        return super().forward(x * torch.sigmoid(self.attention(x)))


@TRANSFORMS.register("tokens")
class Tokens(nn.Module):
    """Linear projection between token sequences (L, D), or between tokens and a feature map (C, H, W).

    Tokens stand for a square grid, row by row, with or without one class token in front. Grids of different sizes are
    aligned by bilinear interpolation. Where the target has a class token and the source has none, the mean of the
    source's tokens stands in for it; where only the source has one, it is dropped.

    Raises UserError for a token count that is neither a square nor a square plus one.
    """

    def __init__(self, in_shape: Shape, out_shape: Shape):
        super().__init__()
        self.source, self.target = _Grid(in_shape), _Grid(out_shape)
        self.project = nn.Linear(self.source.channels, self.target.channels)
        nn.init.kaiming_uniform_(self.project.weight, a=1)
        nn.init.zeros_(self.project.bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2) if self.source.is_map else x
        tokens = self.project(tokens)
        class_token, grid = (
            (tokens[:, :1], tokens[:, 1:]) if self.source.class_token else (tokens.mean(1, True), tokens)
        )
        if self.source.size != self.target.size or self.target.is_map:
            grid = grid.transpose(1, 2).unflatten(2, self.source.size)
            if self.source.size != self.target.size:
                grid = F.interpolate(grid, size=self.target.size, mode="bilinear", align_corners=False)
            if self.target.is_map:
                return grid
            grid = grid.flatten(2).transpose(1, 2)
        return torch.cat([class_token, grid], 1) if self.target.class_token else grid


class _Grid:
    """A shape read as a grid of vectors, with or without a class token in front."""

    def __init__(self, shape: Shape):
        self.is_map = len(shape) == 3
        if self.is_map:
            self.channels, self.size, self.class_token = shape[0], tuple(shape[1:]), False
            return
        if len(shape) != 2:
            raise UserError(
                f"transform 'tokens' needs tokens (L, D) or a feature map (C, H, W), got shape {tuple(shape)}"
            )
        length, self.channels = shape
        side = math.isqrt(length)
        self.class_token = side * side != length
        if self.class_token and math.isqrt(length - 1) ** 2 != length - 1:
            raise UserError(f"transform 'tokens': {length} tokens are no square grid, with or without one class token")
        side = math.isqrt(length - 1) if self.class_token else side
        self.size = (side, side)
