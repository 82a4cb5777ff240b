"""What every distillation loss is: a module that compares student with teacher tensors and gives a scalar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from distpro.losses._options import Range, check_options, check_range
from pathways.registry import Registry, UserError, nearest

LOSSES = Registry("loss", takes_code=True)

Shape = Sequence[int]
"""Shape of one sample's tensor, without the batch dimension: (C, H, W), (D,) or (L, D)."""

Tensors = Tensor | Sequence[Tensor]
"""What a loss reads of one model: a tensor, or a list of them."""

Mask = Tensor | Sequence[Tensor | None] | None
"""Which positions count (not padding, not void): bool (N, H, W) for a map (N, C, H, W), (N, L) for tokens (N, L, D), at
the size of the student's or the teacher's tensor; a list of them where there are several tensors. None: all count."""


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
    reads: ClassVar[str] = "features"  # what it reads, in words
    taps: ClassVar[tuple[str, ...]] = ("stages",)  # likewise for the builder: of stages, last, embedding, logits
    before_relu: ClassVar[str] = "neither"  # whose stages it reads before their last ReLU: neither | teacher | both
    formula: ClassVar[str] = ""  # one line, plain text
    stages: ClassVar[int] = 1  # training stages of the published recipe
    needs: ClassVar[tuple[str, ...]] = ()  # parameters that a config leaves to the builder, see `distpro.build.terms`
    rows: ClassVar[str] = "first"  # of a sample's rows it sees the first, or all
    expand: ClassVar[str] = ""  # how the loader makes more rows of a sample: "", or rotations (by 90, 180, 270 degrees)
    by_position: ClassVar[bool] = (
        False  # each position of dense logits is a sample: it is given the counted ones (M, K)
    )
    compares_classes: ClassVar[bool] = False  # reads a response as classes of which one is right
    masked: ClassVar[bool] = False  # forward, levels and pretrain take `mask`, the positions that count; see `Mask`
    deploys: ClassVar[bool] = False  # the deployed student answers through its `predict(student) -> logits (N, K)`
    pretrain_reads: ClassVar[str] = ""  # what `pretrain` reads: teacher | both
    signed: ClassVar[bool] = False  # may be below zero, as a negative log-likelihood may
    once_only: ClassVar[str] = ""  # why the derivative of its gradient is not what autograd makes of it; "" where it is
    scalars: ClassVar[tuple[str, ...]] = ()  # options, numbers or lists of them, that may change from call to call
    ranges: ClassVar[Mapping[str, Range]] = {}  # what numbers options may be; any finite one where nothing is said
    uses_teacher: bool = True  # False for losses that stand in for a teacher
    needs_target: bool = False
    needs_index: bool = False

    def __init__(self, student_shapes: Sequence[Shape] = (), teacher_shapes: Sequence[Shape] = ()):
        super().__init__()
        self.student_shapes = [tuple(s) for s in student_shapes]
        self.teacher_shapes = [tuple(s) for s in teacher_shapes]

    def __setattr__(self, name: str, value: Any) -> None:
        """As of any module; raises UserError for a scalar that moves out of its range."""
        if name in self.ranges:
            check_range(self.what, name, value, self.ranges[name])
        super().__setattr__(name, value)

    @property
    def what(self) -> str:
        """The loss in an error message; files are named after the registry entry."""
        return f"loss '{type(self).__module__.rpartition('.')[2]}'"

    def forward(
        self, student: Tensors, teacher: Tensors, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Scalar loss. ``target``: labels (N,) int64; ``index``: the samples' numbers in the data set (N,) int64."""
        return self.levels(student, teacher, target, index).sum()

    def levels(
        self, student: Tensors, teacher: Tensors, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Losses per teacher level, shape (L,), of a loss that is their sum, so that a schedule can weight them."""
        raise NotImplementedError(f"{type(self).__name__} is not a sum over levels")

    def pretrain(
        self, student: Tensors, teacher: Tensors, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Scalar loss of the recipe's first stage, for losses with ``pretrain_reads``: this loss itself, or its own."""
        if not self.pretrain_reads:
            raise NotImplementedError(f"{type(self).__name__} has no stage before its own")
        return self(student, teacher, target, index)


def option_of(part: str, name: str) -> property:
    """An option of a loss that its submodule ``part`` holds under the same name, to be read and set on the loss."""

    def read(loss: nn.Module) -> Any:
        return getattr(getattr(loss, part), name)

    def write(loss: nn.Module, value: Any) -> None:
        read(loss)  # an AttributeError rather than a new attribute that nobody reads
        setattr(getattr(loss, part), name, value)

    return property(read, write)


def as_list(tensors: Tensors) -> list[Tensor]:
    """One tensor or a list of tensors as a list."""
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def single(tensors: Tensors, what: str) -> Tensor:
    """The one tensor of a loss that reads one. Raises UserError if there are several."""
    tensors = as_list(tensors)
    if len(tensors) != 1:
        raise UserError(f"{what} reads one tensor per model, got {len(tensors)}")
    return tensors[0]


def one_of(what: str, value: str, allowed: Sequence[str]) -> str:
    """``value`` if it is allowed, else UserError."""
    if value not in allowed:
        raise UserError(f"{what} must be {' or '.join(allowed)}, got '{value}'{nearest(value, allowed)}")
    return value


def build_loss(
    name: str, student_shapes: Sequence[Shape] = (), teacher_shapes: Sequence[Shape] = (), **params: Any
) -> DistillationLoss:
    """A loss of ``available_losses()`` for tensors of the given per-sample shapes.

    >>> import torch
    >>> kd = build_loss("kd", student_shapes=[(10,)], teacher_shapes=[(10,)], temperature=4.0)
    >>> kd(torch.zeros(2, 10), torch.zeros(2, 10)).item()
    0.0

    Raises UserError for an unknown name or parameter, for a value that a parameter cannot have, or for shapes that the
    loss cannot compare.
    """
    kind = LOSSES[name]
    if isinstance(kind, type) and issubclass(kind, DistillationLoss):
        check_options(f"loss '{name}'", kind, params)
    return LOSSES.build(name, student_shapes=student_shapes, teacher_shapes=teacher_shapes, **params)


def available_losses() -> list[str]:
    """Names that ``build_loss`` takes, sorted."""
    return list(LOSSES)
