"""Generalised head network distillation (Matsubara and Levorato, ICPR 2020).

    loss_i = sum over all elements of (s_i - t_i)^2

The student is the teacher with its first layers replaced by a head with a bottleneck; the head is trained to reproduce
what the teacher computes at several depths, the rest keeps the teacher's weights. Tensors of equal shape, usually maps
(N, C, H, W); any number of levels. With a mask the sum is over what counts. The sum (not a mean) over elements and
batch, each level with weight 1, is torchdistill's. Published with no task loss beside it. Departure: none.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distpro.losses._maps import same_shapes
from distpro.losses._masks import MaskedLevels, counted
from distpro.losses.base import LOSSES, Shape


@LOSSES.register("ghnd")
class GeneralizedHead(MaskedLevels):
    """Sum of squared errors at several depths."""

    title = "Generalized Head Network Distillation"
    paper = (
        "Matsubara and Levorato, Neural Compression and Filtering for Edge-assisted Real-time Object Detection "
        "in Challenged Networks, ICPR 2020"
    )
    year = 2020
    family = "feature"
    reads = "features at several depths"
    taps = ("stages",)
    dims = (1, 2, 3)
    needs_shapes = False
    formula = "sum_i |s_i - t_i|^2"

    def __init__(self, student_shapes: Sequence[Shape] = (), teacher_shapes: Sequence[Shape] = ()):
        super().__init__(student_shapes, teacher_shapes)
        same_shapes(self.what, self.student_shapes, self.teacher_shapes)

    def level(self, i: int, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        same_shapes(self.what, [student.shape[1:]], [teacher.shape[1:]])
        return counted(student - teacher, mask).square().sum()
