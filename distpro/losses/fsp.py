"""Flow of the solution procedure (Yim et al., CVPR 2017), Eq. 1-2.

    G_i = first_i second_i^T / (H W)          (N, C_first, C_second), for each two neighbouring maps of a network
    loss_i = mean over all elements of (G_i^s - G_i^t)^2

Maps (N, C, H, W), two or more per model; the larger of two neighbours is average-pooled to the smaller (RepDistiller).
Student and teacher need equal channel counts; their sizes may differ. L maps have L - 1 neighbouring pairs, so
``levels`` has L - 1 entries. ``form="norm"`` gives torchdistill's convention: max pooling as in the paper, and the
2-norms of the columns of G^s - G^t, summed, divided by the batch size.

Published as a first stage that trains the student's layers alone (``pretrain``), before the task loss.
Departure: the paper sums squares over the matrix instead of taking their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from distpro.losses._maps import matmul, neighbours, same_shapes
from distpro.losses.base import LOSSES, DistillationLoss, Shape, Tensors, one_of
from pathways.registry import UserError


@LOSSES.register("fsp")
class FlowOfSolution(DistillationLoss):
    """Difference of the Gram matrices between neighbouring layers."""

    title = "Flow of Solution Procedure"
    paper = "Yim et al., A Gift from Knowledge Distillation, CVPR 2017"
    year = 2017
    family = "relation"
    reads = "features of two or more stages"
    taps = ("stages",)
    pretrain_reads = "both"
    formula = "sum_i mean (G_i^s - G_i^t)^2, G_i = F_i F_(i+1)^T / HW"
    stages = 2

    def __init__(self, student_shapes: Sequence[Shape] = (), teacher_shapes: Sequence[Shape] = (), form: str = "mse"):
        super().__init__(student_shapes, teacher_shapes)
        for shape in (*self.student_shapes, *self.teacher_shapes):
            if len(shape) != 3:
                raise UserError(f"{self.what} reads feature maps (C, H, W), got {tuple(shape)}")
        self.form = one_of(f"{self.what}: form", form, ("mse", "norm"))
        same_shapes(self.what, [s[:1] for s in self.student_shapes], [t[:1] for t in self.teacher_shapes])

    def levels(
        self, student: Tensors, teacher: Tensors, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Losses of the L - 1 neighbouring pairs of L maps. Raises UserError for fewer than two maps."""
        maps = neighbours(self.what, student, teacher)
        return torch.stack([self._compare(s0, s1, t0, t1) for (s0, t0), (s1, t1) in pairwise(maps)])

    def _compare(self, s0: Tensor, s1: Tensor, t0: Tensor, t1: Tensor) -> Tensor:
        pool = F.adaptive_avg_pool2d if self.form == "mse" else F.adaptive_max_pool2d
        g_s, g_t = _flow(s0, s1, pool), _flow(t0, t1, pool)
        same_shapes(self.what, [g_s.shape[1:]], [g_t.shape[1:]])
        if self.form == "mse":
            return F.mse_loss(g_s, g_t)
        return (g_s - g_t).norm(dim=1).sum() / len(g_s)


def _flow(first: Tensor, second: Tensor, pool: Callable[..., Tensor]) -> Tensor:
    """Inner products (N, C_first, C_second) of the channels of two maps, brought to the smaller size."""
    size = [min(a, b) for a, b in zip(first.shape[2:], second.shape[2:], strict=True)]
    first, second = (f if list(f.shape[2:]) == size else pool(f, size) for f in (first, second))
    return matmul(first.flatten(2), second.flatten(2).transpose(1, 2)) / (size[0] * size[1])
