"""VGG with BatchNorm for 32×32 images: Simonyan, Zisserman, "Very deep convolutional networks for large-scale image
recognition", ICLR 2015."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from distpro.models.base import MODELS, StageTaps, init_convolutions

CHANNELS = (64, 128, 256, 512, 512)
CONVOLUTIONS = {  # of each block, by depth
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
    """Five blocks of convolutions, whose numbers are given, and a linear head. (N, 3, H, W) → (N, num_classes).

    As in RepDistiller: pooling after the first three blocks only, so that a 32×32 image keeps 4×4 pixels to the end.
    Kaiming normal (fan-out) convolutions with bias 0, BatchNorm 1/0, head normal with σ 0.01 and bias 0.
    """

    stage_taps = StageTaps(
        post=("block1", "block2", "block3", "block4"),
        pre=("block1:pre_relu", "block2:pre_relu", "block3:pre_relu", "block4:pre_relu"),
        stem="block0",
        embedding="fc:input",
    )
    checkpoint_aliases = {"classifier.": "fc."}

    def __init__(self, convolutions: Sequence[int], num_classes: int = 100):
        super().__init__()
        self.block0 = _block(convolutions[0], 3, CHANNELS[0])
        self.pool0 = nn.MaxPool2d(2)
        self.block1 = _block(convolutions[1], CHANNELS[0], CHANNELS[1])
        self.pool1 = nn.MaxPool2d(2)
        self.block2 = _block(convolutions[2], CHANNELS[1], CHANNELS[2])
        self.pool2 = nn.MaxPool2d(2)
        self.block3 = _block(convolutions[3], CHANNELS[2], CHANNELS[3])
        self.block4 = _block(convolutions[4], CHANNELS[3], CHANNELS[4])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(CHANNELS[4], num_classes)
        init_convolutions(self)
        nn.init.normal_(self.fc.weight, 0, 0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool0(self.block0(x))
        x = self.pool1(self.block1(x))
        x = self.pool2(self.block2(x))
        x = self.block4(self.block3(x))
        return self.fc(torch.flatten(self.pool(x), 1))


def _block(convolutions: int, in_channels: int, out_channels: int) -> nn.Sequential:
    block = nn.Sequential()
    for i in range(convolutions):
        block.append(nn.Conv2d(in_channels if i == 0 else out_channels, out_channels, 3, padding=1))
        block.append(nn.BatchNorm2d(out_channels))
        block.append(nn.ReLU())
    return block


for _depth, _convolutions in CONVOLUTIONS.items():
    MODELS.register(f"vgg{_depth}")(partial(VGG, _convolutions))
