"""What a training pass begins with besides parameters, to do it once more."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distpro.objective import Objective
from pathways.own_state import own_state


class Start:
    """What student and terms hold as a pass begins: buffers, and what modules keep in attributes (a counter, a generator;
    see `pathways.own_state`). Parameters that a pass writes to by itself are not in it.

    A pass that is done again later, for a hypergradient, is another one without: spectral norm goes on with its vectors, and
    a generator with its numbers.
    """

    def __init__(self, objective: Objective):
        self._objective = objective
        self._buffers = [b.detach().clone() for b in _buffers(objective)]
        self._put_own_back = own_state(objective.student, objective.terms, parameters=False)

    @torch.no_grad()
    def put_back(self) -> None:
        for buffer, before in zip(_buffers(self._objective), self._buffers, strict=True):
            buffer.copy_(before)
        self._put_own_back()


def _buffers(objective: Objective) -> Iterator[Tensor]:
    yield from objective.student.buffers()
    yield from objective.terms.buffers()
