"""Prime-aware adaptive distillation with the L2 distance (Zhang et al., ECCV 2020), Eq. 5.

    loss = mean over batch and dimensions of (e - t)^2 / (eps + exp(v)) + v,   e = project(s),  v = BN(W e)

``s`` (N, D_s) and ``t`` (N, D_t) are the embeddings before the classifier; maps (N, C, H, W) are averaged over
positions. ``project`` is a linear layer where widths differ, else the identity. The variance head gives the logarithm v
of one variance per sample and dimension, so that samples which the student cannot follow weigh less. ``eps`` 1e-6.

Published in two stages, L2 alone first (``pretrain``); torchdistill gives each half of the epochs. Departure from the
paper, as in torchdistill: no factor 1/2, and the logarithm of the variance is what is learned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from distpro.losses._maps import BatchNorm1d, full, one_pair
from distpro.losses._options import NOT_NEGATIVE
from distpro.losses._rows import pooled_embedding
from distpro.losses.base import LOSSES, DistillationLoss, Shape, Tensors, single
from distpro.losses.l2 import projection


@LOSSES.register("pad_l2")
class PrimeAwareL2(DistillationLoss):
    """Squared error of embeddings, each entry divided by a learned variance."""

    title = "Prime-Aware Adaptive Distillation"
    paper = "Zhang et al., Prime-Aware Adaptive Distillation, ECCV 2020"
    year = 2020
    family = "feature"
    reads = "embedding"
    taps = ("embedding",)
    pretrain_reads = "both"
    signed = True
    formula = "mean (e - t)^2 / (eps + exp(v)) + v, e = project(s), v = BN(W e)"
    stages = 2
    ranges = {"eps": NOT_NEGATIVE}

    def __init__(self, student_shapes: Sequence[Shape] = (), teacher_shapes: Sequence[Shape] = (), eps: float = 1e-6):
        super().__init__(student_shapes, teacher_shapes)
        shapes = one_pair(self.what, self.student_shapes, self.teacher_shapes, dims=(1, 3))
        student, teacher = (shape[:1] for shape in shapes)
        self.eps = eps
        self.project = projection(student, teacher)
        self.variance = nn.Sequential(nn.Linear(teacher[0], teacher[0]), BatchNorm1d(teacher[0]))

    def pretrain(
        self, student: Tensors, teacher: Tensors, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Loss of the first stage: mean squared error of the embeddings."""
        return F.mse_loss(full(self.project(self._embedding(student))), self._embedding(teacher).detach())

    def forward(
        self, student: Tensors, teacher: Tensors, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        embedding = self.project(self._embedding(student))
        return self.distance(embedding, self._embedding(teacher), self.variance(embedding))

    def distance(self, student: Tensor, teacher: Tensor, log_variance: Tensor) -> Tensor:
        """Scalar loss of embeddings (N, D) and logarithms of variances (N, D)."""
        error, v = (full(student) - full(teacher.detach())).square(), full(log_variance)
        return (error / (self.eps + v.exp()) + v).mean()

    def _embedding(self, features: Tensors) -> Tensor:
        return pooled_embedding(full(single(features, self.what)))
