"""Random state and buffers: kept, given back, and left alone by passes that only look."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pathways.probing import buffers_kept


@contextmanager
def no_trace(*modules: nn.Module) -> Iterator[None]:
    """Passes inside leave no trace in buffers (BatchNorm statistics) or in the random state."""
    state = random_state(modules[0])
    with buffers_kept(*modules):
        try:
            yield
        finally:
            set_random_state(state)


def random_state(module: nn.Module) -> dict[str, Tensor]:
    """State of the random generators that a pass of ``module`` may use."""
    device = next(module.parameters()).device
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Back to a state from `random_state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
