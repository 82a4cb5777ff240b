"""Masked generative distillation (Yang et al., ECCV 2022), Eq. 4.

    loss = alpha / N * sum of (G(mask * align(s)) - t)^2

``s`` (N, C_s, H_s, W_s), ``t`` (N, C_t, H_t, W_t); any number of levels. ``align`` is a 1x1 convolution where channels
differ, G conv3x3, ReLU, conv3x3 at C_t channels. Each entry of the mask is 0 with probability ``ratio``, drawn anew at
every call: per channel (``mask: channel``, the authors' classification form and the default, ratio 0.15, alpha 7e-5) or
per position (``mask: position``, detection: ratio 0.65, alpha 2e-5; segmentation: 0.75, 2e-5).

Where positions do not count (padding, void), they are zero to G and left out of the sum.

Departure: the authors require equal sizes; here the student's map is resized to the teacher's (pooled, or bilinear).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distpro.losses._maps import full, resized
from distpro.losses._masks import MaskedLevels, counted, fitted, resized_counted
from distpro.losses._options import SHARE
from distpro.losses.base import LOSSES, Shape, one_of
from pathways.registry import UserError


@LOSSES.register("mgd")
class MaskedGeneration(MaskedLevels):
    """Squared error between the teacher's map and one generated from the masked student map."""

    title = "Masked Generative Distillation"
    paper = "Yang et al., Masked Generative Distillation, ECCV 2022"
    year = 2022
    family = "feature"
    reads = "last features before pooling"
    taps = ("last",)
    scalars = ("ratio", "alpha")
    formula = "alpha / N sum (G(mask * align(s)) - t)^2"
    ranges = {"ratio": SHARE}

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        ratio: float = 0.15,
        alpha: float = 7e-5,
        mask: str = "channel",
    ):
        super().__init__(student_shapes, teacher_shapes)
        if not 0 <= ratio < 1:
            raise UserError(f"loss 'mgd': ratio must be at least 0 and below 1, got {ratio}")
        self.ratio, self.alpha = ratio, alpha
        self.mask = one_of(f"{self.what}: mask", mask, ("channel", "position"))
        self.align = nn.ModuleList(nn.Identity() if s[0] == t[0] else nn.Conv2d(s[0], t[0], 1) for s, t in self.shapes)
        self.generation = nn.ModuleList(_generator(t[0]) for _, t in self.shapes)

    def level(self, i: int, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        present = fitted(mask, teacher)
        x = counted(self.align[i](resized_counted(student, mask, teacher.shape[2:], resized)), present)
        size = (*x.shape[:2], 1, 1) if self.mask == "channel" else (len(x), 1, *x.shape[2:])
        kept = torch.rand(size, device=x.device) >= self.ratio
        error = counted(full(self.generation[i](x * kept)) - teacher, present)
        return error.square().sum() * (self.alpha / len(x))


def _generator(channels: int) -> nn.Sequential:
    conv = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)]
    return nn.Sequential(conv[0], nn.ReLU(), conv[1])
