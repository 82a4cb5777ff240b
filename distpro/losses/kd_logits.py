"""Distillation of plain logits as SuperGradients has it (KDLogitsLoss); Hinton et al., 2015, at temperature 1.

    loss = (1 - a) * CE(s, target) + a * mean over the batch of KL(softmax(t) || softmax(s))

``s``, ``t`` are logits (N, K) or (N, K, H, W). ``coeff`` = a = 0.5 is SuperGradients' ``distillation_loss_coeff``.

*A task part is included*: the objective should not add another cross-entropy (``coeff=1`` leaves it out).
Departure: the task part is the cross-entropy; SuperGradients takes any loss there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from distpro.losses._rows import ResponseLoss, softened_kl
from distpro.losses.base import LOSSES, Shape


@LOSSES.register("kd_logits")
class KDLogits(ResponseLoss):
    """Cross-entropy and KL divergence of the unsoftened probabilities, mixed."""

    title = "KD logits loss (SuperGradients)"
    paper = "Hinton et al., Distilling the Knowledge in a Neural Network, NIPS workshop 2015; form of SuperGradients"
    year = 2015
    formula = "(1 - a) CE(s, y) + a KL(softmax(t) || softmax(s))"
    needs_target = True
    scalars = ("coeff",)

    def __init__(self, student_shapes: Sequence[Shape] = (), teacher_shapes: Sequence[Shape] = (), coeff: float = 0.5):
        super().__init__(student_shapes, teacher_shapes)
        self.coeff = coeff

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        task = F.cross_entropy(student, self.labels(target, student))
        return (1 - self.coeff) * task + self.coeff * softened_kl(student, teacher, 1.0)
