"""Multi-level logit distillation (Jin et al., CVPR 2023).

    loss = sum over temperatures T of  T^2 mean KL(p_t || p_s)
                                     + ||P_s P_s^T - P_t P_t^T||^2 / N
                                     + ||P_s^T P_s - P_t^T P_t||^2 / K

with P (N, K) the rows p = softmax(logits / T): agreement instance by instance, between the instances of the batch, and
between the classes. Logits (N, K), or (N, K, H, W) with every position a sample; at most 16384 rows, as all pairs of
them are compared; K counts the classes that are there, with a logit above -1e4. ``temperatures`` = (2, 3, 4, 5, 6) as in the paper. With ``standardize`` the KL part sees logits as
`logit_std` makes them (MLKD+LS of Sun et al., CVPR 2024).

The method also feeds a strongly augmented view of each image: give both views as one batch. Departures: the authors'
code drops that view's batch and class parts, and multiplies its reduced losses by masks of confident samples and
classes, which amounts to a factor of about 1/2; here the paper's equations are followed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from distpro.losses._maps import matmul
from distpro.losses._options import POSITIVE
from distpro.losses._rows import ResponseLoss, absent, softened_kl
from distpro.losses.base import LOSSES, Shape
from distpro.losses.logit_std import standardized
from pathways.registry import UserError


@LOSSES.register("mlkd")
class MultiLevel(ResponseLoss):
    """Instance-, batch- and class-level agreement of predictions at several temperatures."""

    title = "Multi-Level Logit Distillation"
    paper = "Jin et al., Multi-Level Logit Distillation, CVPR 2023"
    year = 2023
    largest_batch = 16384
    scalars = ("temperatures",)
    formula = "sum_T T^2 KL(p_t || p_s) + |P_s P_s^T - P_t P_t^T|^2 / N + |P_s^T P_s - P_t^T P_t|^2 / K"
    ranges = {"temperatures": POSITIVE}

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        temperatures: Sequence[float] = (2.0, 3.0, 4.0, 5.0, 6.0),
        standardize: bool = False,
    ):
        super().__init__(student_shapes, teacher_shapes)
        if not temperatures:
            raise UserError("loss 'mlkd' needs at least one temperature")
        self.temperatures = tuple(temperatures)
        self.standardize = standardize

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        loss = student.new_zeros(())
        z_s, z_t = (standardized(x) if self.standardize else x for x in (student, teacher))
        classes = (~(absent(student) & absent(teacher))).any(0).sum()
        for temperature in self.temperatures:
            p_s, p_t = (F.softmax(x / temperature, dim=1) for x in (student, teacher))
            between_samples = (matmul(p_s, p_s.T) - matmul(p_t, p_t.T)).square().sum() / len(p_s)
            between_classes = (matmul(p_s.T, p_s) - matmul(p_t.T, p_t)).square().sum() / classes
            loss = loss + softened_kl(z_s, z_t, temperature) + between_samples + between_classes
        return loss
