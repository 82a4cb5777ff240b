"""Distillation through a token (DeiT: Touvron et al., ICML 2021), Eq. 3 and 2.

    hard: loss = cross entropy of s with the class that the teacher finds likeliest
    soft: loss = T^2 KL(softmax(t/T) || softmax(s/T))

``s`` (N, K): the logits of the distillation token's head, tap ``head_dist`` of the model `deit`; ``t`` (N, K): the teacher's
logits. Dense logits are rows of positions. The paper adds half of the cross entropy of the class token's head, so that
``task_weight`` and this loss's weight are 0.5 each; at test both heads are averaged (`deit` does). A student of one head
takes both. ``temperature`` 3 is the authors' code's, of the soft form alone. Departure: their code divides the soft form
by the number of classes too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from distpro.losses._options import POSITIVE
from distpro.losses._rows import ResponseLoss, softened_kl
from distpro.losses.base import LOSSES, Shape


@LOSSES.register("deit")
class DistillationToken(ResponseLoss):
    """Cross entropy with the teacher's decision, or the softened KL divergence, of a head of its own."""

    title = "Training data-efficient image transformers & distillation through attention"
    paper = "Touvron et al., Training data-efficient image transformers & distillation through attention, ICML 2021"
    year = 2021
    reads = "logits, the student's of its distillation head"
    formula = "CE(s, argmax t), or T^2 KL(softmax(t/T) || softmax(s/T))"
    scalars = ("temperature",)
    ranges = {"temperature": POSITIVE}

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        hard: bool = True,
        temperature: float = 3.0,
    ):
        super().__init__(student_shapes, teacher_shapes)
        self.hard, self.temperature = hard, temperature

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        if self.hard:
            return F.cross_entropy(student, teacher.argmax(1))
        return softened_kl(student, teacher, self.temperature)
