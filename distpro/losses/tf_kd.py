"""Teacher-free knowledge distillation (Yuan et al., CVPR 2020), as the authors' code computes it.

    self:     loss = (1 - a) * CE(s, y) + a * m * T^2 * mean KL(softmax(t/T) || softmax(s/T))
    virtual:  loss = (1 - a) * CE(s, y) + a * m * mean KL(softmax(u/T) || softmax(s))

``form="self"`` (Tf-KD_self): the teacher is the student's own architecture, trained before. ``form="virtual"``
(Tf-KD_reg): no teacher; u is ``correct`` = 0.99 on the label and (1 - correct)/(K - 1) elsewhere, and is put through
the softmax like logits. *The task part is included*: the objective should not add another cross-entropy.

Logits (N, K), labels (N,). ``temperature`` = 20, ``multiplier`` m = 1, ``alpha`` a = 0.9 (self) or 0.1 (virtual). The
authors tune them by network: for ResNet-18 on CIFAR-100 a = 0.95, T = 6, m = 50 (self) and m = 100 (virtual).

Departures from the paper, kept because the published numbers come from them: the mean is over all batch * K elements,
K times smaller than the mean over the batch that `kd` takes (K counts the classes that are there, with a logit above
-1e4); the virtual form has no T^2 and softens the teacher
alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from distpro.losses._options import POSITIVE, SHARE
from distpro.losses._rows import ResponseLoss, absent, kl_rows
from distpro.losses.base import LOSSES, Shape, one_of


@LOSSES.register("tf_kd")
class TeacherFree(ResponseLoss):
    """Distillation from an earlier copy of the student, or from a hand-made distribution."""

    title = "Teacher-free Knowledge Distillation"
    paper = "Yuan et al., Revisiting Knowledge Distillation via Label Smoothing Regularization, CVPR 2020"
    year = 2020
    formula = "(1 - a) CE(s, y) + a m T^2 KL(softmax(t/T) || softmax(s/T)) / K"
    needs_target = True
    scalars = ("alpha", "temperature", "multiplier", "correct")
    ranges = {"temperature": POSITIVE, "correct": SHARE}

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        form: str = "self",
        alpha: float | None = None,
        temperature: float = 20.0,
        multiplier: float = 1.0,
        correct: float = 0.99,
    ):
        super().__init__(student_shapes, teacher_shapes)
        self.uses_teacher = one_of(f"{self.what}: form", form, ("self", "virtual")) == "self"
        self.alpha = (0.9 if self.uses_teacher else 0.1) if alpha is None else alpha
        self.temperature, self.multiplier, self.correct = temperature, multiplier, correct

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        target = self.labels(target, student)
        if self.uses_teacher:
            rows = kl_rows(student, teacher, self.temperature)
        else:
            teacher = self.virtual(student, target).masked_fill(absent(student), -math.inf)
            rows = kl_rows(student, teacher / self.temperature, 1.0)
        classes = (~(absent(student) & absent(teacher))).sum(1)
        task = F.cross_entropy(student, target)
        return (1 - self.alpha) * task + self.alpha * self.multiplier * (rows / classes).mean()

    def virtual(self, student: Tensor, target: Tensor) -> Tensor:
        """Output (N, K) of the virtual teacher."""
        others = (1 - self.correct) / (student.shape[1] - 1)
        return student.new_full(student.shape, others).scatter_(1, target[:, None], self.correct)
