"""What torch.compile makes of the passes of a model and of pathways."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

GRAPHS = "reduce-overhead"
"""inductor with CUDA graphs, a mode of torch.compile in place of a backend."""


def compiled(function: Callable[..., Any], how: str | None) -> Callable[..., Any]:
    """The function by a backend of torch.compile, or in its mode ``reduce-overhead``; None: as it is. It is given its
    modules: a copy of an objective has others."""
    if how is None:
        return function
    options: dict[str, str] = {"mode": how} if how == GRAPHS else {"backend": how}
    return torch.compile(function, dynamic=False, **options)  # type: ignore[call-overload]


def begin_step(how: str | None) -> None:
    """Let CUDA graphs write where the tensors of the step before were."""
    if how == GRAPHS:
        torch.compiler.cudagraph_mark_step_begin()


def run(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return model(*args, **kwargs)


def run_each(
    pathways: Sequence[nn.Module],
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    masks: Sequence[Tensor | None],
) -> list[Tensor]:
    compared = zip(pathways, student, teacher, masks, strict=True)
    return [pathway(ours, theirs, mask=mask) for pathway, ours, theirs, mask in compared]
