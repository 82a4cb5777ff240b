"""Read intermediate tensors of a model without rewriting it.

A tap is named by the dotted path of a module and, optionally, a point and a key:

    layer2                 the module's output
    layer2.0.conv1:input   its input
    layer3:pre_relu        what enters the activation that produces the module's output (the pre-activation
                           feature of the field: negative evidence is still in it)
    logits                 the model's own output (unless the model has a module of that name), see `response_of`

A module may take and give containers: tuples, lists, mappings, dataclasses, in one another. If there is one tensor in
it, that is the tap; if there are several, the key in brackets says which (`pathways.containers`):

    encoder[last_hidden_state]      block[1.0]      logits[out]      [aux]      attn:input[hidden_states]

Inputs are called by their position or by their name in the module's ``forward``; inside the one list or mapping that a
module takes as its only argument the key begins.

`tap` reads taps with hooks for the length of a ``with`` block; `pathways.tapped` turns a model into one that returns
them as values.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from pathways.containers import copied, entries, entry, items_of, named, shown
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


class TapName(NamedTuple):
    """What a tap's name says: the module's path, the point, and the key of a tensor in a container."""

    module: str
    point: str = "output"
    key: str | None = None


def parse_tap(name: str) -> TapName:
    """``'layer3:input[1]'`` → ``TapName('layer3', 'input', '1')``. Raises UserError for an unknown point.

    >>> parse_tap("encoder[last_hidden_state]")
    TapName(module='encoder', point='output', key='last_hidden_state')
    """
    match = re.fullmatch(r"(.*?)(?::(.*?))?(?:\[([^\[\]]+)\])?", name, re.DOTALL)
    assert match is not None  # the first part takes anything
    module, point, key = match.groups()
    point = point or "output"
    if point not in POINTS:
        raise UserError(f"tap '{name}': unknown point '{point}'{nearest(point, POINTS)} (allowed: {', '.join(POINTS)})")
    return TapName(module, point, key)


def locate(name: str, modules: Mapping[str, nn.Module]) -> TapName:
    """The tap in a model with these modules: ``logits`` is the model's own output, path ``""``, where no module has
    that name."""
    tap = parse_tap(name)
    return tap._replace(module="") if tap[:2] == (LOGITS, "output") and LOGITS not in modules else tap


def response_of(output: Any) -> Tensor:
    """The tensor of a model's output that logit losses compare.

    A bare tensor is one. In a container it is what is called ``logits``, else ``out`` (as torchvision's segmentation
    models do), else the only tensor in it. Raises UserError, which lists the keys, for any other output.

    >>> response_of({"loss": None, "logits": torch.ones(2, 3), "hidden": torch.ones(2, 8)}).shape
    torch.Size([2, 3])
    """
    return _response(output, Tensor)


def _response(output: Any, leaf: type | tuple[type, ...]) -> Any:
    found = entries(output, leaf)
    for key in ("logits", "out"):
        if key in found:
            return found[key]
    if len({id(tensor) for tensor in found.values()}) > 1:
        raise UserError(
            f"the model's output has several tensors ({shown(found)}), none of them called 'logits' or 'out'; "
            f"a term says which one it means as tap 'logits[{list(found)[-1]}]'; a task loss needs a model that returns "
            "{'logits': ...}, or a task of its own"
        )
    return entry(output, None, f"tap '{LOGITS}'", leaf)


def read_output(name: str, tap: TapName, output: Any, leaf: type | tuple[type, ...] = Tensor) -> Any:
    """The tensor (the ``leaf``) that a tap means in what its module gave. Raises UserError if that is unclear."""
    if tap.module == "" and tap.key is None:
        return _response(output, leaf)
    return entry(output, tap.key, f"tap '{name}'", leaf)


def read_input(
    name: str,
    tap: TapName,
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    leaf: type | tuple[type, ...] = Tensor,
) -> Any:
    """The tensor (the ``leaf``) that a tap means among its module's arguments. Raises UserError if that is unclear."""
    what, key = f"tap '{name}'", tap.key
    given = {**{str(position): value for position, value in enumerate(args)}, **kwargs}
    sole = next(iter(given.values())) if len(given) == 1 else None
    value = given if isinstance(sole, leaf) or items_of(sole) is None else sole
    if key is None or named(entries(value, leaf), key):
        return entry(value, key, what, leaf)
    head, dot, rest = key.partition(".")
    names = list(inspect.signature(module.forward).parameters)
    if head in names:  # a name that was given by position
        other = str(names.index(head))
    else:
        other = names[int(head)] if head.isdigit() and int(head) < len(names) else head
    for alternative in (key, other + dot + rest):
        if named(entries(given, leaf), alternative):
            return entry(given, alternative, what, leaf)
    return entry(value, key, what, leaf)  # an error, which lists what there is


