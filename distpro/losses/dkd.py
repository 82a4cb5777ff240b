"""Decoupled knowledge distillation (Zhao et al., CVPR 2022), Eq. 7.

    loss = alpha * TCKD + beta * NCKD,   both T^2 * mean over the batch of a KL divergence

TCKD compares the binary distributions [p_y, 1 - p_y] of the labelled class y, NCKD the distributions over the other
classes alone; p = softmax(logits / T). Logits (N, K) or (N, K, H, W), labels in 0..K-1 of shape (N,) or (N, H, W).
``alpha`` = 1, ``beta`` = 8, ``temperature`` = 4 are mdistiller's; its ``beta`` on CIFAR-100 ranges from 1 to 8 with
the pair (2 for ResNet-56 to ResNet-20). ``alpha=0`` or ``beta=0`` gives one part alone.

Departures: mdistiller's warm-up min(epoch/20, 1) is left to the weight's process; the probability of the other classes
is a log-sum-exp of theirs instead of the log of a sum, so that sure predictions stay finite.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distpro.losses._rows import ResponseLoss, softened_kl
from distpro.losses.base import LOSSES, Shape

_EXCLUDED = -1e9  # logit of a class that is not there: its probability is exactly zero, and 0 * _EXCLUDED is not NaN


@LOSSES.register("dkd")
class DKD(ResponseLoss):
    """Target-class and non-target-class parts of the KL divergence, weighted apart."""

    title = "Decoupled Knowledge Distillation"
    paper = "Zhao et al., Decoupled Knowledge Distillation, CVPR 2022"
    year = 2022
    formula = "alpha KL(b_t || b_s) + beta KL(q_t || q_s), b = [p_y, 1 - p_y], q = p without y"
    needs_target = True

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
        assert target is not None
        labelled = torch.zeros_like(student, dtype=torch.bool).scatter_(1, target[:, None], True)
        loss = student.new_zeros(())
        if self.alpha:
            loss = loss + self.alpha * self._target_part(student, teacher, labelled)
        if self.beta:
            s, t = (x.masked_fill(labelled, _EXCLUDED * self.temperature) for x in (student, teacher))
            loss = loss + self.beta * softened_kl(s, t, self.temperature)
        return loss

    def _target_part(self, student: Tensor, teacher: Tensor, labelled: Tensor) -> Tensor:
        log_s, log_t = (_binary(x / self.temperature, labelled) for x in (student, teacher))
        return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * self.temperature**2


def _binary(logits: Tensor, labelled: Tensor) -> Tensor:
    """log [p_y, 1 - p_y] of logits (M, K), shape (M, 2)."""
    log_p = F.log_softmax(logits, dim=1)
    parts = (log_p.masked_fill(~labelled, _EXCLUDED), log_p.masked_fill(labelled, _EXCLUDED))
    return torch.stack([part.logsumexp(1) for part in parts], dim=1)
