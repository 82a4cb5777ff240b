"""A module's parameters replaced by other tensors for a pass, and given back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def swapped(model: nn.Module, values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Inside, every parameter and buffer of ``model`` that is a key of ``values`` is its value, wherever it is reached
    from; afterwards the module has its own again.

    As `torch.func.functional_call`, but for modules that are reachable by two names, which that leaves with plain
    tensors in place of their parameters, and for recurrent layers, which keep a list of their weights beside.
    """
    kept: list[tuple[Any, str, Tensor]] = []
    recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    flat = [(module, module._flat_weights) for module in recurrent]
    try:
        for module in model.modules():
            for own in (module._parameters, module._buffers):
                for name, tensor in own.items():
                    if tensor is not None and tensor in values:
                        kept.append((own, name, tensor))
        for own, name, tensor in kept:
            own[name] = values[tensor]
        for module in recurrent:
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
        yield
    finally:
        for own, name, tensor in kept:
            own[name] = tensor
        for module, weights in flat:
            module._flat_weights = weights
