"""Decoupled knowledge distillation (Zhao et al., CVPR 2022), Eq. 7.

    loss = alpha * TCKD + beta * NCKD,   both T^2 * mean over the batch of a KL divergence

TCKD (`dkd_target`) compares the binary distributions [p_y, 1 - p_y] of the labelled class y, NCKD (`dkd_nontarget`) the
distributions over the other classes alone; p = softmax(logits / T). Logits (N, K) or (N, K, H, W), labels in 0..K-1 of
shape (N,) or (N, H, W). ``alpha`` = 1, ``beta`` = 8, ``temperature`` = 4 are mdistiller's; its ``beta`` on CIFAR-100
ranges from 1 to 8 with the pair (2 for ResNet-56 to ResNet-20). A zero weight leaves that part out.

Departure: mdistiller's warm-up min(epoch/20, 1) is left to the weight's process.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distpro.losses._options import POSITIVE
from distpro.losses._rows import ResponseLoss
from distpro.losses.base import LOSSES, Shape
from distpro.losses.dkd_nontarget import nontarget_part
from distpro.losses.dkd_target import target_part


@LOSSES.register("dkd")
class DKD(ResponseLoss):
    """Target-class and non-target-class parts of the KL divergence, weighted apart."""

    title = "Decoupled Knowledge Distillation"
    paper = "Zhao et al., Decoupled Knowledge Distillation, CVPR 2022"
    year = 2022
    formula = "alpha KL(b_t || b_s) + beta KL(q_t || q_s), b = [p_y, 1 - p_y], q = p without y"
    needs_target = True
    scalars = ("alpha", "beta", "temperature")
    ranges = {"temperature": POSITIVE}

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
    ):
        super().__init__(student_shapes, teacher_shapes)
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        labels = self.labels(target, student)
        loss = student.new_zeros(())
        if self.alpha:
            loss = loss + self.alpha * target_part(student, teacher, labels, self.temperature)
        if self.beta:
            loss = loss + self.beta * nontarget_part(student, teacher, labels, self.temperature)
        return loss
