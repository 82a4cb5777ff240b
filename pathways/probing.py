"""Learn a model's shapes from one pass that leaves no trace."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pathways.call import Call
from pathways.own_state import having_built, own_state_kept, parts
from pathways.taps import Taps, is_compiled, tap, without_fast_path


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run passes of ``model`` without gradients that leave no trace: buffers, what its modules hold besides (see
    `own_state_kept`), train/eval modes and the random states of Python, NumPy, the CPU and the model's CUDA devices are
    afterwards what they were."""
    modes = {m: m.training for m in model.modules()}
    tensors = chain(model.parameters(), model.buffers())
    devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    with (
        torch.random.fork_rng(devices=devices),
        _drawn_again(),
        own_state_kept(model),
        torch.no_grad(),
        without_fast_path(),  # as where taps are read
        buffers_kept(model),
    ):
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


@contextmanager
def buffers_kept(*models: nn.Module) -> Iterator[None]:
    """The buffers are afterwards what they were, in content, size and number: those of quantisation observers take the size
    of what they see. Where a pass has built modules or parameters (see `own_state_kept`), the buffers that it has made with
    them stay."""
    kept = {m: dict(m._buffers) for model in models for m in model.modules()}
    copies = {
        id(b): b.clone() for buffers in kept.values() for b in buffers.values() if b is not None and not is_lazy(b)
    }
    before = {m: parts(m) for m in kept}
    try:
        yield
    finally:
        with torch.no_grad():
            built = having_built(before)
            for module, buffers in kept.items():
                made = {k: b for k, b in module._buffers.items() if buffers.get(k) is None} if module in built else {}
                module._buffers.clear()
                for name, buffer in buffers.items():
                    module._buffers[name] = with_content(buffer, copies.get(id(buffer)))
                module._buffers.update(made)


def with_content(buffer: Tensor | None, copy: Tensor | None) -> Tensor | None:
    """The buffer with the content of ``copy``, in its size; the copy, where the buffer cannot hold it any more."""
    if buffer is None or copy is None:
        return buffer
    if (buffer.dtype, buffer.device) != (copy.dtype, copy.device):
        return copy
    try:
        return (buffer if buffer.shape == copy.shape else buffer.resize_(copy.shape)).copy_(copy)
    except RuntimeError:  # memory that nothing can be written to, such as an expanded tensor's
        return copy


@contextmanager
def _drawn_again() -> Iterator[None]:
    """Python and NumPy have afterwards the random states that they have now."""
    random_state, numpy = random.getstate(), sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(random_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


def _without_compiled_code(model: nn.Module) -> AbstractContextManager[Any]:
    """Let the modules' own code run, which hooks reach, in place of what torch.compile made of it."""
    compiled = any(map(is_compiled, model.modules()))
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Let passes of ``model`` run its own code, which hooks reach, and leave no trace."""
    with untouched(model), _without_compiled_code(model):
        yield


def probe_features(model: nn.Module, names: Sequence[str], example_input: Any) -> dict[str, Tensor]:
    """The tapped tensors of one forward pass in evaluation mode, detached; the pass leaves no trace.

    ``example_input`` is anything that `Call.of` takes. Raises UserError as `tap` does.
    """
    with probing(model), tap(model, names) as taps:
        Call.of(example_input).copied().run(model.eval())
        return {name: taps[name].detach() for name in taps}


def readable(model: nn.Module, names: Sequence[str], example_input: Any) -> set[str]:
    """Which of the taps can be read, found by one forward pass that leaves no trace."""
    with probing(model):
        taps = Taps(model, names, strict=False)
        try:
            Call.of(example_input).copied().run(model.eval())
        finally:
            taps.remove()
        return taps.read


def probe_shapes(model: nn.Module, names: Sequence[str], example_input: Any) -> dict[str, tuple[int, ...]]:
    """Shape of each tap without the batch dimension, found by one forward pass that leaves no trace."""
    return {name: tuple(f.shape[1:]) for name, f in probe_features(model, names, example_input).items()}
