"""Channel-wise distillation (Shu et al., ICCV 2021), Eq. 3-5.

    loss_i = T^2 / (C N) * sum over batch and channels of KL(softmax_hw(t / T) || softmax_hw(s / T))

``s`` (N, C_s, H_s, W_s), ``t`` (N, C, H_t, W_t), logits or features: each channel is a distribution over positions.
Where channels differ (features), a 1x1 convolution brings the student's to C; where sizes differ, the student's map is
resized to the teacher's (average-pooled, or bilinear). With a mask the distributions are over the positions that count.
A channel that is -inf everywhere in both maps (a class that is not there) adds nothing.
``temperature`` 4, as published, with the weights 3 (logits) and 50 (features). Departure: the authors require equal
sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from distpro.losses._maps import divergence, full, resized
from distpro.losses._masks import MaskedLevels, fitted, resized_counted
from distpro.losses._options import POSITIVE
from distpro.losses.base import LOSSES, Shape
from distpro.losses.dkd_target import EXCLUDED


@LOSSES.register("cwd")
class ChannelWise(MaskedLevels):
    """Mean KL divergence of the channels' distributions over positions."""

    title = "Channel-wise Knowledge Distillation for Dense Prediction"
    paper = "Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021"
    year = 2021
    family = "dense"
    reads = "logits of a dense task, or features"
    taps = ("logits",)
    scalars = ("temperature",)
    formula = "T^2 / (C N) sum KL(softmax_hw(t/T) || softmax_hw(s/T))"
    ranges = {"temperature": POSITIVE}

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        temperature: float = 4.0,
    ):
        super().__init__(student_shapes, teacher_shapes)
        self.temperature = temperature
        self.align = nn.ModuleList(nn.Identity() if s[0] == t[0] else nn.Conv2d(s[0], t[0], 1) for s, t in self.shapes)

    def level(self, i: int, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        student = full(self.align[i](resized_counted(student, mask, teacher.shape[2:], resized)))
        missing = ((student == -math.inf) & (teacher == -math.inf)).flatten(2).all(2)[..., None, None]
        student, teacher = (f.masked_fill(missing, 0) for f in (student, teacher))  # a class that neither has
        log_s, log_t = (self._log_shares(f, fitted(mask, teacher)) for f in (student, teacher))
        return divergence(log_s, log_t).sum() * (self.temperature**2 / (teacher.shape[0] * teacher.shape[1]))

    def _log_shares(self, f: Tensor, mask: Tensor | None) -> Tensor:
        """Logarithms (N, C, HW) of each channel's distribution over the positions that count."""
        f = f.flatten(2) / self.temperature
        return F.log_softmax(f if mask is None else f.masked_fill(~mask.flatten(1)[:, None], EXCLUDED), dim=2)
