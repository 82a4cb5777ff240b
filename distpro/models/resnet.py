"""Residual networks for 32×32 images: He, Zhang, Ren, Sun, "Deep residual learning for image recognition", CVPR 2016."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distpro.models.base import MODELS, StageTaps, init_convolutions
from pathways.registry import Registry, UserError

SHORTCUTS = Registry("shortcut")


@SHORTCUTS.register("projection")
def projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """1×1 convolution and BatchNorm (the paper's option B)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


@SHORTCUTS.register("zero_pad")
class ZeroPad(nn.Module):
    """Every ``stride``-th pixel, and zeros for the new channels, half on either side (the paper's option A)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = downsample
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.relu2(x + identity)


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions; the inner width is a quarter of the output's."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        width = out_channels // 4
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = downsample
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        return self.relu3(x + identity)


class ResNet(nn.Module):
    """A stem and stages of residual blocks, each but the first halving the size. (N, 3, H, W) → (N, num_classes).

    Initialised as in RepDistiller: kaiming normal (fan-out) convolutions, BatchNorm 1/0, PyTorch's default head.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        depths: blocks of each stage.
        channels: output channels of the stem and of each stage.
        shortcut: a name of `SHORTCUTS`, used where a block changes the shape.
    """

    checkpoint_aliases = {"linear.": "fc.", ".shortcut.": ".downsample."}

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        channels: Sequence[int],
        num_classes: int,
        shortcut: str,
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU()
        self.stage_names = tuple(f"layer{i + 1}" for i in range(len(depths)))
        for i, name in enumerate(self.stage_names):
            stride = 1 if i == 0 else 2
            self.add_module(name, _stage(block, depths[i], channels[i], channels[i + 1], stride, shortcut))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels[-1], num_classes)
        init_convolutions(self)

    @property
    def stage_taps(self) -> StageTaps:
        pre = tuple(f"{name}:pre_relu" for name in self.stage_names)
        return StageTaps(post=self.stage_names, pre=pre, stem="relu", embedding="fc:input")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        for name in self.stage_names:
            x = getattr(self, name)(x)
        return self.fc(torch.flatten(self.pool(x), 1))


def _stage(
    block: type[BasicBlock] | type[Bottleneck],
    depth: int,
    in_channels: int,
    out_channels: int,
    stride: int,
    shortcut: str,
) -> nn.Sequential:
    changes = stride != 1 or in_channels != out_channels
    downsample = SHORTCUTS[shortcut](in_channels, out_channels, stride) if changes else None
    first = block(in_channels, out_channels, stride, downsample)
    return nn.Sequential(first, *(block(out_channels, out_channels, 1, None) for _ in range(depth - 1)))


def cifar_resnet(
    depth: int,
    channels: Sequence[int] = (16, 16, 32, 64),
    num_classes: int = 100,
    shortcut: str = "projection",
) -> ResNet:
    """ResNet of three stages of (depth − 2)/6 basic blocks (Section 4.2).

    ``channels`` are those of the stem and of each stage. ``shortcut="projection"`` is RepDistiller's network,
    ``"zero_pad"`` the paper's. Raises UserError for a depth that is not 6n + 2, other than four channel counts, or an
    unknown shortcut.
    """
    if depth < 8 or depth % 6 != 2:
        raise UserError(f"depth of a CIFAR ResNet must be 6n + 2 (8, 14, 20, ...), got {depth}")
    if len(channels) != 4:
        raise UserError(f"channels of a CIFAR ResNet are four numbers (stem and stages), got {list(channels)}")
    return ResNet(BasicBlock, [(depth - 2) // 6] * 3, channels, num_classes, shortcut)


for _depth in (8, 14, 20, 32, 44, 56, 110):
    MODELS.register(f"resnet{_depth}")(partial(cifar_resnet, _depth))
for _depth in (8, 32):
    MODELS.register(f"resnet{_depth}x4")(partial(cifar_resnet, _depth, (32, 64, 128, 256)))


@MODELS.register("ResNet50")
def resnet50(num_classes: int = 100) -> ResNet:
    """ImageNet's ResNet-50 with a 3×3 stem and no max pooling, as RepDistiller has it for 32×32 images."""
    return ResNet(Bottleneck, (3, 4, 6, 3), (64, 256, 512, 1024, 2048), num_classes, "projection")
