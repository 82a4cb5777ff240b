"""Streamlined knowledge distillation (Jeong et al., CVPR 2026), Eq. 1 and 3-8.

    loss      = instance_weight * instance + direction_weight * direction
    instance  = mean over the batch of KL(softmax(t/T) || softmax(s/T))
    direction = mean over the rows d of D = G(s) - G(t) of sqrt(d^T S^-1 d),   S = cov(D) + tikhonov * I

G(x) (N, N) holds the cosine similarities of the samples' logits, cov(D) is the unbiased covariance of D's columns over
its rows, so a row's length is Mahalanobis'. Logits (N, K), or (N, K, H, W) with every position a sample; at least two
samples and, as all pairs of them are compared, at most 16384. A zero weight leaves that part out. The paper gives no
numbers for ``temperature`` = 4 and ``tikhonov`` = 0.1; they are the authors' code's, which weighs both parts with 0.9
beside a cross-entropy of 0.1. Departure: none.

``form="code"`` is torchdistill's reading of that code: the instance part times T^2, over the samples whose largest
teacher probability is at most the batch's median (the others count as zero); G divided by K; and the direction part
times the share of classes whose teacher probability, summed over the batch, is at most the median. In the code itself
the instance part's mask, too, only multiplies a mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, linalg

from distpro.losses._maps import matmul
from distpro.losses._options import POSITIVE
from distpro.losses._rows import ResponseLoss, absent, kl_rows
from distpro.losses.base import LOSSES, Shape, one_of


@LOSSES.register("skd")
class Streamlined(ResponseLoss):
    """KL divergence of predictions, and Mahalanobis distance of the cosine similarities between samples."""

    title = "Streamlined Knowledge Distillation"
    paper = "Jeong et al., Streamlined Knowledge Distillation, CVPR 2026"
    year = 2026
    formula = "w_i KL(softmax(t/T) || softmax(s/T)) + w_d mean_d sqrt(d^T (cov(D) + c I)^-1 d), D = G(s) - G(t)"
    smallest_batch = 2
    largest_batch = 16384
    scalars = ("temperature", "tikhonov", "instance_weight", "direction_weight")
    ranges = {"temperature": POSITIVE, "tikhonov": POSITIVE}

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        temperature: float = 4.0,
        tikhonov: float = 0.1,
        instance_weight: float = 1.0,
        direction_weight: float = 1.0,
        form: str = "paper",
    ):
        super().__init__(student_shapes, teacher_shapes)
        self.temperature, self.tikhonov = temperature, tikhonov
        self.instance_weight, self.direction_weight = instance_weight, direction_weight
        self.form = one_of(f"{self.what}: form", form, ("paper", "code"))

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        loss = student.new_zeros(())
        if self.instance_weight:
            loss = loss + self.instance_weight * self._instance(student, teacher)
        if self.direction_weight:
            loss = loss + self.direction_weight * self._direction(student, teacher)
        return loss

    def _instance(self, student: Tensor, teacher: Tensor) -> Tensor:
        rows = kl_rows(student, teacher, self.temperature)
        if self.form == "paper":
            return rows.mean() / self.temperature**2
        return (rows * _low(F.softmax(teacher, dim=1).amax(1))).mean()

    def _direction(self, student: Tensor, teacher: Tensor) -> Tensor:
        out = absent(student) | absent(teacher)
        ours, theirs = (x.masked_fill(out, 0) for x in (student, teacher))  # a cosine over the other classes
        d = _similarities(ours) - _similarities(theirs)
        if self.form == "paper":
            return self._mahalanobis(d)
        there = (~out).any(0)
        confidence = F.softmax(teacher, dim=1).sum(0).masked_fill(~there, math.nan)
        share = (confidence <= confidence.nanquantile(0.5)).sum() / there.sum()
        return self._mahalanobis(d / there.sum()) * share

    def _mahalanobis(self, d: Tensor) -> Tensor:
        """Mean length of the rows of (N, N) where their regularised covariance is the unit of length."""
        centred = d - d.mean(0)
        covariance = matmul(centred.T, centred) / (len(d) - 1)
        identity = torch.eye(len(d), dtype=d.dtype, device=d.device)
        root, _ = linalg.cholesky_ex(covariance + self.tikhonov * identity)  # unlike cholesky, asks the device nothing
        return linalg.vector_norm(linalg.solve_triangular(root, d.T, upper=False), dim=0).mean()


def _similarities(logits: Tensor) -> Tensor:
    unit = F.normalize(logits, dim=1)
    return matmul(unit, unit.T)


def _low(confidence: Tensor) -> Tensor:
    """Entries of a vector that are at most its median, as zeros and ones."""
    return (confidence <= confidence.quantile(0.5)).to(confidence.dtype)
