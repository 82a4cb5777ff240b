"""Knowledge review (Chen et al., CVPR 2021), Section 3, as the authors' code computes it.

Features f_1 .. f_L of the student and t_1 .. t_L of the teacher, shallow to deep, (N, C, H, W); the last is usually the
pooled one, which may also come as (N, C). With m = ``mid_channels`` = min(512, channels of f_L), from k = L down to 1:

    u   = BN(conv1x1(f_k))
    r_k = u z_0 + v z_1,  v = nearest(r_(k+1)), z = sigmoid(conv1x1([u, v]))  for k < L (ABF);   r_L = u
    r_k is resized (nearest) to the teacher's size where that differs; out_k = BN(conv3x3(r_k))
    loss = sum_k HCL(out_k, t_k)

``levels`` gives the terms of the sum, shallow to deep. Published weights: 0.6 (ResNet-20), 1 (ResNet-32), 5 (WRN, 8x4,
ShuffleNetV1), 8 (ShuffleNetV2), with a warm-up of 20 epochs. The teacher's features are those before the ReLU.

The parts can be switched off as in the reproduction study (Verma et al., ReScience C 2022), where a part also needs
the ones before it: ``review`` (RM, off: every level by itself), ``residual`` (RLF, off: level k compares the sum of all
BN(conv1x1(f_j)), j >= k, with the teacher), ``attention`` (ABF, off: r_k = u + v), ``hcl`` (off: mean squared error;
a mapping sets the options of `pathways.distances.HCL`). Without `residual` the maps get no 3x3 convolution.

Departure: none with the defaults. ReviewKD's own training left the teacher in train mode; here that is the trainer's
choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distpro.losses._maps import BatchNorm2d, full, paired_shapes, pairs
from distpro.losses._options import COUNT, check_options
from distpro.losses.base import LOSSES, DistillationLoss, Shape, Tensors
from distpro.losses.hcl import HierarchicalContext
from pathways.distances import HCL
from pathways.registry import UserError, check_parameters


class ABF(nn.Module):
    """Attention-based fusion of a student map (N, C_in, H, W) with the residual of the next deeper level.

    Gives the output for the teacher's level (N, C_out, H_t, W_t) and the residual (N, C_mid, H_t, W_t). ``fuse`` is
    ``attention``, ``sum`` or, at the deepest level, ``none``.
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, fuse: str = "attention"):
        super().__init__()
        self.conv1 = _conv_norm(in_channels, mid_channels, 1)
        self.conv2 = _conv_norm(mid_channels, out_channels, 3)
        self.fuse = fuse
        if fuse == "attention":
            self.att_conv = nn.Sequential(nn.Conv2d(2 * mid_channels, 2, 1), nn.Sigmoid())

    def forward(self, x: Tensor, residual: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        x = self.conv1(x)
        if residual is not None:
            residual = _nearest(residual, x.shape[2:])
            x = self._attend(x, residual) if self.fuse == "attention" else x + residual
        x = _nearest(x, size)
        return self.conv2(x), x

    def _attend(self, x: Tensor, residual: Tensor) -> Tensor:
        z = self.att_conv(torch.cat([x, residual], 1))
        return x * z[:, :1] + residual * z[:, 1:]


class Branches(nn.Module):
    """Sum of BN(conv1x1) of student maps at the teacher's size: fusion without the residual framework.

    ``in_channels`` are those of the first maps of the list that it is called with; the rest is not read.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int):
        super().__init__()
        self.convs = nn.ModuleList(_conv_norm(c, out_channels, 1) for c in in_channels)

    def forward(self, features: Sequence[Tensor], size: Sequence[int]) -> Tensor:
        outputs = [_nearest(conv(f), size) for conv, f in zip(self.convs, features, strict=False)]
        return torch.stack(outputs).sum(0) if len(outputs) > 1 else outputs[0]


@LOSSES.register("review")
class KnowledgeReview(DistillationLoss):
    """The student's deep features review the teacher's shallow ones through a residual fusion, compared by HCL."""

    title = "Distilling Knowledge via Knowledge Review"
    paper = "Chen et al., Distilling Knowledge via Knowledge Review, CVPR 2021"
    year = 2021
    family = "feature"
    reads = "features of all stages, shallow to deep, and the embedding"
    taps = ("stages", "embedding")
    before_relu = "teacher"
    formula = "sum_k HCL(out_k, t_k), out_k = BN(conv3x3(ABF(f_k, r_(k+1))))"
    ranges = {"mid_channels": COUNT}

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        mid_channels: int | None = None,
        review: bool = True,
        residual: bool = True,
        attention: bool = True,
        hcl: bool | Mapping[str, Any] = True,
    ):
        super().__init__(student_shapes, teacher_shapes)
        shapes = paired_shapes(self.what, self.student_shapes, self.teacher_shapes, dims=(1, 3))
        inputs, outputs = [s[0] for s, _ in shapes], [t[0] for _, t in shapes]
        self.residual = review and residual
        if self.residual:
            mid = mid_channels or min(512, inputs[-1])
            deepest = [ABF(inputs[-1], mid, outputs[-1], "none")]
            fuse = "attention" if attention else "sum"
            rest = [ABF(i, mid, o, fuse) for i, o in list(zip(inputs, outputs, strict=True))[-2::-1]]
            self.abfs = nn.ModuleList(deepest + rest)  # deepest first
        else:
            spans = [inputs[k:] if review else inputs[k : k + 1] for k in range(len(inputs))]
            self.branches = nn.ModuleList(Branches(s, o) for s, o in zip(spans, outputs, strict=True))
        self.distance = _distance(hcl)

    def levels(
        self, student: Tensors, teacher: Tensors, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Losses per teacher level (L,), shallow to deep."""
        levels = pairs(self.what, student, teacher)
        students, teachers = [_as_map(s) for s, _ in levels], [_as_map(t) for _, t in levels]
        outputs = self.outputs(students, [t.shape[2:] for t in teachers])
        return torch.stack([self.distance(full(o), t) for o, t in zip(outputs, teachers, strict=True)])

    def outputs(self, features: Sequence[Tensor], sizes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Student maps (N, C, H, W), shallow to deep, at the teacher's channels and ``sizes``, in the same order."""
        if not self.residual:
            return [b(features[k:], size) for k, (b, size) in enumerate(zip(self.branches, sizes, strict=True))]
        outputs, residual = [], None
        for abf, x, size in zip(self.abfs, features[::-1], sizes[::-1], strict=True):
            output, residual = abf(x, residual, size)
            outputs.append(output)
        return outputs[::-1]


def _distance(hcl: bool | Mapping[str, Any]) -> nn.Module:
    if isinstance(hcl, Mapping):
        what = "option 'hcl' of loss 'review'"
        check_parameters(what, HCL, hcl)
        check_options(what, HCL, hcl, HierarchicalContext.ranges)
        return HCL(**hcl)
    if not isinstance(hcl, bool):
        raise UserError(f"option 'hcl' of loss 'review' must be true, false or a mapping, got {hcl!r}")
    return HCL() if hcl else nn.MSELoss()


def _as_map(x: Tensor) -> Tensor:
    return x[:, :, None, None] if x.dim() == 2 else x


def _nearest(x: Tensor, size: Sequence[int]) -> Tensor:
    return x if tuple(x.shape[2:]) == tuple(size) else F.interpolate(x, size=tuple(size), mode="nearest")


def _conv_norm(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, BatchNorm2d(out_channels))
