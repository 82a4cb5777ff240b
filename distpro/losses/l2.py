"""Mean squared error of features, the plain feature distillation that others are compared with.

    loss_i = mean over all elements of (project(s_i) - t_i)^2

``s`` and ``t`` are maps (N, C, H, W), embeddings (N, D) or tokens (N, L, D); any number of levels. ``project`` is a 1x1
convolution or linear layer (with bias) where widths differ, else the identity. Of maps of different sizes the larger
one is average-pooled first. With a mask the mean is over the positions or tokens that count. No options. This is the L2
baseline, and first stage, of PAD (Zhang et al., ECCV 2020, Eq. 1); unlike `hint` there is no BatchNorm and no ReLU.
Departure: none.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from distpro.losses._maps import full
from distpro.losses._masks import MaskedLevels, mean_square, same_size_counted
from distpro.losses.base import LOSSES, Shape
from pathways.registry import UserError


def projection(student: Shape, teacher: Shape) -> nn.Module:
    """Map from the student's width to the teacher's: identity, linear layer or, for (C, H, W), 1x1 convolution.

    Raises UserError if the shapes are not of one kind, or the numbers of tokens differ.
    """
    if len(student) != len(teacher) or (len(student) == 2 and student[0] != teacher[0]):
        raise UserError(f"cannot compare features of shapes {tuple(student)} (student) and {tuple(teacher)} (teacher)")
    if len(student) == 3:
        return nn.Identity() if student[0] == teacher[0] else nn.Conv2d(student[0], teacher[0], 1)
    return nn.Identity() if student[-1] == teacher[-1] else nn.Linear(student[-1], teacher[-1])


@LOSSES.register("l2")
class L2(MaskedLevels):
    """Mean squared error between projected student features and the teacher's."""

    title = "L2 feature distillation"
    paper = "Zhang et al., Prime-Aware Adaptive Distillation, ECCV 2020 (baseline)"
    year = 2020
    family = "feature"
    reads = "features of all stages, or embedding"
    taps = ("stages",)
    dims = (1, 2, 3)
    formula = "mean (project(s) - t)^2"

    def __init__(self, student_shapes: Sequence[Shape] = (), teacher_shapes: Sequence[Shape] = ()):
        super().__init__(student_shapes, teacher_shapes)
        self.project = nn.ModuleList(projection(s, t) for s, t in self.shapes)

    def level(self, i: int, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        if student.dim() == 4:
            student, teacher, mask = same_size_counted(student, teacher, mask)
        return mean_square(full(self.project[i](student)), teacher, mask)
