"""Self-supervised knowledge distillation using singular value decomposition (Lee, Kim & Song, ECCV 2018), Eq. 2-6.

Per map, the singular value decomposition of the (HW, C) matrix of each sample: the teacher keeps its first k right
vectors v_t, the student k + 3; each teacher vector is matched with the student vector of largest |cosine|, with its
sign, and both are scaled by the teacher's singular values (normalised over the k). Between neighbouring maps i-1 and i:

    R(v)_(a,b) = exp(-(v_i[a] - v_(i-1)[b])^2 / 8) over all channel pairs (a, b)
    loss_i     = 1/N sum of (R(v_s) - R(v_t))^2,   i = 1 .. L-1

Maps (N, C, H, W) of at least two levels; sizes may differ, channels must agree level by level. L maps have L - 1
neighbouring pairs, so ``levels`` has L - 1 entries. ``k`` 1, as in RepDistiller. The signs of singular vectors, and so
the loss, are the decomposition routine's choice: values agree between devices only up to that.

A map of dead channels or of few patterns has singular values that coincide, at 0 or elsewhere, and the derivative of
its decomposition divides by their differences. Those at 0 are therefore set apart by amounts that move a vector by no more
than rounding does. A sample one of whose matched student vectors still has no direction of its own (its singular value
coincides with another) is left out of value and gradient, which RepDistiller does for the value.

One stage: the paper trains with the task loss at the same time. RepDistiller trains with this loss alone first.
Departure: none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, linalg

from distpro.losses._maps import matmul, neighbours, paired_shapes
from distpro.losses._options import COUNT
from distpro.losses.base import LOSSES, DistillationLoss, Shape, Tensors


@LOSSES.register("kdsvd")
class SingularVectors(DistillationLoss):
    """Correlation of the leading singular vectors of neighbouring maps, student against teacher."""

    title = "Self-supervised Knowledge Distillation Using Singular Value Decomposition"
    paper = "Lee, Kim & Song, Self-supervised Knowledge Distillation Using Singular Value Decomposition, ECCV 2018"
    year = 2018
    family = "feature"
    reads = "features of two or more stages"
    taps = ("stages",)
    formula = "1/N sum (R(v_s) - R(v_t))^2, R = exp(-(v_i[a] - v_(i-1)[b])^2 / 8)"
    ranges = {"k": COUNT}

    def __init__(self, student_shapes: Sequence[Shape] = (), teacher_shapes: Sequence[Shape] = (), k: int = 1):
        super().__init__(student_shapes, teacher_shapes)
        if self.student_shapes or self.teacher_shapes:
            paired_shapes(self.what, self.student_shapes, self.teacher_shapes, equal_channels=True)
        self.k = k

    def levels(
        self, student: Tensors, teacher: Tensors, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Losses of the L - 1 neighbouring pairs of L maps. Raises UserError for fewer than two maps."""
        vectors = [self._vectors(s, t) for s, t in neighbours(self.what, student, teacher)]
        return torch.stack(
            [
                _distance(_kernel(s1, s0), _kernel(t1, t0), kept0 & kept1)
                for (s0, t0, kept0), (s1, t1, kept1) in pairwise(vectors)
            ]
        )

    def _vectors(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Matched right singular vectors (N, C, k) of both maps, scaled by the teacher's singular values, and which samples
        (N,) have them."""
        scale, v_t = _svd(teacher, self.k)
        v_s, defined = _vectors_apart(student, self.k + 3)
        cosine = matmul(v_s.transpose(1, 2), v_t)
        best = cosine.abs() == cosine.abs().amax(1, keepdim=True)
        v_s = matmul(v_s, torch.where(best, cosine.sign(), 0.0).to(v_s.dtype))
        kept = (defined[:, :, None] | ~best).flatten(1).all(1)
        return v_s * scale[:, None], v_t * scale[:, None], kept


def _vectors_apart(f: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Right singular vectors (N, C, m) of maps (N, C, H, W), the first m = n or as many as there are, and which of them
    (N, m) have a direction of their own. Samples that have none at all, or no derivative, get no gradient."""
    a = f.flatten(2).transpose(1, 2)
    height, width = a.shape[1:]
    largest = a.detach().abs().amax((1, 2), keepdim=True)
    a = a / largest.where(largest > 0, 1)  # the same vectors
    small, eps = min(height, width), torch.finfo(a.dtype).eps
    size = a.detach().square().sum((1, 2))[:, None]  # of the squares of all singular values
    size = size.where(size > 0, 1)
    # Rows (or columns, where they are fewer) of their own add up to 4 eps of it to the squares, each another share.
    shares = torch.arange(1, small + 1, dtype=a.dtype, device=a.device) / small
    more = (shares * (4 * eps * size).sqrt()).diag_embed()
    _, s, vh = linalg.svd(torch.cat([a, more], 1 if small == width else 2), full_matrices=False)
    square = s.detach().square()
    between = square[:, :-1] - square[:, 1:]
    edge = torch.full_like(square[:, :1], math.inf)
    gaps = torch.minimum(torch.cat([edge, between], 1), torch.cat([between, square[:, -1:]], 1))
    divides = (between > 0).all(1, keepdim=True)  # else the derivative, of whichever vector, is 0 / 0
    if a.requires_grad:
        a.register_hook(lambda gradient: None if gradient is None else torch.where(divides[:, :, None], gradient, 0))
    defined = (gaps > 16 * eps * size) & divides
    m = min(n, small)
    return F.normalize(vh.mH[:, :width, :m], dim=1), defined[:, :m]


def _svd(f: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Normalised first ``n`` singular values (N, n) and right vectors (N, C, n) of maps (N, C, H, W)."""
    _, s, vh = linalg.svd(f.flatten(2).transpose(1, 2), full_matrices=False)
    return F.normalize(s[:, :n], dim=1), F.normalize(vh.mH[:, :, :n], dim=1)


def _kernel(v: Tensor, before: Tensor) -> Tensor:
    """(N, C_i, C_(i-1), k)."""
    return torch.exp(-(v[:, :, None] - before[:, None]).square() / 8)


def _distance(student: Tensor, teacher: Tensor, kept: Tensor) -> Tensor:
    """Squared distance per sample, of the samples that are kept, over the number of all."""
    return torch.where(kept, (student - teacher).square().flatten(1).sum(1), 0).sum() / len(kept)
