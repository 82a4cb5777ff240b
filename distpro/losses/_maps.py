"""What the feature losses share: which maps meet which, common sizes, precision, BatchNorm that explains itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distpro.losses.base import DistillationLoss, Shape, Tensors, as_list
from pathways.registry import UserError


class PairedLevels(DistillationLoss):
    """A loss that compares the i-th student tensor with the i-th teacher tensor and adds up over i.

    A subclass implements ``level``. The teacher arrives there detached, and half precision as float32. ``shapes`` holds
    the checked (student, teacher) shapes per level.
    """

    dims: ClassVar[Sequence[int]] = (3,)  # allowed numbers of dimensions without the batch
    equal_channels: ClassVar[bool] = False
    needs_shapes: ClassVar[bool] = True  # False: a loss without parameters can be built without shapes

    def __init__(self, student_shapes: Sequence[Shape] = (), teacher_shapes: Sequence[Shape] = ()):
        super().__init__(student_shapes, teacher_shapes)
        self.shapes: list[tuple[Shape, Shape]] = []
        if self.needs_shapes or self.student_shapes or self.teacher_shapes:
            given = self.student_shapes, self.teacher_shapes
            self.shapes = paired_shapes(self.what, *given, self.dims, self.equal_channels)

    def levels(
        self, student: Tensors, teacher: Tensors, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Losses per level (L,). Raises UserError if the numbers of student and teacher tensors differ."""
        levels = pairs(self.what, student, teacher)
        return torch.stack([self.level(i, s, t) for i, (s, t) in enumerate(levels)])

    def level(self, i: int, student: Tensor, teacher: Tensor) -> Tensor:
        """Scalar loss of level ``i``."""
        raise NotImplementedError


class CrossLevels(DistillationLoss):
    """A loss that compares any number of student maps with any number of teacher maps, all with all."""

    def __init__(self, student_shapes: Sequence[Shape] = (), teacher_shapes: Sequence[Shape] = ()):
        super().__init__(student_shapes, teacher_shapes)
        s, t = self.student_shapes, self.teacher_shapes
        if not s or not t or any(len(shape) != 3 for shape in (*s, *t)):
            raise UserError(f"{self.what} needs feature maps (C, H, W) of both models, got {s} and {t}")

    def maps(self, student: Tensors, teacher: Tensors) -> tuple[list[Tensor], list[Tensor]]:
        """Maps of student and teacher, the teacher's detached, half precision as float32.

        Raises UserError if their numbers are not those of the shapes.
        """
        students, teachers = [full(s) for s in as_list(student)], [full(t.detach()) for t in as_list(teacher)]
        built, found = (len(self.student_shapes), len(self.teacher_shapes)), (len(students), len(teachers))
        if found != built:
            raise UserError(
                f"{self.what} was built for {built[0]} student and {built[1]} teacher maps, "
                f"got {found[0]} and {found[1]}"
            )
        return students, teachers


def neighbours(what: str, student: Tensors, teacher: Tensors) -> list[tuple[Tensor, Tensor]]:
    """The ``pairs`` of a loss that compares neighbouring levels. Raises UserError for fewer than two."""
    maps = pairs(what, student, teacher)
    if len(maps) < 2:
        raise UserError(f"{what} compares neighbouring levels: needs two or more per model, got {len(maps)}")
    return maps


def pairs(what: str, student: Tensors, teacher: Tensors) -> list[tuple[Tensor, Tensor]]:
    """(student, teacher) tensors level by level, the teacher detached, half precision as float32.

    Raises UserError if the numbers of tensors differ.
    """
    students, teachers = as_list(student), as_list(teacher)
    if len(students) != len(teachers):
        found = f"{len(students)} student and {len(teachers)} teacher tensors"
        raise UserError(f"{what} compares level by level, got {found}")
    return [(full(s), full(t.detach())) for s, t in zip(students, teachers, strict=True)]


