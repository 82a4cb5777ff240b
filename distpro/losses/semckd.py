"""SemCKD, cross-layer distillation with semantic calibration (Chen et al., AAAI 2021), Eq. 4-9.

Every student map learns from all teacher maps, weighted by how alike the two layers see the samples. With the batch's
similarity matrices A(f) = f f^T (N x N, f flattened per sample), queries Q_s and keys K_t (two-layer perceptrons of the
matrices' rows, output L2-normalised):

    att_(s,t) = softmax over t of Q_s . K_t / soft
    loss_t    = 1 / (N S) sum over samples and s of att_(s,t) * mean over elements of (P_st(s) - t)^2

Shapes (N, C, H, W), any numbers S and T of maps; of a pair of different sizes the larger map is average-pooled first. P
is conv1x1, conv3x3, conv1x1 without bias, BatchNorm and ReLU between them, 2 C_t channels inside. ``levels``: one loss
per teacher map. ``soft`` 1, perceptrons of ``batch_size`` / ``factor`` = N / 4 outputs; the authors' weight is 400.

The perceptrons read rows of length N, so the batch size is part of the module: ``batch_size`` (default 64).
Departure: the authors skip incomplete batches; here their rows are filled up with zeros. Larger batches are refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distpro.losses._maps import BatchNorm2d, CrossLevels, full, matmul, same_size
from distpro.losses._options import COUNT, POSITIVE
from distpro.losses.base import LOSSES, Shape, Tensors
from pathways.registry import UserError


@LOSSES.register("semckd")
class SemanticCalibration(CrossLevels):
    """Attention over the teacher's layers, from batch similarities, weighs projected squared errors."""

    title = "Cross-Layer Distillation with Semantic Calibration"
    paper = "Chen et al., Cross-Layer Distillation with Semantic Calibration, AAAI 2021"
    year = 2021
    family = "feature"
    reads = "features of all stages; the numbers may differ"
    taps = ("stages",)
    needs = ("batch_size",)
    scalars = ("soft",)
    formula = "1/(N S) sum_(n,s,t) att_(s,t) mean (P_st(s) - t)^2"
    ranges = {"batch_size": COUNT, "soft": POSITIVE, "factor": COUNT}

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        batch_size: int = 64,
        soft: float = 1.0,
        factor: int = 4,
    ):
        super().__init__(student_shapes, teacher_shapes)
        students, teachers = self.student_shapes, self.teacher_shapes
        self.batch_size, self.soft = batch_size, soft
        width = max(1, batch_size // factor)
        self.query = nn.ModuleList(_perceptron(batch_size, width) for _ in students)
        self.key = nn.ModuleList(_perceptron(batch_size, width) for _ in teachers)
        self.regressors = nn.ModuleList(nn.ModuleList(_projector(s[0], t[0]) for t in teachers) for s in students)

    def levels(
        self, student: Tensors, teacher: Tensors, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Losses per teacher map (T,)."""
        students, teachers = self.maps(student, teacher)
        if len(students[0]) > self.batch_size:
            found = f"built for batches of up to {self.batch_size} samples, got {len(students[0])}"
            raise UserError(f"loss 'semckd' was {found}: set its batch_size")
        errors = [
            _error(self.regressors[i][j], s, t)  # type: ignore[index]
            for i, s in enumerate(students)
            for j, t in enumerate(teachers)
        ]
        per_pair = torch.stack(errors, 1).unflatten(1, (len(students), len(teachers)))
        weighted = self.attention(students, teachers) * per_pair
        return weighted.sum((0, 1)) / (len(weighted) * len(students))

    def attention(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        """Weights (N, S, T), which sum to one over the teacher maps."""
        query = torch.stack([q(self._similarity(s)) for q, s in zip(self.query, students, strict=True)], 1)
        key = torch.stack([k(self._similarity(t)) for k, t in zip(self.key, teachers, strict=True)], 1)
        query, key = F.normalize(full(query), dim=2), F.normalize(full(key), dim=2)
        return F.softmax(matmul(query, key.transpose(1, 2)) / self.soft, dim=2)

    def _similarity(self, f: Tensor) -> Tensor:
        f = f.flatten(1)
        return F.pad(matmul(f, f.T), (0, self.batch_size - len(f)))


def _error(projector: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error per sample (N,)."""
    student, teacher = same_size(student, teacher)
    return (full(projector(student)) - teacher).square().flatten(1).mean(1)


def _perceptron(in_features: int, out_features: int) -> nn.Sequential:
    hidden = nn.Linear(in_features, 2 * out_features)
    return nn.Sequential(hidden, nn.ReLU(), nn.Linear(2 * out_features, out_features))


def _projector(in_channels: int, out_channels: int) -> nn.Sequential:
    mid = 2 * out_channels
    return nn.Sequential(
        nn.Conv2d(in_channels, mid, 1, bias=False),
        BatchNorm2d(mid),
        nn.ReLU(),
        nn.Conv2d(mid, mid, 3, padding=1, bias=False),
        BatchNorm2d(mid),
        nn.ReLU(),
        nn.Conv2d(mid, out_channels, 1, bias=False),
    )
