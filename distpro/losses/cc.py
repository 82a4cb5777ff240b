"""Correlation congruence (Peng et al., ICCV 2019).

    neighbour: d = |e_s - e_t|;  loss = mean over i < N of <d_i, d_(i+1)>           (RepDistiller)
    bilinear:  K = E E^T;        loss = ||K_s - K_t||_F / N^2                       (torchdistill)
    gaussian:  K = exp(-2g) sum_{p=0..P} (2g)^p / p! (E E^T)^p, elementwise powers  (torchdistill)

``E`` are embeddings (N, ``feat_dim``) by a linear layer per model, both trained with the student; ``feat_dim=None``
compares what is given, of one width in the neighbour form. ``form="neighbour"`` and ``feat_dim`` = 128 are
RepDistiller's, whose weight is 0.02; ``gamma`` g = 0.4 and ``max_p`` P = 2 the paper's. The neighbour form needs
N >= 2 and depends on the order of the batch.

Departures: torchdistill's norm is not squared, the paper's is; the expansion of the Gaussian kernel holds for unit
vectors, which the reference does not enforce either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from distpro.losses._maps import full, matmul
from distpro.losses._options import COUNT, NOT_NEGATIVE
from distpro.losses._rows import RelationLoss, linear_embeds
from distpro.losses.base import LOSSES, Shape, one_of
from pathways.registry import UserError


@LOSSES.register("cc")
class CorrelationCongruence(RelationLoss):
    """Agreement of the correlations between the samples of a batch."""

    title = "Correlation Congruence for Knowledge Distillation"
    paper = "Peng et al., Correlation Congruence for Knowledge Distillation, ICCV 2019"
    year = 2019
    scalars = ("gamma",)
    formula = "mean_i <|e_s - e_t|_i, |e_s - e_t|_(i+1)>, or |K_s - K_t|_F / N^2"
    ranges = {"feat_dim": COUNT, "max_p": NOT_NEGATIVE}

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        form: str = "neighbour",
        feat_dim: int | None = 128,
        gamma: float = 0.4,
        max_p: int = 2,
    ):
        super().__init__(student_shapes, teacher_shapes)
        self.form = one_of(f"{self.what}: form", form, ("neighbour", "gaussian", "bilinear"))
        self.gamma, self.max_p = gamma, max_p
        self.smallest_batch = 2 if form == "neighbour" else 1
        self.embed_s: nn.Module = nn.Identity()
        self.embed_t: nn.Module = nn.Identity()
        if feat_dim is not None:
            self.embed_s, self.embed_t = linear_embeds(self.what, self.student_shapes, self.teacher_shapes, feat_dim)

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        e_s, e_t = full(self.embed_s(student)), full(self.embed_t(teacher))
        if self.form != "neighbour":
            return (self._kernel(e_s) - self._kernel(e_t)).norm() / len(e_s) ** 2
        if e_s.shape != e_t.shape:
            raise UserError(
                f"loss 'cc' compares widths {e_s.shape[1]} and {e_t.shape[1]}: give feat_dim, for instance 128"
            )
        delta = (e_s - e_t).abs()
        return (delta[:-1] * delta[1:]).sum(1).mean()

    def _kernel(self, e: Tensor) -> Tensor:
        """Kernel matrix (N, N)."""
        products = matmul(e, e.T)
        if self.form == "bilinear":
            return products
        terms = [(2 * self.gamma) ** p / math.factorial(p) * products**p for p in range(self.max_p + 1)]
        return math.exp(-2 * self.gamma) * sum(terms[1:], start=terms[0])
