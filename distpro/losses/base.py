"""What every distillation loss is: a module that compares student with teacher tensors and gives a scalar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from pathways.registry import Registry, UserError

LOSSES = Registry("loss")

Shape = Sequence[int]
"""Shape of one sample's tensor, without the batch dimension: (C, H, W), (D,) or (L, D)."""


class DistillationLoss(nn.Module):
    """Base of the losses. A subclass states its facts as class attributes, takes the shapes that it reads and its
    own options in ``__init__``, and implements ``forward`` (or ``levels`` if it is a sum over levels).

    ``student_shapes`` and ``teacher_shapes`` list one shape per tensor read, without the batch dimension. Trainable
    parts (regressors, embeddings) are submodules, so they are found by ``parameters()``.
    """

    title: ClassVar[str] = ""  # name of the method as its paper writes it
    paper: ClassVar[str] = ""  # authors, title, venue
    year: ClassVar[int] = 0
    family: ClassVar[str] = ""  # response | feature | relation | dense
    reads: ClassVar[str] = "features"  # logits | features | embedding | what else it needs, in words
    formula: ClassVar[str] = ""  # one line, plain text
    stages: ClassVar[int] = 1  # training stages of the published recipe
    needs_target: ClassVar[bool] = False
    needs_index: ClassVar[bool] = False

    def __init__(self, student_shapes: Sequence[Shape] = (), teacher_shapes: Sequence[Shape] = ()):
        super().__init__()
        self.student_shapes = [tuple(s) for s in student_shapes]
        self.teacher_shapes = [tuple(s) for s in teacher_shapes]

    def forward(
        self,
        student: Tensor | Sequence[Tensor],
        teacher: Tensor | Sequence[Tensor],
        target: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """Scalar loss. ``target``: labels (N,) int64; ``index``: the samples' numbers in the data set (N,) int64."""
        return self.levels(student, teacher, target, index).sum()

    def levels(
        self,
        student: Tensor | Sequence[Tensor],
        teacher: Tensor | Sequence[Tensor],
        target: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        """Losses per teacher level, shape (L,), of a loss that is their sum, so that a schedule can weight them."""
        raise NotImplementedError(f"{type(self).__name__} is not a sum over levels")


def as_list(tensors: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """One tensor or a list of tensors as a list."""
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def single(tensors: Tensor | Sequence[Tensor], what: str) -> Tensor:
    """The one tensor of a loss that reads one. Raises UserError if there are several."""
    tensors = as_list(tensors)
    if len(tensors) != 1:
        raise UserError(f"{what} reads one tensor per model, got {len(tensors)}")
    return tensors[0]


def build_loss(
    name: str, student_shapes: Sequence[Shape] = (), teacher_shapes: Sequence[Shape] = (), **params: Any
) -> DistillationLoss:
    """A loss of ``available_losses()`` for tensors of the given per-sample shapes.

    >>> import torch
    >>> kd = build_loss("kd", student_shapes=[(10,)], teacher_shapes=[(10,)], temperature=4.0)
    >>> kd(torch.zeros(2, 10), torch.zeros(2, 10)).item()
    0.0

    Raises UserError for an unknown name or parameter, or for shapes that the loss cannot compare.
    """
    return LOSSES.build(name, student_shapes=student_shapes, teacher_shapes=teacher_shapes, **params)


def available_losses() -> list[str]:
    """Names that ``build_loss`` takes, sorted."""
    return list(LOSSES)
