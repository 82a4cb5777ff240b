"""Probabilistic knowledge transfer (Passalis and Tefas, ECCV 2018).

    K = (1 + cosine similarity of the samples) / 2,   p = K with every row divided by its sum
    loss = mean over batch x batch of p_t log((p_t + eps) / (p_s + eps))

Embeddings (N, D), widths may differ (maps are flattened); no parameters. ``eps`` = 1e-7 as in the authors' code and
RepDistiller, also added to the norms; RepDistiller's weight is 30000. Departure from the paper, as its code has it:
the similarity of a sample with itself is included.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distpro.losses._maps import matmul
from distpro.losses._options import NOT_NEGATIVE
from distpro.losses._rows import RelationLoss
from distpro.losses.base import LOSSES, Shape


@LOSSES.register("pkt")
class ProbabilisticTransfer(RelationLoss):
    """KL divergence between the cosine-similarity distributions of the batch."""

    title = "Probabilistic Knowledge Transfer"
    paper = "Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018"
    year = 2018
    formula = "mean p_t log(p_t / p_s), p = row-normalised (1 + cos) / 2"
    ranges = {"eps": NOT_NEGATIVE}

    def __init__(self, student_shapes: Sequence[Shape] = (), teacher_shapes: Sequence[Shape] = (), eps: float = 1e-7):
        super().__init__(student_shapes, teacher_shapes)
        self.eps = eps

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        p_s, p_t = self._similarities(student), self._similarities(teacher)
        return (p_t * ((p_t + self.eps) / (p_s + self.eps)).log()).mean()

    def _similarities(self, x: Tensor) -> Tensor:
        x = x / (x.norm(dim=1, keepdim=True) + self.eps)
        kernel = (matmul(x, x.T) + 1) / 2
        return kernel / kernel.sum(1, keepdim=True)
