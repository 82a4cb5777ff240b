"""Wide residual networks: Zagoruyko, Komodakis, "Wide residual networks", BMVC 2016."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from distpro.models.base import MODELS, StageTaps, init_convolutions
from pathways.registry import UserError


class WideBlock(nn.Module):
    """Pre-activation block of two 3×3 convolutions. Where the width changes, the shortcut starts after the first
    activation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = (
            None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.bn1(x))
        identity = x if self.shortcut is None else self.shortcut(active)
        return identity + self.conv2(self.relu2(self.bn2(self.conv1(active))))


@MODELS.register("wrn")
class WideResNet(nn.Module):
    """WRN-depth-width. (N, 3, H, W) → (N, num_classes).

    Stages do not end in an activation: `stage_taps.post` are their sums, `stage_taps.pre` the BatchNorm that reads
    each sum next, as RepDistiller and ReviewKD take them. Initialised as in RepDistiller: kaiming normal (fan-out)
    convolutions, BatchNorm 1/0, head bias 0.

    Raises UserError for a depth that is not 6n + 4 or a width below 1.
    """

    stage_taps = StageTaps(
        post=("block1", "block2", "block3"),
        pre=("block2.0.bn1", "block3.0.bn1", "bn1"),
        stem="conv1",
        embedding="fc:input",
    )
    checkpoint_aliases = {".layer.": ".", ".convShortcut.": ".shortcut."}

    def __init__(self, depth: int, width: int, num_classes: int = 100):
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise UserError(f"depth of a WRN must be 6n + 4 (10, 16, 22, ...), got {depth}")
        if width < 1:
            raise UserError(f"width of a WRN must be at least 1, got {width}")
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = _stage(blocks, 16, 16 * width, 1)
        self.block2 = _stage(blocks, 16 * width, 32 * width, 2)
        self.block3 = _stage(blocks, 32 * width, 64 * width, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64 * width, num_classes)
        init_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        x = self.pool(self.relu(self.bn1(x)))
        return self.fc(torch.flatten(x, 1))


def _stage(blocks: int, in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    first = WideBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(WideBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


for _depth, _width in ((16, 1), (16, 2), (40, 1), (40, 2)):
    MODELS.register(f"wrn_{_depth}_{_width}")(partial(WideResNet, _depth, _width))
