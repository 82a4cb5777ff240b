"""DIST, knowledge distillation from a stronger teacher (Huang et al., NeurIPS 2022).

    loss = tau^2 * (beta * (1 - mean over rows of rho) + gamma * (1 - mean over columns of rho))

``rho`` is the Pearson correlation of student and teacher in a row (the classes of a sample) or a column (the samples
of a class) of softmax(logits / tau), classes left out whose logits are masked (-1e4 and lower, -inf) in both, with ``eps`` = 1e-8 added to the product of the norms. Logits (N, K); of dense
logits (N, K, H, W) every position is a sample. ``beta`` = ``gamma`` = 1 and ``tau`` = 1 (authors' code; the paper
takes 4 on CIFAR-100). A batch of one sample has no correlation within a class: that part is then constant. Departure:
none. (torchdistill clamps the norms instead of adding eps, and differs by up to 1e-4.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from distpro.losses._options import NOT_NEGATIVE, POSITIVE
from distpro.losses._rows import ResponseLoss, absent
from distpro.losses.base import LOSSES, Shape


def pearson(a: Tensor, b: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """Correlation of the rows of two matrices (M, D), shape (M,); over the entries that ``out`` (M, D) does not leave out."""
    if out is None:
        a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    else:
        count = (~out).sum(1, keepdim=True).clamp(min=1)
        a, b = (x.masked_fill(out, 0) for x in (a, b))
        a, b = ((x - x.sum(1, keepdim=True) / count).masked_fill(out, 0) for x in (a, b))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + eps)


@LOSSES.register("dist")
class DIST(ResponseLoss):
    """One minus the correlation of predictions, over the classes of a sample and over the samples of a class."""

    title = "DIST"
    paper = "Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022"
    year = 2022
    scalars = ("beta", "gamma", "tau")
    formula = "tau^2 (beta (1 - mean rho_rows) + gamma (1 - mean rho_columns))"
    ranges = {"tau": POSITIVE, "eps": NOT_NEGATIVE}

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        beta: float = 1.0,
        gamma: float = 1.0,
        tau: float = 1.0,
        eps: float = 1e-8,
    ):
        super().__init__(student_shapes, teacher_shapes)
        self.beta, self.gamma, self.tau, self.eps = beta, gamma, tau, eps

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        p_s, p_t = (F.softmax(x / self.tau, dim=1) for x in (student, teacher))
        out = absent(student) & absent(teacher)
        between = 1 - pearson(p_s, p_t, self.eps, out).mean()
        within = 1 - pearson(p_s.T, p_t.T, self.eps, out.T).sum() / (~out).any(0).sum()
        return self.tau**2 * (self.beta * between + self.gamma * within)
