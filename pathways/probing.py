"""Learn a model's shapes and stages from one pass that leaves no trace."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pathways.call import Call
from pathways.containers import entries
from pathways.registry import UserError
from pathways.taps import is_compiled, tap
from pathways.trust import own_containers

_FROM_MAPS = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d)  # (N, C, H, W) in and out


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run passes of ``model`` without gradients that leave no trace: buffers, train/eval modes and the random state
    of the CPU and of the model's CUDA devices are afterwards what they were."""
    modes = {m: m.training for m in model.modules()}
    kept = [(m, dict(m._buffers)) for m in modes]
    copies = {id(b): b.clone() for _, buffers in kept for b in buffers.values() if b is not None and not is_lazy(b)}
    tensors = chain(model.parameters(), model.buffers())
    devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for module, buffers in kept:
                module._buffers.clear()
                for name, buffer in buffers.items():
                    module._buffers[name] = _put_back(buffer, copies.get(id(buffer)))


def _put_back(buffer: Tensor | None, copy: Tensor | None) -> Tensor | None:
    """The buffer with its former content; the copy, where the buffer cannot hold it any more."""
    if buffer is None or copy is None:
        return buffer
    if (buffer.shape, buffer.dtype, buffer.device) != (copy.shape, copy.dtype, copy.device):
        return copy
    try:
        return buffer.copy_(copy)
    except RuntimeError:  # memory that nothing can be written to, such as an expanded tensor's
        return copy


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Give the modules back their present attributes afterwards, with the present content of lists, dicts and sets, and
    Python and NumPy their random states."""
    attributes = {m: dict(vars(m)) for m in model.modules()}
    contents = [(c, c.copy()) for m in attributes for c in own_containers(m)]
    random_state, numpy = random.getstate(), sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(random_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        for module, values in attributes.items():
            for name in vars(module).keys() - values.keys():
                del vars(module)[name]
            vars(module).update(values)
        for container, content in contents:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)


def _without_compiled_code(model: nn.Module) -> AbstractContextManager[Any]:
    """Let the modules' own code run, which hooks reach, in place of what torch.compile made of it."""
    compiled = any(map(is_compiled, model.modules()))
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


def probe_features(model: nn.Module, names: Sequence[str], example_input: Any) -> dict[str, Tensor]:
    """The tapped tensors of one forward pass in evaluation mode, detached; the pass leaves no trace.

    ``example_input`` is anything that `Call.of` takes. Raises UserError as `tap` does.
    """
    with restored(model), untouched(model), _without_compiled_code(model), tap(model, names) as taps:
        Call.of(example_input).run(model.eval())
        return {name: taps[name].detach() for name in taps}


def probe_shapes(model: nn.Module, names: Sequence[str], example_input: Any) -> dict[str, tuple[int, ...]]:
    """Shape of each tap without the batch dimension, found by one forward pass that leaves no trace."""
    return {name: tuple(f.shape[1:]) for name, f in probe_features(model, names, example_input).items()}


def find_stages(model: nn.Module, example_input: Any, token_stages: int = 4) -> list[str]:
    """Taps after each down-sampling stage of an unknown model, shallow to deep.

    For feature maps, (C, H, W) or (H, W, C): the outermost, and of those the last, module at each spatial size other
    than the input's and 1×1. For token models: ``token_stages`` blocks, evenly spaced, the last included, of the most
    sibling modules of one class and one output shape (L, D), the outermost where there are as many; maps before the
    first of them are the embedding of patches. Modules that give no tensor, or several, or one of another size each
    time, are passed over.
    ``example_input`` is anything that `Call.of` takes. Raises UserError if neither is found.
    """
    call, modules = Call.of(example_input), dict(model.named_modules())
    seen = _outputs(model, call)
    first_seen = {name: position for position, (name, _) in reversed(list(enumerate(seen)))}
    blocks = _blocks(seen, modules)
    stages = sorted(_maps(seen, modules, call).values(), key=first_seen.__getitem__)
    if len(blocks) >= token_stages:  # what lies before the first block of a token model is its embedding
        stages = [s for s in stages if first_seen[s] > first_seen[blocks[0]]]
    if len(stages) >= 2:
        return stages
    if len(blocks) < token_stages:
        raise UserError(f"no stages found in {type(model).__name__}: name its taps in the config")
    return [blocks[(i + 1) * len(blocks) // token_stages - 1] for i in range(token_stages)]


def _outputs(model: nn.Module, call: Call) -> list[tuple[str, tuple[int, ...]]]:
    """Each module that gives one tensor, always of one shape, of as many samples as the call has, in the order of their
    ends, and its shape per sample."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    listed = call.args and isinstance(call.args[0], list)
    first = next(call.tensors(), None)
    samples = len(call.args[0]) if listed else 0 if first is None or first.dim() == 0 else len(first)

    def note(name: str) -> Any:
        def hook(_m: nn.Module, _args: Any, output: Any) -> None:
            tensors = list(entries(output).values())
            if len(tensors) == 1 and tensors[0].dim() > 0 and len(tensors[0]) == samples:
                seen.append((name, tuple(tensors[0].shape[1:])))

        return hook

    handles = [m.register_forward_hook(note(n)) for n, m in model.named_modules() if n]
    try:
        with restored(model), untouched(model), _without_compiled_code(model):
            call.run(model.eval())
    finally:
        for handle in handles:
            handle.remove()
    kinds = Counter(name for name, _ in set(seen))
    return [(name, shape) for name, shape in seen if kinds[name] == 1]


def _maps(
    seen: Sequence[tuple[str, tuple[int, ...]]], modules: dict[str, nn.Module], call: Call
) -> dict[tuple[int, ...], str]:
    """The outermost, and of those the last, module at each spatial size other than the input's and 1×1."""
    inputs = {tuple(t.shape[-2:]) for t in call.tensors() if t.dim() >= 3}
    maps: dict[tuple[int, ...], str] = {}
    for name, shape in seen:
        sizes = [] if len(shape) != 3 else [size for size in (shape[1:], shape[:2]) if _fits(size, inputs)]
        sure = any(isinstance(m, _FROM_MAPS) for m in modules[name].modules())
        if len(shape) == 3 and sure and not sizes:
            sizes = [shape[1:]]
        if not sizes or sizes[0] == (1, 1) or sizes[0] in inputs:
            continue
        size, depth = sizes[0], name.count(".")
        grown = size not in maps and any(size[0] > h or size[1] > w for h, w in maps)
        if grown and not sure:  # attention of tokens to tokens, rather than a map
            continue
        if size not in maps or depth <= maps[size].count("."):
            maps[size] = name
    return maps


def _fits(size: tuple[int, ...], inputs: set[tuple[int, ...]]) -> bool:
    """Whether a spatial size is that of an input made smaller: neither side longer, about the same ratio of sides."""
    (h, w) = size
    return any(h <= h0 and w <= w0 and abs(h * w0 - w * h0) <= 2 * max(h0, w0) for h0, w0 in inputs)


def _blocks(seen: Sequence[tuple[str, tuple[int, ...]]], modules: dict[str, nn.Module]) -> list[str]:
    """The most sibling modules of one class and one output shape (L, D), the outermost where there are as many."""
    blocks: dict[tuple[Any, ...], list[str]] = {}
    for name, shape in dict.fromkeys(seen):
        parent, _, _ = name.rpartition(".")
        if len(shape) == 2 and parent:
            blocks.setdefault((parent, type(modules[name]), shape), []).append(name)
    return max(blocks.values(), key=lambda names: (len(names), -names[0].count(".")), default=[])
