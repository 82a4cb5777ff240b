"""MobileNetV2 for 32×32 images: Sandler, Howard, Zhu, Zhmoginov, Chen, "MobileNetV2: inverted residuals and linear
bottlenecks", CVPR 2018."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distpro.models.base import MODELS, StageTaps, init_convolutions
from pathways.registry import UserError

# expansion, channels at full width, blocks, stride of the first block
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
LAST = 1280


class InvertedResidual(nn.Module):
    """Expanding 1×1, depthwise 3×3, linear 1×1; added to the input where the shapes agree."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int):
        super().__init__()
        mid = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, mid, 1, bias=False),
            nn.BatchNorm2d(mid),
            nn.ReLU(),
            nn.Conv2d(mid, mid, 3, stride=stride, padding=1, groups=mid, bias=False),
            nn.BatchNorm2d(mid),
            nn.ReLU(),
            nn.Conv2d(mid, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


@MODELS.register("mobilenet_v2")
@MODELS.register("MobileNetV2")
class MobileNetV2(nn.Module):
    """MobileNetV2, by default of half width as in the field's tables. (N, 3, H, W) → (N, num_classes).

    As in RepDistiller: ReLU instead of ReLU6, an expanding convolution in the first block too, plain rounding of the
    widths, no dropout. Stages end in linear bottlenecks, so `stage_taps.pre` equals `post`: the last block of each
    size. Kaiming normal (fan-out) convolutions, BatchNorm 1/0, head normal with σ 0.01 and bias 0.

    Raises UserError for a width that leaves a layer without channels.
    """

    stage_taps = StageTaps(
        post=("blocks.1", "blocks.2", "blocks.4", "blocks.6"),
        pre=("blocks.1", "blocks.2", "blocks.4", "blocks.6"),
        stem="conv1",
        embedding="fc:input",
    )
    checkpoint_aliases = {"classifier.0.": "fc."}

    def __init__(self, width: float = 0.5, num_classes: int = 100):
        super().__init__()
        if width * STAGES[0][1] < 1:
            raise UserError(f"width of MobileNetV2 must be at least 1/16, got {width}")
        channels = int(32 * width)
        self.conv1 = _conv_bn_relu(3, channels, 3, stride=2)
        self.blocks = nn.Sequential()
        for expansion, full, count, stride in STAGES:
            self.blocks.append(_stage(channels, int(full * width), count, stride, expansion))
            channels = int(full * width)
        last = int(LAST * max(1.0, width))
        self.conv2 = _conv_bn_relu(channels, last, 1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(last, num_classes)
        init_convolutions(self)
        nn.init.normal_(self.fc.weight, 0, 0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.blocks(self.conv1(x)))
        return self.fc(torch.flatten(self.pool(x), 1))


def _conv_bn_relu(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


def _stage(in_channels: int, out_channels: int, count: int, stride: int, expansion: int) -> nn.Sequential:
    first = InvertedResidual(in_channels, out_channels, stride, expansion)
    return nn.Sequential(first, *(InvertedResidual(out_channels, out_channels, 1, expansion) for _ in range(count - 1)))
