"""Label smoothing (Szegedy et al., CVPR 2016), Section 7: the null teacher, whose opinion is uniform.

    loss = (1 - e) * CE(s, y) + e * mean over classes of -log softmax(s)

Logits (N, K) or (N, K, H, W), labels (N,) or (N, H, W). ``smoothing`` e = 0.1. A class whose logit is -inf, or -1e4 and lower as masks are, is
left out of the mean. *This is a task loss*: the objective
should not add another cross-entropy. The teacher's tensors are ignored. Departure: none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from distpro.losses._options import SHARE
from distpro.losses._rows import ResponseLoss, absent
from distpro.losses.base import LOSSES, Shape


@LOSSES.register("ls")
class LabelSmoothing(ResponseLoss):
    """Cross-entropy with smoothed labels."""

    title = "Label smoothing"
    paper = "Szegedy et al., Rethinking the Inception Architecture for Computer Vision, CVPR 2016"
    year = 2016
    formula = "(1 - e) CE(s, y) - e mean_k log softmax(s)_k"
    needs_target = True
    uses_teacher = False
    scalars = ("smoothing",)
    ranges = {"smoothing": SHARE}

    def __init__(
        self, student_shapes: Sequence[Shape] = (), teacher_shapes: Sequence[Shape] = (), smoothing: float = 0.1
    ):
        super().__init__(student_shapes, teacher_shapes)
        self.smoothing = smoothing

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        out = absent(student)
        log_p = F.log_softmax(student, dim=1)
        uniform = log_p.masked_fill(out, 0).sum(1) / (~out).sum(1)
        task = F.nll_loss(log_p, self.labels(target, student))
        return (1 - self.smoothing) * task - self.smoothing * uniform.mean()
