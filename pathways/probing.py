"""Learn a model's shapes and stages from one pass that leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pathways.registry import UserError
from pathways.taps import tap


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run passes of ``model`` without gradients that leave no trace: buffers, train/eval modes and the random state
    of the CPU and of the model's CUDA device are afterwards what they were."""
    modes = {m: m.training for m in model.modules()}
    buffers = [(m, n, b, b.clone()) for m in modes for n, b in m._buffers.items() if b is not None]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            yield
        finally:
            for module, name, buffer, copy in buffers:
                module._buffers[name] = buffer.copy_(copy)
            for module, mode in modes.items():
                module.training = mode


def probe_shapes(model: nn.Module, names: Sequence[str], example_input: Any) -> dict[str, tuple[int, ...]]:
    """Shape of each tap without the batch dimension, found by one forward pass that leaves no trace."""
    with untouched(model), tap(model, names) as taps:
        model.eval()
        model(example_input)
        return {name: tuple(taps[name].shape[1:]) for name in names}


def find_stages(model: nn.Module, example_input: Tensor, token_stages: int = 4) -> list[str]:
    """Taps after each down-sampling stage of an unknown model, shallow to deep.

    For feature maps: the outermost, and of those the last, module at each spatial size other than the input's and
    1×1. For token models: ``token_stages`` blocks, evenly spaced, the last included, of the most sibling modules of one
    class and one output shape (L, D), the outermost where there are as many.
    Raises UserError if neither is found.
    """
    seen: list[tuple[str, tuple[int, ...]]] = []
    modules = dict(model.named_modules())

    def note(name: str) -> Any:
        return lambda _m, _a, out: seen.append((name, tuple(out.shape[1:]))) if isinstance(out, Tensor) else None

    handles = [m.register_forward_hook(note(n)) for n, m in modules.items() if n]
    try:
        with untouched(model):
            model.eval()
            model(example_input)
    finally:
        for handle in handles:
            handle.remove()
    maps: dict[tuple[int, ...], str] = {}
    for name, shape in seen:
        size, depth = shape[1:], name.count(".")
        if len(shape) == 3 and size not in ((1, 1), tuple(example_input.shape[2:])):
            if size not in maps or depth <= maps[size].count("."):
                maps[size] = name
    stages = sorted(maps.values(), key=lambda n: [name for name, _ in seen].index(n))
    if len(stages) >= 2:
        return stages
    blocks: dict[tuple[Any, ...], list[str]] = {}
    for name, shape in dict.fromkeys(seen):
        parent, _, _ = name.rpartition(".")
        if len(shape) == 2 and parent:
            blocks.setdefault((parent, type(modules[name]), shape), []).append(name)
    longest = max(blocks.values(), key=lambda names: (len(names), -names[0].count(".")), default=[])
    if len(longest) < token_stages:
        raise UserError(f"no stages found in {type(model).__name__}: name its taps in the config")
    return [longest[(i + 1) * len(longest) // token_stages - 1] for i in range(token_stages)]
