"""The target-class part (TCKD) of decoupled knowledge distillation (Zhao et al., CVPR 2022), Eq. 7.

    loss = T^2 * mean over the batch of KL(b_t || b_s),   b = [p_y, 1 - p_y],  p = softmax(logits / T)

y is the labelled class. Logits (N, K) or (N, K, H, W), labels in 0..K-1 of shape (N,) or (N, H, W). ``temperature`` = 4
as in `dkd`, which is alpha times this part plus beta times `dkd_nontarget`; as terms of their own the two follow
processes of their own. Departure: the probability of the other classes is a log-sum-exp of theirs instead of the log of
a sum, so that sure predictions stay finite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distpro.losses._options import POSITIVE
from distpro.losses._rows import ResponseLoss
from distpro.losses.base import LOSSES, Shape

EXCLUDED = -1e9  # logit of a class that is not there: its probability is exactly zero, and 0 * EXCLUDED is not NaN


def target_part(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Scalar TCKD of logits (M, K) and labels (M,)."""
    log_s, log_t = (_binary(x / temperature, labels[:, None]) for x in (student, teacher))
    neither = (log_s == -math.inf) & (log_t == -math.inf)
    log_s, log_t = log_s.masked_fill(neither, 0), log_t.masked_fill(neither, 0)
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True) * temperature**2


def _binary(logits: Tensor, label: Tensor) -> Tensor:
    """log [p_y, 1 - p_y] of logits (M, K) and labels (M, 1), shape (M, 2)."""
    log_p = F.log_softmax(logits, dim=1)
    others = log_p.scatter(1, label, EXCLUDED).logsumexp(1, keepdim=True)
    return torch.cat([log_p.gather(1, label), others], dim=1)


@LOSSES.register("dkd_target")
class TargetClass(ResponseLoss):
    """KL divergence between the binary distributions of the labelled class against the rest."""

    title = "Decoupled Knowledge Distillation (target class)"
    paper = "Zhao et al., Decoupled Knowledge Distillation, CVPR 2022"
    year = 2022
    formula = "T^2 KL(b_t || b_s), b = [p_y, 1 - p_y]"
    needs_target = True
    scalars = ("temperature",)
    ranges = {"temperature": POSITIVE}

    def __init__(
        self, student_shapes: Sequence[Shape] = (), teacher_shapes: Sequence[Shape] = (), temperature: float = 4.0
    ):
        super().__init__(student_shapes, teacher_shapes)
        self.temperature = temperature

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return target_part(student, teacher, self.labels(target, student), self.temperature)
