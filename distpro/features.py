"""What the passes of teacher and student give, and how a term reads it: a sample's rows, counted positions, masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from distpro.batch import Batch
from distpro.task import Task
from pathways.call import map_tensors, tensors_in
from pathways.layouts import channels_first
from pathways.registry import UserError
from pathways.taps import LOGITS

Features = Mapping[str, Tensor]
"""Tapped tensors by tap; ``logits`` is the task's response."""

POSITIONS = "logits:positions"
"""The response's counted positions as rows (M, K), where they are not the response itself."""


@dataclass
class TrainingPass:
    """One pass of teacher, student and terms over a batch.

    Attributes:
        loss: what to differentiate, a scalar.
        task: task loss, detached scalar; 0 where it was not computed.
        terms: the vector ℓ of unweighted term losses, (N,) float32, detached; 0 where a term was not computed.
        weights: λ·w of each entry, as the loss has them.
        output: the student's whole output; None where nothing reads it.
        teacher: the teacher's tapped tensors.
        views: per term, the tensors it read, each its own view, whose ``.grad`` is kept by the backward pass.
    """

    loss: Tensor
    task: Tensor
    terms: Tensor
    weights: Sequence[float] | Tensor
    output: Any
    teacher: Features = field(default_factory=dict)
    views: list[dict[str, Tensor]] = field(default_factory=list)


class Cache(Protocol):
    """The teacher's tensors of earlier passes."""

    @property
    def taps(self) -> Mapping[str, Any]:
        """What is kept, by tap."""

    def read(self, index: Tensor, epoch: int) -> dict[str, Tensor] | None:
        """The tensors by tap of the samples ``index``, or None unless all are there."""

    def write(self, index: Tensor, epoch: int, features: Mapping[str, Tensor]) -> None:
        """Keep the tensors of the samples ``index``."""

    def describe(self) -> str:
        """One line: where, how large, how full."""


class Reader:
    """How the terms read the tensors of one batch.

    The task says which positions of its response count (`Task.labels`): void pixels and padding do not. They are taken
    out once, so that a response loss sees rows (M, K) of counted positions with their labels (M,).
    """

    def __init__(self, task: Task, batch: Batch):
        self.batch = batch
        self.labels, self.mask = task.labels(batch)
        tokens = getattr(task, "tokens", None)
        self.tokens: Tensor | None = None if tokens is None else tokens(batch)
        self._chosen: dict[tuple[int, ...], Tensor | None] = {}

    def names_of(self, term: Any, taps: Sequence[str], features: Features) -> list[str]:
        """The features that a term reads, in the order of its taps: of the response its counted positions, if it reads
        those. Raises UserError where the task gives no response."""
        by_position = term.by_position and POSITIONS in features
        names = [POSITIONS if tap == LOGITS and by_position else tap for tap in taps]
        if LOGITS in names and LOGITS not in features:
            raise UserError(f"term '{term.key}' reads logits, but the task gives none of the model's output")
        return names

    def read(self, term: Any, side: str, features: Features) -> list[Tensor]:
        """What a term reads of the ``student`` or ``teacher``, in the order of its taps: maps as `maps_of` gives them,
        and each sample's first row unless it reads all."""
        names = self.names_of(term, getattr(term, f"{side}_taps"), features)
        maps = maps_of(term, side, names, features)
        if not term.masked:
            maps = [self.without_padding(x) for x in maps]
        return maps if term.rows == "all" else [self.first_rows(x) for x in maps]

    def without_padding(self, x: Tensor) -> Tensor:
        """Tokens (N, L, D) with zeros in the padding; any other tensor as it is."""
        padded = None if self.tokens is None or x.dim() != 3 else self.mask_of(x)
        return x if padded is None else x.masked_fill(~padded[..., None], 0)

    # A sample's rows

    def first_rows(self, x: Tensor) -> Tensor:
        """Each sample's first row of a tensor that has several per sample; any other tensor as it is."""
        every = self.batch.rows_per_sample
        return x[::every] if every > 1 and x.dim() and len(x) == self.batch.samples * every else x

    def plain(self, output: Any) -> Any:
        """A model's whole output with each sample's first row, half precision as float32: what the task's loss reads."""
        narrow = any(t.dtype in (torch.bfloat16, torch.float16) for t in tensors_in(output))
        if not narrow and self.batch.rows_per_sample == 1:
            return output
        return map_tensors(lambda t: self.first_rows(_wide(t)), output)

    # Counted positions

    def with_positions(self, features: Features) -> Features:
        """The features and, where the response is more than one row of classes per sample, its counted positions."""
        response = features.get(LOGITS)
        if response is None or (response.dim() <= 2 and self.mask is None):
            return features
        return {**features, POSITIONS: self._rows(self.first_rows(response))}

    def target(self, by_position: bool, features: Features) -> Tensor | None:
        """The labels as a term takes them: of the counted positions (M,) if it reads those, else whole."""
        if not by_position or POSITIONS not in features or self.labels is None:
            return self.labels
        size = _positions_of(self.first_rows(features[LOGITS]), self.labels)
        labels = at_size(self.labels, size).flatten()
        chosen = self._choose(size)
        return labels if chosen is None else labels[chosen]

    def mask_of(self, feature: Tensor) -> Tensor | None:
        """The mask at the size of a feature map (N, C, H, W) → (N, H, W) or of tokens (N, L, D) → (N, L); None where
        every position counts, or where the feature has no such positions."""
        mask = self.mask if self.tokens is None else self.tokens
        if mask is None or len(feature) != len(mask):
            return None
        if mask.dim() == 3 and feature.dim() == 4:
            return at_size(mask, tuple(feature.shape[2:]))
        if mask.dim() == 2 and feature.dim() == 3 and feature.shape[1] == mask.shape[1]:
            return mask
        return None

    def _rows(self, response: Tensor) -> Tensor:
        size = _positions_of(response, self.labels if self.labels is not None else self.mask)
        by_class = response if response.dim() <= 2 or _classes_last(response, size) else response.movedim(1, -1)
        rows = by_class.reshape(-1, by_class.shape[-1])
        chosen = self._choose(size)
        return rows if chosen is None else rows[chosen]

    def _choose(self, size: tuple[int, ...]) -> Tensor | None:
        """Places of the counted positions among all of a response with ``size`` positions per sample; None: all.
        Where none counts they are none, and so a loss's mean is taken over no row; see `Objective.term_losses`."""
        if size not in self._chosen:
            mask = self.mask
            self._chosen[size] = None if mask is None else at_size(mask, size).flatten().nonzero().flatten()
        return self._chosen[size]


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _classes_last(response: Tensor, size: Sequence[int]) -> bool:
    return response.dim() == 3 and response.shape[1] == size[0]


