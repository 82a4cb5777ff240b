"""A comprehensive overhaul of feature distillation (Heo et al., ICCV 2019), Eq. 2-6.

Of pre-activation maps ``s`` (N, C_s, H_s, W_s) and ``t`` (N, C_t, H_t, W_t), with a margin m < 0 per teacher channel,
t' = max(t, m) (margin ReLU) and r = BN(conv1x1(s)) (connector):

    loss_i = 2^-(L - i - 1) / N * sum of (r - t')^2 where r > t' or t' > 0 (partial L2),  i = 0 .. L-1, shallow first

The maps are summed, so values are large: the usual weight is 1e-3. ``margins`` holds one vector (C_t,) per level, or
`margin` computes it from ``norms``, per level the BatchNorm in front of the teacher's ReLU or None. Where one of them
is missing the margins are what they stand for, the mean of the channel's negative responses, over the batch at hand
(the paper allows both). With a mask the sum is over the positions that count.

Departure: mdistiller pools the teacher's map to the student's size whatever it is; here the larger one is pooled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distpro.losses._maps import BatchNorm2d, full
from distpro.losses._masks import MaskedLevels, same_size_counted
from distpro.losses.base import LOSSES, Shape
from pathways.registry import UserError


def margin(weight: Tensor, bias: Tensor) -> Tensor:
    """E[x | x < 0] per channel (C,) of x ~ N(bias, weight^2), the output of a BatchNorm with these parameters (C,).

    Where x is hardly ever negative (P < 0.001) it is -3 |weight|, as in the authors' code.
    """
    std, mean = weight.detach().double().abs(), bias.detach().double()
    z = mean / std
    negative = torch.special.ndtr(-z)
    expectation = mean - std * torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) / negative
    return torch.where(negative > 0.001, expectation, -3 * std).to(bias.dtype)


def partial_l2(student: Tensor, teacher: Tensor, margins: Tensor) -> Tensor:
    """Sum of squared differences of pre-activations (N, C, H, W) where they matter; ``margins`` (1, C, 1, 1)."""
    teacher = torch.maximum(teacher.detach(), margins)
    counts = (student > teacher) | (teacher > 0)
    return ((student - teacher).square() * counts).sum()


@LOSSES.register("ofd")
class Overhaul(MaskedLevels):
    """Partial L2 between connected student maps and the teacher's after a margin ReLU."""

    title = "A Comprehensive Overhaul of Feature Distillation"
    paper = "Heo et al., A Comprehensive Overhaul of Feature Distillation, ICCV 2019"
    year = 2019
    family = "feature"
    reads = "features of all stages before the ReLU"
    taps = ("stages",)
    before_relu = "both"
    needs = ("norms",)
    formula = "sum_i 2^-(L-i-1) / N sum [r > t' or t' > 0] (r - t')^2, r = BN(conv1x1(s)), t' = max(t, margin)"

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        margins: Sequence[Tensor | Sequence[float]] | None = None,
        norms: Sequence[nn.Module | None] | None = None,
    ):
        super().__init__(student_shapes, teacher_shapes)
        if margins is None and norms:
            margins = _margins_of(norms)
        self.connectors = nn.ModuleList(_connector(s[0], t[0]) for s, t in self.shapes)
        self.has_margins = margins is not None
        needed, found = [t[0] for _, t in self.shapes], [len(m) for m in margins or ()]
        if margins is not None and found != needed:
            raise UserError(f"loss 'ofd' needs margins of {needed} channels, one vector per level, got {found}")
        for i, values in enumerate(margins or ()):
            self.register_buffer(f"margin{i}", torch.as_tensor(values).detach().float().view(1, -1, 1, 1))

    def level(self, i: int, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        margins = self.get_buffer(f"margin{i}") if self.has_margins else _batch_margin(teacher)
        student, teacher, _ = same_size_counted(full(self.connectors[i](student)), teacher, mask)
        return partial_l2(student, teacher, margins) * (2.0 ** (i - len(self.connectors) + 1) / len(student))


def _margins_of(norms: Sequence[nn.Module | None]) -> list[Tensor] | None:
    """The `margin` of each BatchNorm; None unless all are there and have a weight and a bias."""
    found = [(getattr(norm, "weight", None), getattr(norm, "bias", None)) for norm in norms]
    margins = [margin(w, b) for w, b in found if isinstance(w, Tensor) and isinstance(b, Tensor)]
    return margins if len(margins) == len(found) else None


def _batch_margin(t: Tensor) -> Tensor:
    """Mean of the negative entries of each channel, (1, C, 1, 1); 0 where there are none."""
    over = (0, 2, 3)
    return t.clamp(max=0).sum(over, keepdim=True) / (t < 0).sum(over, keepdim=True).clamp(min=1)


def _connector(in_channels: int, out_channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    nn.init.normal_(conv.weight, std=math.sqrt(2 / out_channels))
    return nn.Sequential(conv, BatchNorm2d(out_channels))
