"""Read intermediate tensors of a model without rewriting it.

A tap is named by the dotted path of a module and, optionally, a point:

    layer2                 the module's output
    layer2.0.conv1:input   its first positional input
    layer3:pre_relu        what enters the activation that produces the module's output (the pre-activation
                           feature of the field: negative evidence is still in it)
    logits                 the model's own output (unless the model has a module of that name)

`tap` reads them with hooks for the length of a ``with`` block; `pathways.tapped` turns a model into one that returns
them as values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pathways.registry import UserError, nearest

POINTS = ("output", "input", "pre_relu")


LOGITS = "logits"


ACTIVATION_FUNCTIONS = {
    F.relu,
    torch.relu,
    torch.relu_,
    Tensor.relu,
    Tensor.relu_,
    F.relu6,
    F.hardtanh,
    F.leaky_relu,
}


def parse_tap(name: str) -> tuple[str, str]:
    """``'layer3:pre_relu'`` → ``('layer3', 'pre_relu')``. Raises UserError for an unknown point."""
    module, _, point = name.partition(":")
    point = point or "output"
    if point not in POINTS:
        raise UserError(f"tap '{name}': unknown point '{point}'{nearest(point, POINTS)} (allowed: {', '.join(POINTS)})")
    return module, point


def check_taps(model: nn.Module, names: Iterable[str], what: str = "model") -> None:
    """Raise UserError if a tap names no module of ``model``."""
    modules = dict(model.named_modules())
    for name in names:
        module, _ = parse_tap(name)
        if module not in modules and name != LOGITS:
            shown = [m for m in modules if m and m.count(".") == module.count(".")][:12]
            raise UserError(
                f"{what} has no module '{module}' to tap{nearest(module, modules)} (it has, for instance: {', '.join(shown)})"
            )


class _ActivationWatch(TorchFunctionMode):
    """Remembers what entered the last activation function that ran, and what came out of it."""

    before: Tensor | None = None
    after: Tensor | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is Tensor.clone and args[0] is self.after:  # the copy that another tap hands on
            self.after = func(*args, **kwargs)
            return self.after
        if func not in ACTIVATION_FUNCTIONS:
            return func(*args, **kwargs)
        inplace = func in (torch.relu_, Tensor.relu_) or bool(kwargs.get("inplace", False)) or args[-1] is True
        # An in-place activation overwrites its input, so that is what has to be copied, and only then.
        self.before = args[0].clone() if inplace else args[0]
        self.after = func(*args, **kwargs)
        return self.after


def _first_tensor(value: Any, name: str) -> Tensor:
    while isinstance(value, (tuple, list)) and value:
        value = value[0]
    if not isinstance(value, Tensor):
        raise UserError(f"tap '{name}' gives {type(value).__name__}, not a tensor")
    return value


class Taps(Mapping[str, Tensor]):
    """The tapped tensors of the model's last forward pass, filled by hooks until `remove` is called.

    The model goes on with a copy of each, so that what it writes in place later does not reach the tap.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]):
        check_taps(model, names, type(model).__name__)
        self._names = list(dict.fromkeys(names))
        self._values: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        modules = dict(model.named_modules())
        for name in self._names:
            module, point = parse_tap(name)
            target = model if name == LOGITS and LOGITS not in modules else modules[module]
            getattr(self, f"_watch_{point}")(name, target)

    def _watch_output(self, name: str, module: nn.Module) -> None:
        def hook(_m: nn.Module, _args: Any, output: Any) -> Tensor | None:
            self._values[name] = _first_tensor(output, name)
            return output.clone() if isinstance(output, Tensor) else None

        self._handles.append(module.register_forward_hook(hook))

    def _watch_input(self, name: str, module: nn.Module) -> None:
        def hook(_m: nn.Module, args: Any) -> tuple[Any, ...] | None:
            self._values[name] = _first_tensor(args, name)
            return (args[0].clone(), *args[1:]) if isinstance(args[0], Tensor) else None

        self._handles.append(module.register_forward_pre_hook(hook))

    def _watch_pre_relu(self, name: str, module: nn.Module) -> None:
        watches: list[_ActivationWatch] = []

        def enter(_m: nn.Module, _args: Any) -> None:
            watches.append(_ActivationWatch())
            watches[-1].__enter__()

        def leave(_m: nn.Module, _args: Any, output: Any) -> None:
            watch = watches.pop()
            watch.__exit__(None, None, None)
            if output is None:  # the module's forward raised; the error is on its way to the caller
                return
            if watch.before is None or watch.after is not output:
                raise UserError(
                    f"tap '{name}': '{name.partition(':')[0]}' does not end in a ReLU; tap its output instead"
                )
            self._values[name] = watch.before

        self._handles.append(module.register_forward_pre_hook(enter))
        self._handles.append(module.register_forward_hook(leave, always_call=True))

    def remove(self) -> None:
        """Take the hooks off the model. The tensors read last stay here."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def clear(self) -> None:
        """Forget the tensors, so that a forward pass that misses a tap is noticed."""
        self._values.clear()

    def __getitem__(self, name: str) -> Tensor:
        if name in self._names and name not in self._values:
            raise UserError(f"tap '{name}' has read nothing: its module did not run in the last forward pass")
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextmanager
def tap(model: nn.Module, names: Sequence[str]) -> Iterator[Taps]:
    """Read taps of ``model`` inside a ``with`` block; the hooks are gone afterwards.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with tap(model, ["0"]) as taps:
    ...     y = model(torch.ones(1, 2))
    >>> taps["0"].shape
    torch.Size([1, 3])

    Raises UserError if the model has no such module.
    """
    taps = Taps(model, names)
    try:
        yield taps
    finally:
        taps.remove()