def check_taps(model: nn.Module, names: Iterable[str], what: str = "model") -> None:
    """Raise UserError if a tap names no module of ``model``."""
    modules = dict(model.named_modules())
    for name in names:
        module = locate(name, modules).module
        if module not in modules:
            shown = [m for m in modules if m and m.count(".") == module.count(".")][:12]
            raise UserError(
                f"{what} has no module '{module}' to tap{nearest(module, modules)} (it has, for instance: {', '.join(shown)})"
            )


def is_compiled(module: nn.Module) -> bool:
    """Whether a module runs code of torch.compile, which hooks set later do not reach."""
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None


@contextmanager
def without_fast_path(wanted: bool = True) -> Iterator[None]:
    """Let attention layers of torch.nn in evaluation mode run what they run in training mode, not one fused operation: it
    goes over their submodules, and `nn.TransformerEncoder` makes nested tensors for it, which have no shape."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(before and not wanted)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _in_reentrant_checkpoint(module: nn.Module) -> bool:
    """Whether a pass of ``module`` runs now where `checkpoint(..., use_reentrant=True)` keeps no graph of it, though something
    in it, or what the checkpointed code is given, needs gradients."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return False
    given = (t for t in frame.f_locals["args"] if isinstance(t, Tensor))
    return any(t.requires_grad for t in chain(module.parameters(), given))


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


class Taps(Mapping[str, Tensor]):
    """The tapped tensors of the model's last forward pass, filled by hooks until `remove` is called.

    The model goes on with a copy of each, and of every tensor in the same container, so that what it writes in place
    later does not reach the tap. ``strict``: raise UserError for a tap that cannot be read; else it has read nothing.
    ``taught``: raise UserError also for a tensor without the graph that it would have outside a reentrant checkpoint.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], strict: bool = True, taught: bool = False):
        check_taps(model, names, type(model).__name__)
        self._strict, self._taught = strict, taught
        self._names = list(dict.fromkeys(names))
        self._values: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        modules = dict(model.named_modules())
        self._compiled = any(map(is_compiled, modules.values()))
        for name in self._names:
            tap = locate(name, modules)
            getattr(self, f"_watch_{tap.point}")(name, tap, modules[tap.module])

    def _watch_output(self, name: str, tap: TapName, module: nn.Module) -> None:
        def hook(_m: nn.Module, _args: Any, output: Any) -> Any:
            with self._refusing():
                self._note(name, module, read_output(name, tap, output))
            return copied(output)

        self._handles.append(module.register_forward_hook(hook))

    def _watch_input(self, name: str, tap: TapName, module: nn.Module) -> None:
        def hook(m: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
            with self._refusing():
                self._note(name, m, read_input(name, tap, m, args, kwargs))
            return copied((args, kwargs))

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _watch_pre_relu(self, name: str, tap: TapName, module: nn.Module) -> None:
        watches: list[_ActivationWatch] = []

        def enter(_m: nn.Module, _args: Any) -> None:
            watches.append(_ActivationWatch())
            watches[-1].__enter__()

        def leave(_m: nn.Module, _args: Any, output: Any) -> None:
            watch = watches.pop()
            watch.__exit__(None, None, None)
            if output is None:  # the module's forward raised; the error is on its way to the caller
                return
            with self._refusing():
                if watch.before is None or watch.after is not read_output(name, tap, output):
                    raise UserError(f"tap '{name}': '{tap.module}' does not end in a ReLU; tap its output instead")
                self._note(name, module, watch.before)

        self._handles.append(module.register_forward_pre_hook(enter))
        self._handles.append(module.register_forward_hook(leave, always_call=True))

    def _note(self, name: str, module: nn.Module, tensor: Tensor) -> None:
        if self._taught and not tensor.requires_grad and _in_reentrant_checkpoint(module):
            raise UserError(
                f"tap '{name}': its module runs inside checkpoint(..., use_reentrant=True), which keeps no graph of what is "
                "inside, so that a loss on it teaches nothing; checkpoint with use_reentrant=False"
            )
        self._values[name] = tensor

    def _refusing(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._strict else suppress(UserError)

    @property
    def read(self) -> set[str]:
        """The taps that have read something."""
        return set(self._values)

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
            hint = "; code that was compiled before the tap was set reads none" if self._compiled else ""
            raise UserError(f"tap '{name}' has read nothing: its module did not run in the last forward pass{hint}")
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@contextmanager
def tap(model: nn.Module, names: Sequence[str], taught: bool = False) -> Iterator[Taps]:
    """Read taps of ``model`` inside a ``with`` block; the hooks are gone afterwards. Where there are taps, attention takes
    the same path in training and evaluation mode, see `without_fast_path`.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> with tap(model, ["0"]) as taps:
    ...     y = model(torch.ones(1, 2))
    >>> taps["0"].shape
    torch.Size([1, 3])

    Raises UserError if the model has no such module, and, where losses on the tensors are to be ``taught``, if a reentrant
    checkpoint around a tapped module keeps no graph of it.
    """
    taps = Taps(model, names, taught=taught)
    try:
        with without_fast_path(bool(names)):
            yield taps
    finally:
        taps.remove()