def paired_shapes(
    what: str,
    student: Sequence[Shape],
    teacher: Sequence[Shape],
    dims: Sequence[int] = (3,),
    equal_channels: bool = False,
) -> list[tuple[Shape, Shape]]:
    """(student, teacher) shapes level by level.

    Raises UserError if there are none, their numbers differ, or one has not one of ``dims`` dimensions (without the
    batch), or if ``equal_channels`` is asked for and two differ.
    """
    if not student or len(student) != len(teacher):
        raise UserError(f"{what} needs one student shape per teacher shape, got {len(student)} and {len(teacher)}")
    for shape in (*student, *teacher):
        if len(shape) not in dims:
            allowed = " or ".join({1: "(D,)", 2: "(L, D)", 3: "(C, H, W)"}[d] for d in dims)
            raise UserError(f"{what} needs shapes {allowed}, got {tuple(shape)}")
    shapes = list(zip(student, teacher, strict=True))
    for s, t in shapes if equal_channels else []:
        if s[0] != t[0]:
            raise UserError(f"{what} needs equal channel counts, got {s[0]} (student) and {t[0]} (teacher)")
    return shapes


def same_shapes(what: str, student: Sequence[Shape], teacher: Sequence[Shape]) -> None:
    """Raise UserError if two shapes (without the batch) that are compared differ."""
    for s, t in zip(student, teacher, strict=False):
        if tuple(s) != tuple(t):
            raise UserError(f"{what} needs tensors of one shape, got {tuple(s)} (student) and {tuple(t)} (teacher)")


def one_pair(
    what: str, student: Sequence[Shape], teacher: Sequence[Shape], dims: Sequence[int] = (3,)
) -> tuple[Shape, Shape]:
    """The (student, teacher) shapes of a loss that reads one tensor per model. Raises UserError otherwise."""
    first, *more = paired_shapes(what, student, teacher, dims)
    if more:
        raise UserError(f"{what} reads one tensor per model, got {len(more) + 1}")
    return first


def full(x: Tensor) -> Tensor:
    """Half precision as float32; sums of squares overflow or round in less."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product in the precision of its arguments: autocast would round Gram matrices to half precision."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def divergence(log_s: Tensor, log_t: Tensor) -> Tensor:
    """The terms p_t (log p_t - log p_s) of a KL divergence, entry by entry, of logarithms of probabilities.

    Where p_t is 0 the term and its derivatives are 0, whatever p_s is; where p_s alone is 0 it is +inf.
    """
    p = log_t.exp()
    zero = p == 0  # set before the product, as 0 * inf has no value and no derivative
    return p * (log_t.masked_fill(zero, 0) - log_s.masked_fill(zero, 0))


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps (N, C, H, W) at the smaller of their heights and widths, by average pooling."""
    size = [min(a, b) for a, b in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    return pooled(student, size), pooled(teacher, size)


def pooled(x: Tensor, size: Sequence[int]) -> Tensor:
    """Map (N, C, H, W) average-pooled to ``size`` (height, width)."""
    height, width = size
    return x if tuple(x.shape[2:]) == (height, width) else F.adaptive_avg_pool2d(x, (height, width))


def resized(x: Tensor, size: Sequence[int]) -> Tensor:
    """Map (N, C, H, W) brought to ``size``: average pooling where it shrinks, else bilinear interpolation."""
    if all(new <= old for new, old in zip(size, x.shape[2:], strict=True)):
        return pooled(x, size)
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def _check_statistics(norm: nn.Module, x: Tensor) -> None:
    if norm.training and x.numel() == x.shape[1]:
        raise UserError("one sample has no batch statistics on features of size 1x1: use larger batches, or drop_last")


class BatchNorm1d(nn.BatchNorm1d):
    """BatchNorm that raises UserError for a training batch of one value per channel."""

    def forward(self, x: Tensor) -> Tensor:
        _check_statistics(self, x)
        return super().forward(x)


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that raises UserError for a training batch of one value per channel."""

    def forward(self, x: Tensor) -> Tensor:
        _check_statistics(self, x)
        return super().forward(x)
