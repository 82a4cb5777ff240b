"""The non-target-class part (NCKD) of decoupled knowledge distillation (Zhao et al., CVPR 2022), Eq. 7.

    loss = T^2 * mean over the batch of KL(q_t || q_s),   q = softmax(logits / T) over the classes other than y

y is the labelled class. Logits (N, K) or (N, K, H, W), labels in 0..K-1 of shape (N,) or (N, H, W). ``temperature`` = 4
as in `dkd`, which is alpha times `dkd_target` plus beta times this part; as terms of their own the two follow processes
of their own. Departure: none.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distpro.losses._options import POSITIVE
from distpro.losses._rows import ResponseLoss, softened_kl
from distpro.losses.base import LOSSES, Shape
from distpro.losses.dkd_target import EXCLUDED


def nontarget_part(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Scalar NCKD of logits (M, K) and labels (M,)."""
    s, t = (x.scatter(1, labels[:, None], EXCLUDED) for x in (student, teacher))
    return softened_kl(s, t, temperature)


@LOSSES.register("dkd_nontarget")
class NonTargetClasses(ResponseLoss):
    """KL divergence between the distributions over the classes other than the labelled one."""

    title = "Decoupled Knowledge Distillation (non-target classes)"
    paper = "Zhao et al., Decoupled Knowledge Distillation, CVPR 2022"
    year = 2022
    formula = "T^2 KL(q_t || q_s), q = p without y"
    needs_target = True
    scalars = ("temperature",)
    ranges = {"temperature": POSITIVE}

    def __init__(
        self, student_shapes: Sequence[Shape] = (), teacher_shapes: Sequence[Shape] = (), temperature: float = 4.0
    ):
        super().__init__(student_shapes, teacher_shapes)
        self.temperature = temperature

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return nontarget_part(student, teacher, self.labels(target, student), self.temperature)