def _positions_of(response: Tensor, labels: Tensor | None) -> tuple[int, ...]:
    """Size of the positions per sample of a response: () of (N, K), (H, W) of (N, K, H, W), (L,) of (N, L, K)."""
    if response.dim() != 3:
        return tuple(response.shape[2:])
    if labels is not None and labels.dim() == 2 and labels.shape[1] not in response.shape[1:]:
        raise UserError(
            f"logits {tuple(response.shape)} have no axis of {labels.shape[1]} positions, as the labels have"
        )
    last = labels is None or labels.dim() != 2 or labels.shape[1] == response.shape[1]
    return (response.shape[1],) if last else (response.shape[2],)


def at_size(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Label maps or masks (N, H, W) at another size, by nearest neighbour as `F.interpolate` takes it; (N,) and (N, L)
    stay as they are."""
    if labels.dim() != 3 or tuple(labels.shape[1:]) == tuple(size):
        return labels
    rows, columns = (
        torch.arange(new, device=labels.device) * old // new for new, old in zip(size, labels.shape[1:], strict=True)
    )
    return labels[:, rows[:, None], columns]


def maps_of(term: Any, side: str, names: Sequence[str], features: Features) -> list[Tensor]:
    """The named features (one may come twice) as a loss takes them, maps (N, C, H, W), where the term says that a tap
    gives (N, H, W, C)."""
    last = getattr(term, f"{side}_last", ())
    return [channels_first(features[name], name in last) for name in names]


def own_views(read: Features) -> dict[str, Tensor]:
    """A view of each tensor that keeps its gradient in the backward pass, if it gets one."""
    views = {tap: f.view_as(f) for tap, f in read.items()}
    for view in views.values():
        if view.requires_grad:
            view.retain_grad()
    return views


def unwrap(tensors: list[Any]) -> Any:
    """The one tensor of a list of one, as losses that read one tensor take it; any other list as it is."""
    return tensors[0] if len(tensors) == 1 else tensors


def scalar(loss: Any) -> Tensor:
    """A task's loss as it is. Raises UserError for what is no scalar."""
    if not isinstance(loss, Tensor) or loss.dim():
        found = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise UserError(f"the task's loss must be a scalar tensor, got {found}")
    return loss


def check_apart(teacher: nn.Module, student: nn.Module) -> None:
    """Raise UserError where the two share a parameter that the student trains, for the teacher's are frozen; or a module
    that works differently in training and evaluation, for each would put it into its own mode."""
    trained = {_place(p) for p in student.parameters() if p.requires_grad}
    if any(_place(p) in trained for p in teacher.parameters()):
        raise UserError("objective: teacher and student share parameters, which would freeze the student's; copy them")
    own = set(student.modules())
    shared = {type(m).__name__ for m in teacher.modules() if m in own and _has_modes(type(m))}
    kept = {b for m in student.modules() if isinstance(m, _NormBase) for b in m.buffers(recurse=False)}
    shared |= {type(m).__name__ for m in teacher.modules() if kept & set(m.buffers(recurse=False))}
    if shared:
        raise UserError(
            f"objective: teacher and student share what works differently in training ({', '.join(sorted(shared))}); copy it"
        )


def _place(p: nn.Parameter) -> Any:
    """Where a parameter's numbers are: two parameters may be one in memory. Itself, where there is no such place yet."""
    on_device = not is_lazy(p) and p.layout is torch.strided and not p.is_meta
    return (p.device, p.data_ptr()) if on_device and p.numel() else p


def _has_modes(kind: type) -> bool:
    """Whether modules of a class look at whether they are in training."""
    own = kind.__mro__[: kind.__mro__.index(nn.Module)]
    functions = [f for base in own for f in vars(base).values() if isinstance(f, FunctionType)]
    return any("training" in f.__code__.co_names for f in functions)
