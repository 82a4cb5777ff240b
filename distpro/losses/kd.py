"""Knowledge distillation (Hinton et al., 2015), Section 2.

    loss = T^2 * mean over the batch of KL(softmax(t/T) || softmax(s/T))

``s``, ``t`` are logits (N, K); of dense logits (N, K, H, W) every position is a sample. ``temperature`` = 4 as in
RepDistiller and mdistiller (whose weights are 0.9 for this term and 0.1 for the cross-entropy).

``ce_weight`` = a > 0 gives torchdistill's KDLoss, a * CE(s, target) + (1 - a) * loss: a *task part is then included*,
so that the objective should not add another. Default 0: the distillation part alone. Departure: none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from distpro.losses._options import POSITIVE
from distpro.losses._rows import ResponseLoss, softened_kl
from distpro.losses.base import LOSSES, Shape


@LOSSES.register("kd")
class KD(ResponseLoss):
    """KL divergence between softened class probabilities, with the cross-entropy mixed in on request."""

    title = "Knowledge Distillation"
    paper = "Hinton et al., Distilling the Knowledge in a Neural Network, NIPS workshop 2015"
    year = 2015
    scalars = ("temperature", "ce_weight")
    formula = "T^2 KL(softmax(t/T) || softmax(s/T))"
    ranges = {"temperature": POSITIVE}

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        temperature: float = 4.0,
        ce_weight: float = 0.0,
    ):
        super().__init__(student_shapes, teacher_shapes)
        self.temperature = temperature
        self.ce_weight = ce_weight
        self.needs_target = ce_weight != 0

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        loss = softened_kl(student, teacher, self.temperature)
        if not self.ce_weight:
            return loss
        return self.ce_weight * F.cross_entropy(student, self.labels(target, student)) + (1 - self.ce_weight) * loss
