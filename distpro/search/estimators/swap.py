"""A module's parameters replaced by other tensors for a pass, and given back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pathways.trust import own_containers


@contextmanager
def swapped(model: nn.Module, values: Mapping[Any, Tensor]) -> Iterator[None]:
    """Inside, every parameter and buffer of ``model`` that is a key of ``values`` is its value, wherever it is reached
    from; afterwards the module has its own again.

    As `torch.func.functional_call`, but for modules that are reachable by two names, which that leaves with plain
    tensors in place of their parameters, and for lists and dicts of weights beside, as recurrent layers have one.
    """
    kept: list[tuple[Any, Any, Tensor]] = []
    for module in model.modules():
        for own in (module._parameters, module._buffers, *own_containers(module)):
            if isinstance(own, (dict, list)):
                entries = own.items() if isinstance(own, dict) else enumerate(own)
                kept += [(own, place, t) for place, t in entries if isinstance(t, Tensor) and t in values]
    try:
        for own, place, tensor in kept:
            own[place] = values[tensor]
        yield
    finally:
        for own, place, tensor in kept:
            own[place] = tensor
