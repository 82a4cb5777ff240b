"""Relational knowledge distillation (Park et al., CVPR 2019).

    distance: d_ij = ||e_i - e_j||, divided by its mean over i != j
    angle:    a_ijk = cosine of the angle at e_j between e_i and e_k
    loss = w_d * mean huber(d^s - d^t) + w_a * mean huber(a^s - a^t)

Embeddings (N, D), widths may differ (maps are flattened), N >= 2; no parameters. The Huber loss has its kink at 1; the
means are over all N^2 and N^3 entries. ``w_d`` = 25, ``w_a`` = 50, ``eps`` = 1e-12 (under the root of d) are
RepDistiller's. A zero weight leaves that part out; the angle part needs N^3 numbers.

Departures, as RepDistiller: the means count the entries i = j, which are zero; embeddings are not normalised. Samples
that are nearer to each other than the rounding of their products have no angle, a_ijk = 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distpro.losses._maps import matmul
from distpro.losses._options import POSITIVE
from distpro.losses._rows import RelationLoss
from distpro.losses.base import LOSSES, Shape


@LOSSES.register("rkd")
class Relational(RelationLoss):
    """Huber loss between the pairwise distances and between the triplet angles of the batch."""

    title = "Relational Knowledge Distillation"
    paper = "Park et al., Relational Knowledge Distillation, CVPR 2019"
    year = 2019
    formula = "w_d huber(d^s - d^t) + w_a huber(a^s - a^t)"
    smallest_batch = 2
    scalars = ("w_d", "w_a")
    ranges = {"eps": POSITIVE}

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        w_d: float = 25.0,
        w_a: float = 50.0,
        eps: float = 1e-12,
    ):
        super().__init__(student_shapes, teacher_shapes)
        self.w_d, self.w_a, self.eps = w_d, w_a, eps

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        loss = student.new_zeros(())
        if self.w_d:
            loss = loss + self.w_d * F.smooth_l1_loss(self._distances(student), self._distances(teacher))
        if self.w_a:
            loss = loss + self.w_a * F.smooth_l1_loss(_angles(student), _angles(teacher))
        return loss

    def _distances(self, e: Tensor) -> Tensor:
        """Distances (N, N) over their mean."""
        square = e.square().sum(1)
        d = (square[:, None] + square[None] - 2 * matmul(e, e.T)).clamp(min=self.eps).sqrt()
        d = d.masked_fill(torch.eye(len(e), dtype=torch.bool, device=e.device), 0)
        return d * (len(e) * (len(e) - 1)) / d.sum()


def _angles(e: Tensor) -> Tensor:
    """Cosines (N, N, N) of the angle at the first sample between the other two; 0 at a sample that coincides with one.

    From the Gram matrix, <e_i - e_j, e_k - e_j> = g_ik - g_ij - g_jk + g_jj: the edges themselves are N^2 D numbers, and
    their products N^3 D operations. Centred, or the differences of a far-off cloud would be lost in g.
    """
    centred = e - e.mean(0)
    g = matmul(centred, centred.T)
    sizes = g.diagonal()[:, None] + g.diagonal()
    squares = sizes - 2 * g
    apart = squares > 10 * torch.finfo(e.dtype).eps * sizes
    inverse = torch.where(apart, squares, 1).rsqrt() * apart  # 1 / |e_i - e_j|
    products = g - g[:, :, None] + (g.diagonal()[:, None] - g)[:, None]
    return products * inverse[:, :, None] * inverse[:, None]
