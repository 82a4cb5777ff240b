"""Attention-based feature distillation (Ji, Heo & Park, AAAI 2021), Eq. 1-7.

Every teacher map attends to all student maps. With h the average over positions, q_t = BN(W h_t), k_s = ReLU(BN(W
h_s)), a bilinear weighting B_t of the keys per teacher map (Linear, BN) and position embeddings p:

    att_(t,s) = softmax over s of (q_t . B_t k_s + p_t . p_s) / sqrt(d)
    loss_t    = mean over batch of sum_s att_(t,s) * mean over positions of (a(s) - a(t))^2

with a(f) = normalise(mean over channels of f^2), the student's averaged to the teacher's size before normalisation.
Shapes (N, C, H, W), any numbers of student and teacher maps; d = ``dim`` = 128. ``levels``: one loss per teacher map.
The authors' weight is 200. Departure: none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distpro.losses._maps import BatchNorm1d, CrossLevels, full, pooled
from distpro.losses._options import COUNT
from distpro.losses.at import attention_map
from distpro.losses.base import LOSSES, Shape, Tensors


@LOSSES.register("afd")
class AttentionFeature(CrossLevels):
    """Attention maps of the teacher against those of the student maps it attends to."""

    title = "Show, Attend and Distill: Knowledge Distillation via Attention-based Feature Matching"
    paper = "Ji, Heo & Park, Show, Attend and Distill, AAAI 2021"
    year = 2021
    family = "feature"
    reads = "features of all stages; the numbers may differ"
    taps = ("stages",)
    formula = "sum_t mean_n sum_s att_(t,s) mean_hw (a(s) - a(t))^2"
    ranges = {"dim": COUNT}

    def __init__(self, student_shapes: Sequence[Shape] = (), teacher_shapes: Sequence[Shape] = (), dim: int = 128):
        super().__init__(student_shapes, teacher_shapes)
        students, teachers = self.student_shapes, self.teacher_shapes
        self.dim = dim
        self.query = nn.ModuleList(_linear_norm(t[0], dim) for t in teachers)
        self.key = nn.ModuleList(_linear_norm(s[0], dim) for s in students)
        self.bilinear = _linear_norm(dim, dim * len(teachers))
        self.position_t = nn.Parameter(nn.init.xavier_normal_(torch.empty(len(teachers), dim)))
        self.position_s = nn.Parameter(nn.init.xavier_normal_(torch.empty(len(students), dim)))

    def levels(
        self, student: Tensors, teacher: Tensors, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Losses per teacher map (T,)."""
        students, teachers = self.maps(student, teacher)
        attention = self.attention(students, teachers)
        energy = [s.square().mean(1, keepdim=True) for s in students]
        maps: dict[torch.Size, Tensor] = {}  # teacher maps of one size share the student's maps
        losses = []
        for i, t in enumerate(teachers):
            size = t.shape[2:]
            if size not in maps:
                maps[size] = torch.stack([F.normalize(pooled(e, size).flatten(1), dim=1) for e in energy], 1)
            error = (maps[size] - attention_map(t)[:, None]).square().mean(2)
            losses.append((attention[:, i] * error).sum(1).mean())
        return torch.stack(losses)

    def attention(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        """Weights (N, T, S), which sum to one over the student maps."""
        query = torch.stack([q(t.mean((2, 3))) for q, t in zip(self.query, teachers, strict=True)], 1)
        key = torch.stack([k(s.mean((2, 3))).relu() for k, s in zip(self.key, students, strict=True)], 1)
        key = self.bilinear(key.flatten(0, 1)).view(len(key), len(students), len(teachers), self.dim)
        logits = torch.einsum("nstd,ntd->nts", full(key), full(query)) + full(self.position_t @ self.position_s.T)
        return F.softmax(full(logits) / math.sqrt(self.dim), dim=2)


def _linear_norm(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_features, out_features), BatchNorm1d(out_features))
