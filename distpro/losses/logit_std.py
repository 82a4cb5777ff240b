"""Logit standardisation in knowledge distillation (Sun et al., CVPR 2024).

    z(x) = (x - mean_K x) / (eps + std_K x)
    loss = T^2 * mean over the batch of KL(softmax(z(t)/T) || softmax(z(s)/T))

Each sample's logits (N, K), or (N, K, H, W) position by position, are standardised over the classes (unbiased standard
deviation, ``eps`` = 1e-7), so that the student need not match the teacher's scale. ``temperature`` = 2 is the authors'
base temperature; their weight for this term is 9, next to a cross-entropy of weight 0.1.

``of`` names the loss of the standardised logits, `kd` (default) or `dkd`, to which further options are passed
(``of="dkd", beta=2`` is the authors' DKD+LS). Departure: none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from distpro.losses._options import NOT_NEGATIVE, POSITIVE
from distpro.losses._rows import ResponseLoss, absent
from distpro.losses.base import LOSSES, Shape, build_loss, one_of, option_of


def standardized(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """Logits (M, K) with zero mean and unit (unbiased) standard deviation in every row, over the classes that are there:
    masked logits (-1e4 and lower) become -inf."""
    out = absent(logits)
    count = (~out).sum(1, keepdim=True)
    present = logits.masked_fill(out, 0)
    centred = (present - present.sum(1, keepdim=True) / count).masked_fill(out, 0)
    variance = centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
    flat = variance == 0  # where the root has no derivative
    deviation = variance.masked_fill(flat, 1).sqrt().masked_fill(flat, 0)
    return (centred / (eps + deviation)).masked_fill(out, -math.inf)


@LOSSES.register("logit_std")
class LogitStandardization(ResponseLoss):
    """KD or DKD of logits brought to zero mean and unit standard deviation."""

    title = "Logit Standardization in Knowledge Distillation"
    paper = "Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024"
    year = 2024
    scalars = ("temperature", "alpha", "beta")
    formula = "T^2 KL(softmax(z(t)/T) || softmax(z(s)/T)), z = standardise over classes"
    ranges = {"temperature": POSITIVE, "eps": NOT_NEGATIVE}

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        temperature: float = 2.0,
        eps: float = 1e-7,
        of: str = "kd",
        **params: Any,
    ):
        super().__init__(student_shapes, teacher_shapes)
        self.eps = eps
        one_of(f"{self.what}: of", of, ("kd", "dkd"))
        self.inner = build_loss(of, student_shapes, teacher_shapes, temperature=temperature, **params)
        self.needs_target = self.inner.needs_target

    temperature, alpha, beta = (option_of("inner", name) for name in ("temperature", "alpha", "beta"))

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        return self.inner(standardized(student, self.eps), standardized(teacher, self.eps), target)
