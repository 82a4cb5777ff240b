"""Head network distillation (Matsubara et al., IEEE Access 2020).

    loss = sum over all elements of (s - t)^2

The output of the student's head against the output of the teacher's layers that it replaces: `ghnd` at one depth.
Tensors of equal shape, usually maps (N, C, H, W). No options. Published with no task loss beside it. Departure: none.
"""

from __future__ import annotations

from collections.abc import Sequence

from distpro.losses.base import LOSSES, Shape
from distpro.losses.ghnd import GeneralizedHead
from pathways.registry import UserError


@LOSSES.register("hnd")
class Head(GeneralizedHead):
    """Sum of squared errors at the end of the head."""

    title = "Head Network Distillation"
    paper = "Matsubara et al., Head Network Distillation: Splitting Distilled Deep Neural Networks, IEEE Access 2020"
    year = 2020
    reads = "features at the end of the head"
    taps = ("last",)
    formula = "|s - t|^2"

    def __init__(self, student_shapes: Sequence[Shape] = (), teacher_shapes: Sequence[Shape] = ()):
        super().__init__(student_shapes, teacher_shapes)
        if len(self.student_shapes) > 1:
            raise UserError(
                f"loss 'hnd' reads one tensor per model, got {len(self.student_shapes)} (ghnd reads several)"
            )
