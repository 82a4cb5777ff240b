"""A module's parameters replaced by other tensors for a pass, and given back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pathways.trust import OF_ANY_MODULE, own_containers


@contextmanager
def swapped(model: nn.Module, values: Mapping[Any, Tensor]) -> Iterator[None]:
    """Inside, every parameter and buffer of ``model`` that is a key of ``values`` is its value, wherever it is reached
    from; afterwards the module has its own again.

    As `torch.func.functional_call`, but for modules that are reachable by two names, which that leaves with plain
    tensors in place of their parameters, and for lists, dicts and tuples of weights beside, as recurrent layers have one.
    """
    kept: list[tuple[Any, Any, Any, Any]] = []
    for module in model.modules():
        attributes = vars(module)
        for own in (module._parameters, module._buffers, attributes, *own_containers(module)):
            if isinstance(own, (dict, list)):
                entries = own.items() if isinstance(own, dict) else enumerate(own)
                outside = OF_ANY_MODULE if own is attributes else ()
                found = [(place, now, _replaced(now, values)) for place, now in entries if place not in outside]
                kept += [(own, place, now, new) for place, now, new in found if new is not now]
    try:
        for own, place, _, new in kept:
            own[place] = new
        yield
    finally:
        for own, place, now, _ in kept:
            own[place] = now


def _replaced(value: Any, values: Mapping[Any, Tensor]) -> Any:
    """A tensor's replacement, and a tuple with those of its tensors; itself where there is none."""
    if isinstance(value, Tensor):
        return values.get(value, value)
    if type(value) is tuple or (isinstance(value, tuple) and hasattr(value, "_fields")):
        new = [_replaced(item, values) for item in value]
        if any(a is not b for a, b in zip(new, value, strict=True)):
            return tuple(new) if type(value) is tuple else type(value)(*new)
    return value


@contextmanager
def moved(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Inside, the parameters have values that are clearly others, written in place; afterwards their own again."""
    kept = [(p.data, p.detach().clone()) for p in parameters]
    try:
        with torch.no_grad():
            for data, _ in kept:
                data.mul_(-0.5).add_(0.1)
        yield
    finally:
        for data, own in kept:
            data.copy_(own)
