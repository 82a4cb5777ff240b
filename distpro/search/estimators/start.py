"""What a training pass begins with besides parameters, to do it once more."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn

from distpro.objective import Objective
from pathways.own_state import own_state
from pathways.probing import with_content
from pathways.trust import hooks_on, known_class


class Start:
    """What student and terms hold as a pass begins: buffers, and what modules keep in attributes (a counter, a generator;
    see `pathways.own_state`). Parameters that a pass writes to by itself are not in it.

    A pass that is done again later, for a hypergradient, is another one without: spectral norm goes on with its vectors, and
    a generator with its numbers.
    """

    def __init__(self, objective: Objective):
        self._objective = objective
        self._buffers = [b.detach().clone() for b in _buffers(objective)]
        holding = [m for m in (objective.student, objective.terms) if not _has_buffers_alone(m)]
        self._put_own_back = own_state(*holding, parameters=False)

    @torch.no_grad()
    def put_back(self) -> None:
        for buffer, before in zip(_buffers(self._objective), self._buffers, strict=True):
            with_content(buffer, before)  # an observer's have no size before its first pass
        self._put_own_back()


def _has_buffers_alone(model: nn.Module) -> bool:
    """Whether a model is made of classes that are known to keep nothing else; looking at what they hold takes time in every step."""
    modules = list(model.modules())
    return all(_known(kind) for kind in {type(m) for m in modules}) and not any(map(hooks_on, modules))  # type: ignore[arg-type]


@cache
def _known(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("distpro", "pathways") or known_class(kind)


def _buffers(objective: Objective) -> Iterator[Tensor]:
    yield from objective.student.buffers()
    yield from objective.terms.buffers()
