"""What the response- and relation-based losses share: tensors as matrices with one row per sample, checked once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distpro.losses._maps import divergence, full, one_pair, same_shapes
from distpro.losses.base import DistillationLoss, Shape, Tensors, as_list, single
from pathways.registry import UserError

MASKED = -1e4
"""Logits that are no opinion but a mask: the highest of the usual ones, -1e4, -65504, -1e9 and the lowest number of a type."""


class RowLoss(DistillationLoss):
    """A loss that compares two matrices with one row per sample. A subclass implements ``compare``.

    The teacher arrives there detached, and half precision as float32.
    """

    smallest_batch: int = 1  # fewer rows than this have no relation to compare
    largest_batch: int | None = None  # of a loss that compares every row with every other

    def matrix(self, x: Tensor) -> Tensor:
        """``x`` as a matrix."""
        raise NotImplementedError

    def labels(self, target: Tensor | None, logits: Tensor) -> Tensor:
        """``target`` (M,), the labels of logits (M, K); UserError if it is missing or does not label them."""
        return checked_labels(self.what, target, logits)

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        """Scalar loss of two matrices. Without ``uses_teacher``, ``teacher`` is the student's own, detached."""
        raise NotImplementedError

    def forward(
        self, student: Tensors, teacher: Tensors, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        s = self.matrix(full(single(student, self.what)))
        t = self.matrix(full(single(teacher, self.what))).detach() if self.uses_teacher else s.detach()
        if len(s) != len(t):
            raise UserError(f"{self.what} compares row by row, got {len(s)} student and {len(t)} teacher rows")
        if not len(s):
            return s.sum()  # of dense logits, no position counts
        if self.largest_batch is not None and len(s) > self.largest_batch:
            raise UserError(
                f"{self.what} compares every row with every other: at most {self.largest_batch} rows (samples, or "
                f"positions of dense logits), got {len(s)}"
            )
        if len(s) < self.smallest_batch:
            raise UserError(f"{self.what} needs a batch of at least {self.smallest_batch} samples, got {len(s)}")
        return self.compare(s, t, target)


class ResponseLoss(RowLoss):
    """A loss of logits (N, K) or dense logits (N, K, ...) whose positions are then samples of their own.

    ``target`` holds one label per row: (N,) or (N, ...). The objective hands over the counted positions as rows (M, K)
    with labels (M,). Called directly, void positions and padding have to be left out in the same way, and the classes
    of dense logits are the second dimension: token logits (N, L, K) are to be given as rows, or as (N, K, L).
    """

    family = "response"
    reads = "logits"
    taps = ("logits",)
    by_position = True
    compares_classes = True

    def __init__(self, student_shapes: Sequence[Shape] = (), teacher_shapes: Sequence[Shape] = ()):
        super().__init__(student_shapes, teacher_shapes)
        same_shapes(self.what, self.student_shapes, self.teacher_shapes)
        if any(len(shape) != 2 and shape[0] == 1 for shape in self.student_shapes if shape):
            raise UserError(
                f"{self.what} compares probabilities of classes, and the response has one number a sample or position: of "
                "a regression, such as depth, take loss l1"
            )

    def matrix(self, x: Tensor) -> Tensor:
        return logit_rows(x)

    def forward(
        self, student: Tensors, teacher: Tensors, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        if self.uses_teacher:
            same_shapes(self.what, *([x.shape[1:] for x in as_list(xs)] for xs in (student, teacher)))
        return super().forward(student, teacher, None if target is None else target.flatten(), index)


class RelationLoss(RowLoss):
    """A loss of embeddings (N, D), or maps (N, C, H, W) read as vectors; widths of student and teacher may differ."""

    family = "relation"
    reads = "embedding"
    taps = ("embedding",)

    def matrix(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def checked_labels(what: str, target: Tensor | None, logits: Tensor) -> Tensor:
    """``target`` (M,) as labels of logits (M, K).

    Raises UserError if it is missing, holds probabilities, is not one label per row or, on the CPU (elsewhere the look
    would wait for the device), holds a label that is no class, such as 255 for void.
    """
    if target is None:
        raise UserError(f"{what} needs the labels: pass target")
    if target.is_floating_point():
        raise UserError(f"{what} needs one label per sample: mixup and cutmix give probabilities")
    if target.shape != logits.shape[:1]:
        raise UserError(f"{what} needs one label per row of logits, got {target.numel()} for {len(logits)} rows")
    if type(target) is Tensor and target.device.type == "cpu" and not torch.compiler.is_compiling():
        classes = logits.shape[1]
        outside = target[(target < 0) | (target >= classes)]
        if len(outside):
            found = ", ".join(str(label) for label in outside.unique().tolist()[:5])
            raise UserError(
                f"{what} needs labels from 0 to {classes - 1}, got {found}: leave void positions and padding out, that "
                "is give the counted positions as rows (M, K) with labels (M,)"
            )
    return target


def logit_rows(logits: Tensor) -> Tensor:
    """Logits (N, K, ...) as (M, K), M the number of samples and positions; a third dimension is never the classes."""
    return logits if logits.dim() == 2 else logits.movedim(1, -1).flatten(0, -2)


def kl_rows(student: Tensor, teacher: Tensor, temperature: float | Tensor) -> Tensor:
    """T^2 KL(softmax(t/T) || softmax(s/T)) of each row of logits (M, K), shape (M,).

    A class whose logits are -inf in both is left out; where only the student's is, the divergence is +inf.
    """
    log_s = F.log_softmax(softened(student, temperature), dim=1)
    if isinstance(temperature, Tensor):  # whose gradient goes through the teacher's probabilities too
        return divergence(log_s, F.log_softmax(softened(teacher, temperature), dim=1)).sum(1) * temperature**2
    target = F.softmax(softened(teacher, temperature), dim=1)
    log_s = log_s.masked_fill((target == 0) & (student == -math.inf), 0)
    return F.kl_div(log_s, target, reduction="none").sum(1) * temperature**2


def softened(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """logits / T, where a logit of -inf has no derivative by T, which may be a parameter."""
    if not isinstance(temperature, Tensor):
        return logits / temperature
    out = logits == -math.inf
    return (logits.masked_fill(out, 0) / temperature).masked_fill(out, -math.inf)


def absent(logits: Tensor) -> Tensor:
    """Where a class is not there: its logit is -inf, or at most `MASKED`. For losses that count classes or take means of
    logits; a KL divergence sees that the class has no probability."""
    return logits <= MASKED


def softened_kl(student: Tensor, teacher: Tensor, temperature: float | Tensor) -> Tensor:
    """The mean of ``kl_rows``, a scalar."""
    return kl_rows(student, teacher, temperature).mean()


def two(what: str, tensors: Tensors, names: str) -> tuple[Tensor, Tensor]:
    """The two tensors of a loss that reads two per model, else UserError."""
    found = as_list(tensors)
    if len(found) != 2:
        raise UserError(f"{what} reads two tensors per model ({names}), got {len(found)}")
    return found[0], found[1]


def pooled_embedding(x: Tensor) -> Tensor:
    """Map (N, C, H, W) averaged over positions, or embedding (N, C) as it is."""
    return x.mean((2, 3)) if x.dim() == 4 else x


def linear_embeds(
    what: str, student: Sequence[Shape], teacher: Sequence[Shape], width: int
) -> tuple[nn.Linear, nn.Linear]:
    """One linear layer to ``width`` per model, for flattened tensors. UserError unless there is one shape of each."""
    s, t = one_pair(what, student, teacher, dims=(1, 2, 3))
    return nn.Linear(math.prod(s), width), nn.Linear(math.prod(t), width)
