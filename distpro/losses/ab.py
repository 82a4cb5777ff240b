"""Activation boundaries (Heo et al., AAAI 2019), Eq. 4, summed over layers.

Of pre-activation maps ``s`` and ``t`` (N, C, H, W), with the margin m and y = +1 where t > 0, else -1:

    loss_i = weight_i / N * sum of relu(m - y s)^2,   weight_i = 3/1000 * 2^(i - L + 1),  i = 0 .. L-1, shallow first

With a mask the sum is over the positions that count. The sum of squares pushes the student's neurons to the teacher's
side of zero. Where shapes differ, a connector brings ``s`` to the teacher's shape: the FitNet regressor of `hint`
without its ReLU. Default margin 1 and the weights of RepDistiller. Published as a first stage that trains the student's
features alone (``pretrain``), before the task loss.

Departure: where RepDistiller's regressor cannot grow a map, `hint`'s rule holds (the teacher's map is average-pooled).
`dab` is the same criterion without layer weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distpro.losses._maps import full
from distpro.losses._masks import MaskedLevels, counted, same_size_counted
from distpro.losses.base import LOSSES, Shape
from distpro.losses.hint import ConvRegressor


@LOSSES.register("ab")
class ActivationBoundary(MaskedLevels):
    """Squared hinge on the sign of the teacher's pre-activations; deeper levels weigh twice the one before."""

    title = "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons"
    paper = "Heo et al., Knowledge Transfer via Distillation of Activation Boundaries, AAAI 2019"
    year = 2019
    family = "feature"
    reads = "features of all stages before the ReLU"
    taps = ("stages",)
    before_relu = "both"
    pretrain_reads = "both"
    formula = "sum_i 3/1000 2^(i-L+1) / N sum relu(margin - sign(t_i) s_i)^2"
    stages = 2
    scalars = ("margin",)

    def __init__(self, student_shapes: Sequence[Shape] = (), teacher_shapes: Sequence[Shape] = (), margin: float = 1.0):
        super().__init__(student_shapes, teacher_shapes)
        self.margin = margin
        self.connectors = nn.ModuleList(
            nn.Identity() if s == t else ConvRegressor(s, t, relu=False) for s, t in self.shapes
        )

    def weight(self, i: int) -> float:
        """Weight of level ``i``, 0 the shallowest."""
        return 3 / 1000 * 2.0 ** (i - len(self.connectors) + 1)

    def level(self, i: int, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        student, teacher, mask = same_size_counted(full(self.connectors[i](student)), teacher, mask)
        margins = torch.where(teacher > 0, self.margin - student, self.margin + student)
        return counted(margins.relu().square(), mask).sum() * (self.weight(i) / len(student))
