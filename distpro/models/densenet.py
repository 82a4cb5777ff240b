"""Densely connected networks: Huang, Liu, van der Maaten, Weinberger, "Densely connected convolutional networks",
CVPR 2017."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distpro.models.base import MODELS, StageTaps, init_convolutions
from pathways.registry import UserError


class DenseLayer(nn.Module):
    """Bottleneck layer: ``growth`` new channels, appended to what came in."""

    def __init__(self, in_channels: int, growth: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.relu2 = nn.ReLU()
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(self.relu1(self.bn1(x)))
        new = self.conv2(self.relu2(self.bn2(new)))
        return torch.cat([x, new], 1)


class Transition(nn.Sequential):
    """Half the channels, half the size."""

    def __init__(self, channels: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.pool = nn.AvgPool2d(2)


@MODELS.register("densenet_bc")
class DenseNetBC(nn.Module):
    """DenseNet-BC of three dense blocks with compression 0.5, by default the 100-12 form. (N, 3, H, W) → (N, num_classes).

    Blocks do not end in an activation: `stage_taps.post` are their concatenations, `stage_taps.pre` the BatchNorm that
    reads each next. Kaiming normal (fan-out) convolutions, BatchNorm 1/0, head bias 0.

    Raises UserError for a depth that is not 6n + 4 or a growth below 1.
    """

    stage_taps = StageTaps(
        post=("block1", "block2", "block3"),
        pre=("transition1.bn", "transition2.bn", "bn"),
        stem="conv1",
        embedding="fc:input",
    )

    def __init__(self, depth: int = 100, growth: int = 12, num_classes: int = 100):
        super().__init__()
        if depth < 10 or depth % 6 != 4:
            raise UserError(f"depth of a DenseNet-BC must be 6n + 4 (10, 16, 22, ...), got {depth}")
        if growth < 1:
            raise UserError(f"growth of a DenseNet-BC must be at least 1, got {growth}")
        layers = (depth - 4) // 6
        channels = 2 * growth
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.block1, channels = _block(layers, channels, growth)
        self.transition1, channels = Transition(channels), channels // 2
        self.block2, channels = _block(layers, channels, growth)
        self.transition2, channels = Transition(channels), channels // 2
        self.block3, channels = _block(layers, channels, growth)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        init_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.transition1(self.block1(self.conv1(x)))
        x = self.transition2(self.block2(x))
        x = self.pool(self.relu(self.bn(self.block3(x))))
        return self.fc(torch.flatten(x, 1))


def _block(layers: int, channels: int, growth: int) -> tuple[nn.Sequential, int]:
    block = nn.Sequential(*(DenseLayer(channels + i * growth, growth) for i in range(layers)))
    return block, channels + layers * growth
