"""Random state and buffers: kept, given back, and left alone by passes that only look."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from distpro.train import distributed
from pathways.own_state import own_state, own_state_kept
from pathways.probing import buffers_kept

if TYPE_CHECKING:
    from distpro.objective import Objective


@contextmanager
def no_trace(*modules: nn.Module) -> Iterator[None]:
    """Passes inside leave no trace in buffers (BatchNorm statistics), in what modules hold besides (a counter of passes; see
    `own_state_kept`), or in the random state."""
    state = random_state(modules[0])
    with own_state_kept(*modules), buffers_kept(*modules):
        try:
            yield
        finally:
            set_random_state(state)


def seed_random(seed: int) -> None:
    """Seed what a model may draw from: PyTorch's generators, Python's and NumPy's."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_state(module: nn.Module) -> dict[str, Tensor]:
    """State of the random generators that a pass of ``module`` may use."""
    device = next(module.parameters()).device
    state = {"cpu": torch.get_rng_state(), "python": _of_python(), "numpy": _of_numpy()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _of_python() -> Tensor:
    version, numbers, next_gauss = random.getstate()
    return torch.tensor([version, math.nan if next_gauss is None else next_gauss, *numbers], dtype=torch.float64)


def _of_numpy() -> Tensor:
    kept = np.random.get_state(legacy=False)
    assert isinstance(kept, dict)
    inner = kept["state"]
    return torch.tensor([inner["pos"], kept["has_gauss"], kept["gauss"], *inner["key"].tolist()], dtype=torch.float64)


def set_random_state(state: dict[str, Tensor]) -> None:
    """Back to a state from `random_state`."""
    torch.set_rng_state(state["cpu"])
    if "python" in state:  # not in checkpoints of before
        version, next_gauss = int(state["python"][0]), float(state["python"][1])
        numbers = tuple(map(int, state["python"][2:].tolist()))
        random.setstate((version, numbers, None if math.isnan(next_gauss) else next_gauss))
    if "numpy" in state:
        position, has_gauss, gauss, *keys = state["numpy"].tolist()
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), int(position), int(has_gauss), gauss))
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def draw_apart() -> None:
    """Let this process draw other numbers than the others that train with it, or dropout would be the same in all."""
    if distributed.rank():
        torch.manual_seed(torch.initial_seed() + distributed.rank())


def random_of_ranks(module: nn.Module) -> dict[str, list[dict[str, Tensor]]]:
    """What a checkpoint says, beside the state of the process that writes it, of the others; {} where there are none."""
    states = distributed.gather(random_state(module))
    return {"random_of_ranks": states} if len(states) > 1 else {}


def set_random_of_ranks(checkpoint: Mapping[str, Any]) -> None:
    """Back to this process's state in a checkpoint; of another number of processes, to the first one's, from which they part."""
    states = checkpoint.get("random_of_ranks", [])
    if len(states) == distributed.world_size():
        set_random_state(states[distributed.rank()])
    else:
        set_random_state(checkpoint["random"])
        draw_apart()


def snapshot(objective: Objective, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """A function that takes parameters, buffers, optimiser and random state back to now, and what modules hold besides (see
    `own_state_kept`), for the step that is taken again runs the same passes again."""
    modules = [m for m in (objective.student, objective.terms, objective.teacher) if m is not None]
    tensors = [*objective.trainable_parameters(), *(b for m in modules for b in m.buffers())]
    copies, put_back = [t.detach().clone() for t in tensors], own_state(*modules)
    settings, state = copy.deepcopy(optimizer.state_dict()), random_state(objective.student)

    def go_back() -> None:
        with torch.no_grad():
            for tensor, saved in zip(tensors, copies, strict=True):
                tensor.copy_(saved)
        put_back()
        optimizer.load_state_dict(settings)
        set_random_state(state)

    return go_back
