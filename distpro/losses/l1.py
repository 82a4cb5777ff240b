"""Absolute error between what the two models say, for regressions such as depth: the teacher's answer as target.

    loss = mean over all elements of |s - t|

``s`` and ``t`` are responses of one shape: maps (N, C, H, W), of which the larger is average-pooled to the other's size, or
rows (N, D). With a mask the mean is over the positions that count, in depth the measured pixels; ``positions: all`` is over
every position, for a teacher knows the distance of what no sensor has measured. This is the loss that S2D (Ma, Karaman,
ICRA 2018) has for measurements, with the teacher's depth in their place; weight 1 gives both the same say.
Departure: none.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distpro.losses._masks import MaskedLevels, mean_counted, same_size_counted
from distpro.losses.base import LOSSES, Mask, Shape, Tensors, one_of


@LOSSES.register("l1")
class L1(MaskedLevels):
    """Mean absolute error between the student's response and the teacher's."""

    title = "L1 between responses"
    paper = "Ma, Karaman, Sparse-to-Dense: Depth Prediction from Sparse Depth Samples and a Single Image, ICRA 2018 (its loss)"
    year = 2018
    family = "feature"
    reads = "response of a regression"
    taps = ("logits",)
    dims = (1, 3)
    equal_channels = True
    formula = "mean |s - t|"

    def __init__(
        self, student_shapes: Sequence[Shape] = (), teacher_shapes: Sequence[Shape] = (), positions: str = "counted"
    ):
        super().__init__(student_shapes, teacher_shapes)
        self.positions = one_of(f"{self.what}: positions", positions, ("counted", "all"))

    def levels(
        self,
        student: Tensors,
        teacher: Tensors,
        target: Tensor | None = None,
        index: Tensor | None = None,
        mask: Mask = None,
    ) -> Tensor:
        return super().levels(student, teacher, target, index, mask if self.positions == "counted" else None)

    def level(self, i: int, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        if student.dim() == 4:
            student, teacher, mask = same_size_counted(student, teacher, mask)
        return mean_counted((student - teacher).abs(), mask)
