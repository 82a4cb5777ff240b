"""Inter-channel correlation (Liu et al., ICCV 2021), Eq. 3-5 (ICKD-C).

    loss_i = sum of (G(embed(s)) - G(t))^2 / (C N^2),   G(f) = f f^T (C x C per sample), rows L2-normalised

``s`` (N, C_s, H_s, W_s), ``t`` (N, C, H_t, W_t), flattened over positions; sizes may differ. ``embed`` is a 1x1
convolution without bias and BatchNorm where channels differ, else the identity. With a mask G is over the positions
that count. No options.

The authors' ImageNet code (and torchdistill) divides by N twice, which is kept as the default that people have; their
CIFAR code divides once, with a weight of 2.5: multiply the weight by the batch size for it. Departure: the authors'
code embeds the student also where channels agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from distpro.losses._maps import BatchNorm2d, full, matmul
from distpro.losses._masks import MaskedLevels, counted, fitted
from distpro.losses.base import LOSSES, Shape


@LOSSES.register("ickd")
class InterChannelCorrelation(MaskedLevels):
    """Squared difference of the channel correlation matrices."""

    title = "Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation"
    paper = "Liu et al., Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation, ICCV 2021"
    year = 2021
    family = "feature"
    reads = "last features before pooling"
    taps = ("last",)
    formula = "sum (G(embed(s)) - G(t))^2 / (C N^2), G(f) = normalise_rows(f f^T)"

    def __init__(self, student_shapes: Sequence[Shape] = (), teacher_shapes: Sequence[Shape] = ()):
        super().__init__(student_shapes, teacher_shapes)
        self.embed = nn.ModuleList(_embedding(s[0], t[0]) for s, t in self.shapes)

    def level(self, i: int, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        embedded = counted(full(self.embed[i](student)), fitted(mask, student))
        difference = _correlation(embedded) - _correlation(teacher)
        return difference.square().sum() / (teacher.shape[1] * len(teacher) ** 2)


def _correlation(f: Tensor) -> Tensor:
    f = f.flatten(2)
    return F.normalize(matmul(f, f.transpose(1, 2)), dim=2)


def _embedding(in_channels: int, out_channels: int) -> nn.Module:
    if in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), BatchNorm2d(out_channels))
