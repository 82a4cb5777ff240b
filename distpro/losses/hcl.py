"""Hierarchical context loss alone (Chen et al., CVPR 2021, Section 3.3): ReviewKD without its fusion.

    loss_i = sum_l w_l MSE(pool_l(s_i), pool_l(t_i)) / sum_l w_l,   l = full size, 4x4, 2x2, 1x1,  w = 1, 1/2, 1/4, 1/8

Levels l not smaller than the map are left out. ``s`` and ``t`` (N, C, H, W) have equal channels; of different sizes the
larger map is average-pooled first. The options are those of `pathways.distances.HCL` (levels, level_weights, decay,
pooling), whose defaults are ReviewKD's code. Departure: ReviewKD has no loss of this kind on raw features.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distpro.losses._maps import PairedLevels, same_size
from distpro.losses._options import COUNT, NOT_NEGATIVE
from distpro.losses.base import LOSSES, Shape, one_of, option_of
from pathways.distances import HCL
from pathways.registry import UserError


@LOSSES.register("hcl")
class HierarchicalContext(PairedLevels):
    """Mean squared errors of a pyramid of average poolings."""

    title = "Distilling Knowledge via Knowledge Review (hierarchical context loss)"
    paper = "Chen et al., Distilling Knowledge via Knowledge Review, CVPR 2021"
    year = 2021
    family = "feature"
    reads = "features of all stages"
    taps = ("stages",)
    before_relu = "teacher"
    needs_shapes = False
    equal_channels = True
    scalars = ("level_weights",)
    formula = "sum_l w_l MSE(pool_l(s), pool_l(t)) / sum_l w_l"
    ranges = {"levels": COUNT, "level_weights": NOT_NEGATIVE, "decay": NOT_NEGATIVE}

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        levels: Sequence[int] = (4, 2, 1),
        level_weights: Sequence[float] | None = None,
        decay: float = 0.5,
        pooling: str = "avg",
    ):
        super().__init__(student_shapes, teacher_shapes)
        one_of(f"{self.what}: pooling", pooling, ("avg", "max"))
        if level_weights is not None and not any(level_weights):
            raise UserError("loss 'hcl': level_weights must not all be 0")
        self.distance = HCL(levels, level_weights, decay, pooling)

    level_weights = option_of("distance", "level_weights")

    def level(self, i: int, student: Tensor, teacher: Tensor) -> Tensor:
        return self.distance(*same_size(student, teacher))
