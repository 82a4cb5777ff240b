"""ShuffleNets for 32×32 images.

V1: Zhang, Zhou, Lin, Sun, "ShuffleNet: an extremely efficient convolutional neural network for mobile devices",
CVPR 2018. V2: Ma, Zhang, Zheng, Sun, "ShuffleNet V2: practical guidelines for efficient CNN architecture design",
ECCV 2018. Both as in RepDistiller: a 1×1 stem, no max pooling, PyTorch's default initialisation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distpro.models.base import MODELS, StageTaps

STEM = 24


class ChannelShuffle(nn.Module):
    """Deal the channels out from ``groups`` groups in turn. Unlike torch's, made of operations that have every
    derivative."""

    def __init__(self, groups: int):
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


class UnitV1(nn.Module):
    """Grouped 1×1, depthwise 3×3, grouped 1×1. With stride 2 the pooled input is appended, otherwise added."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int):
        super().__init__()
        new = out_channels - in_channels if stride == 2 else out_channels
        mid = new // 4
        first_groups = 1 if in_channels == STEM else groups
        self.conv1 = nn.Conv2d(in_channels, mid, 1, groups=first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.relu1 = nn.ReLU()
        self.shuffle = ChannelShuffle(first_groups)
        self.conv2 = nn.Conv2d(mid, mid, 3, stride=stride, padding=1, groups=mid, bias=False)
        self.bn2 = nn.BatchNorm2d(mid)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(mid, new, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(new)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1) if stride == 2 else None
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        new = self.shuffle(self.relu1(self.bn1(self.conv1(x))))
        new = self.relu2(self.bn2(self.conv2(new)))
        new = self.bn3(self.conv3(new))
        return self.relu3(new + x if self.pool is None else torch.cat([new, self.pool(x)], 1))


@MODELS.register("shufflenet_v1")
@MODELS.register("ShuffleV1")
class ShuffleNetV1(nn.Module):
    """ShuffleNet 1× with 3 groups. (N, 3, H, W) → (N, num_classes)."""

    stage_taps = StageTaps(
        post=("layer1", "layer2", "layer3"),
        pre=("layer1:pre_relu", "layer2:pre_relu", "layer3:pre_relu"),
        stem="relu",
        embedding="fc:input",
    )
    checkpoint_aliases = {"linear.": "fc."}

    def __init__(self, num_classes: int = 100):
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(4, STEM, 240)
        self.layer2 = self._stage(8, 240, 480)
        self.layer3 = self._stage(4, 480, 960)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(960, num_classes)

    @staticmethod
    def _stage(units: int, in_channels: int, out_channels: int) -> nn.Sequential:
        first = UnitV1(in_channels, out_channels, 2, groups=3)
        return nn.Sequential(first, *(UnitV1(out_channels, out_channels, 1, groups=3) for _ in range(units - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.pool(x), 1))


class UnitV2(nn.Module):
    """Half of the channels pass, half go through 1×1, depthwise 3×3 and 1×1 convolutions.

    The last ReLU runs over both halves, so that its input is the unit's pre-activation. That changes neither output
    nor gradient: the passing half comes out of a ReLU.
    """

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu2 = nn.ReLU()
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        passing, new = x.chunk(2, 1)
        new = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(new)))))
        new = self.bn3(self.conv3(new))
        return self.shuffle(self.relu2(torch.cat([passing, new], 1)))


class DownUnitV2(nn.Module):
    """Both halves of the output are computed from the whole input at half its size."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        half = out_channels // 2
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, stride=2, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.relu3 = nn.ReLU()
        self.conv4 = nn.Conv2d(half, half, 3, stride=2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)
        self.relu5 = nn.ReLU()
        self.shuffle = ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        left = self.relu2(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(self.relu3(self.bn3(self.conv3(x)))))
        right = self.relu5(self.bn5(self.conv5(right)))
        return self.shuffle(torch.cat([left, right], 1))


@MODELS.register("shufflenet_v2")
@MODELS.register("ShuffleV2")
class ShuffleNetV2(nn.Module):
    """ShuffleNet V2 1×. (N, 3, H, W) → (N, num_classes).

    `stage_taps.pre` have the channel order before the last shuffle, as in RepDistiller.
    """

    stage_taps = StageTaps(
        post=("layer1", "layer2", "layer3"),
        pre=("layer1.3.relu2:input", "layer2.7.relu2:input", "layer3.3.relu2:input"),
        stem="relu",
        embedding="fc:input",
    )
    checkpoint_aliases = {"linear.": "fc."}

    def __init__(self, num_classes: int = 100):
        super().__init__()
        self.conv1 = nn.Conv2d(3, STEM, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(3, STEM, 116)
        self.layer2 = self._stage(7, 116, 232)
        self.layer3 = self._stage(3, 232, 464)
        self.conv2 = nn.Conv2d(464, 1024, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1024)
        self.relu2 = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(1024, num_classes)

    @staticmethod
    def _stage(units: int, in_channels: int, out_channels: int) -> nn.Sequential:
        return nn.Sequential(DownUnitV2(in_channels, out_channels), *(UnitV2(out_channels) for _ in range(units)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = self.pool(self.relu2(self.bn2(self.conv2(x))))
        return self.fc(torch.flatten(x, 1))
