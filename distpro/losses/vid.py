"""Variational information distillation (Ahn et al., CVPR 2019), Eq. 5.

Per level, with mu = regressor(s) and one variance per teacher channel, var = log(1 + exp(log_scale)) + eps:

    loss = mean over all elements of 1/2 ((mu - t)^2 / var + log var)

``s`` (N, C_s, H_s, W_s), ``t`` (N, C_t, H_t, W_t). The regressor is three 1x1 convolutions without bias, ReLU between
them, of ``mid_channels`` (default: the teacher's channels). Of different sizes the larger map is average-pooled first.
With a mask the mean is over the positions that count. ``variance`` = 5 at the start, ``eps`` = 1e-5, as in
RepDistiller, whose weight is 1. Departure: none; ``log_scale`` is a parameter of the loss and so reaches the optimiser
with the regressor (forgotten in some reimplementations).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distpro.losses._maps import full
from distpro.losses._masks import MaskedLevels, mean_counted, same_size_counted
from distpro.losses._options import COUNT, NOT_NEGATIVE, POSITIVE
from distpro.losses.base import LOSSES, Shape
from pathways.registry import UserError


class _Gaussian(nn.Module):
    """Negative log-likelihood (without constants) of the teacher's map under the student's prediction."""

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, variance: float, eps: float):
        super().__init__()
        self.regressor = nn.Sequential(
            nn.Conv2d(in_channels, mid_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(mid_channels, mid_channels, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(mid_channels, out_channels, 1, bias=False),
        )
        self.log_scale = nn.Parameter(torch.full((out_channels,), math.log(math.expm1(variance - eps))))
        self.eps = eps

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        variance = (F.softplus(self.log_scale) + self.eps).view(1, -1, 1, 1)
        error = (full(self.regressor(student)) - teacher).square()
        return 0.5 * mean_counted(error / variance + variance.log(), mask)


@LOSSES.register("vid")
class VariationalInformation(MaskedLevels):
    """Variational bound of the mutual information between student and teacher maps, one Gaussian per level."""

    title = "Variational Information Distillation for Knowledge Transfer"
    paper = "Ahn et al., Variational Information Distillation for Knowledge Transfer, CVPR 2019"
    year = 2019
    family = "feature"
    reads = "features of all stages"
    taps = ("stages",)
    signed = True
    formula = "mean 1/2 ((mu(s) - t)^2 / var_c + log var_c)"
    ranges = {"mid_channels": COUNT, "variance": POSITIVE, "eps": NOT_NEGATIVE}

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        mid_channels: int | None = None,
        variance: float = 5.0,
        eps: float = 1e-5,
    ):
        super().__init__(student_shapes, teacher_shapes)
        if variance <= eps:
            raise UserError(f"loss 'vid': variance must be above eps, got {variance} and {eps}")
        self.gaussians = nn.ModuleList(
            _Gaussian(s[0], mid_channels or t[0], t[0], variance, eps) for s, t in self.shapes
        )

    def level(self, i: int, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.gaussians[i](*same_size_counted(student, teacher, mask))
