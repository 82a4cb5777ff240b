"""Read intermediate tensors of a model without rewriting it.

A tap is named by the dotted path of a module and, optionally, a point:

    layer2                 the module's output
    layer2.0.conv1:input   its first positional input
    layer3:pre_relu        what enters the activation that produces the module's output (the pre-activation
                           feature of the field: negative evidence is still in it)
    logits                 the model's own output (unless the model has a module of that name)

`tap` reads them with hooks for the length of a ``with`` block. `Tapped` turns a model into one that returns them as
values: traced with torch.fx where the model allows it (nothing for torch.compile to trip over), with hooks otherwise.
"""

from __future__ import annotations

import inspect
import operator
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from pathways.registry import UserError, nearest

POINTS = ("output", "input", "pre_relu")
LOGITS = "logits"

_ACTIVATION_FUNCTIONS = {
    F.relu,
    torch.relu,
    torch.relu_,
    Tensor.relu,
    Tensor.relu_,
    F.relu6,
    F.hardtanh,
    F.leaky_relu,
}
_ACTIVATION_MODULES = (nn.ReLU, nn.Hardtanh, nn.LeakyReLU)  # ReLU6 is a Hardtanh
_ACTIVATION_METHODS = ("relu", "relu_")
_INPLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem")
_MAY_RETURN_INPUT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten, nn.Unflatten)


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
        if func not in _ACTIVATION_FUNCTIONS:
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


class _CannotTrace(Exception):
    pass


def _contexts() -> tuple[bool, ...]:
    """What a ``with`` block inside a forward may switch, and a trace does not record."""
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


class _Tracer(fx.Tracer):
    """Symbolic tracer that remembers what went into and came out of every module."""

    proxy_buffer_attributes = True  # or what forward does to a buffer would be done once, to the model, while tracing

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}
        self.contexts = _contexts()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _contexts() != self.contexts:  # no_grad, autocast, or an autograd.Function
            raise _CannotTrace
        return super().create_node(*args, **kwargs)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        output = super().call_module(m, forward, args, kwargs)
        path = self.path_of_module(m)
        self.inputs[path], self.outputs[path] = args, output
        return output


def _node_of(value: Any) -> fx.Node:
    while isinstance(value, (tuple, list)) and value:
        value = value[0]
    if not isinstance(value, fx.Proxy):
        raise _CannotTrace
    return value.node


def _is_activation(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], _ACTIVATION_MODULES)
    if node.op == "call_method":
        return node.target in _ACTIVATION_METHODS
    return node.op == "call_function" and node.target in _ACTIVATION_FUNCTIONS


def _writes_in_place(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return bool(getattr(modules[str(node.target)], "inplace", False))
    if node.op == "call_method":
        return str(node.target).endswith("_")
    name = getattr(node.target, "__name__", "")
    inplace_operator = name.endswith("_") or (name in _INPLACE_OPERATORS and node.target is getattr(operator, name))
    return node.op == "call_function" and (bool(node.kwargs.get("inplace")) or inplace_operator)


def _writers(node: fx.Node, modules: Mapping[str, nn.Module]) -> list[fx.Node]:
    """Operations that may write in place to what ``node`` gives, directly or through a view of it."""
    found, pending, seen = [], [node], {node}
    while pending:
        source = pending.pop()
        for user in source.users:
            if user in seen or user.op == "output" or user.all_input_nodes[0] is not source:
                continue
            seen.add(user)
            if _writes_in_place(user, modules):
                found.append(user)
            if user.op != "call_module" or isinstance(modules[str(user.target)], _MAY_RETURN_INPUT):
                pending.append(user)
    return found


def _protect(graph: fx.Graph, nodes: Iterable[fx.Node], modules: Mapping[str, nn.Module]) -> None:
    """Let the model go on with a copy of each node that is written to in place later, so that the tap is not."""
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in dict.fromkeys(nodes):
        first_write = min((order[writer] for writer in _writers(node, modules)), default=len(order))
        if any(order.get(user, 0) > first_write for user in node.users):
            raise _CannotTrace  # one node, but another tensor before and after the write
        if first_write < len(order):
            users = list(node.users)
            with graph.inserting_after(node):
                copy = graph.call_method("clone", (node,))
            for user in users:
                user.replace_input_with(node, copy)


def _traced_nodes(
    tracer: _Tracer, graph: fx.Graph, names: Sequence[str], modules: Mapping[str, nn.Module]
) -> dict[str, fx.Node]:
    """The graph's node of each tap."""
    nodes = {}
    for name in names:
        module, point = parse_tap(name)
        if name == LOGITS and LOGITS not in modules:
            (output,) = (n for n in graph.nodes if n.op == "output")
            if not isinstance(output.args[0], fx.Node):
                raise _CannotTrace
            nodes[name] = output.args[0]
            continue
        if module not in tracer.outputs:  # inside a leaf such as nn.TransformerEncoderLayer, or never called
            raise _CannotTrace
        node = _node_of(tracer.inputs[module] if point == "input" else tracer.outputs[module])
        if point == "pre_relu":
            if not _is_activation(node, modules):
                raise UserError(f"tap '{name}': '{module}' does not end in a ReLU; tap its output instead")
            node = node.all_input_nodes[0]
        nodes[name] = node
    return nodes


def _trace_graph(model: nn.Module, training: bool) -> tuple[_Tracer, fx.Graph]:
    """The model's graph. Raises _CannotTrace where running the graph would not do what running the model does."""
    if "forward" in vars(model) or any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        raise _CannotTrace  # the graph goes past both

    def state() -> tuple[Any, ...]:
        values = [vars(m).items() for m in model.modules()] + [m._buffers.items() for m in model.modules()]
        attributes = [(k, id(v)) for items in values for k, v in items if k != "training"]
        return attributes, random.getstate(), torch.get_rng_state().tolist()

    attributes = {m: dict(vars(m)) for m in model.modules()}
    random_state = random.getstate()
    try:
        parameters = inspect.signature(model.forward).parameters.values()
        if any(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            raise _CannotTrace  # an argument that forward may ask for
        device = next((p.device.type for p in model.parameters()), "cpu")
        # The graphs of both modes have to agree, so autocast in one of them shows who switches it on or off.
        with untouched(model), torch.enable_grad(), torch.autocast(device, torch.bfloat16, enabled=training):
            model.train(training)
            before = state()
            tracer = _Tracer()
            graph = tracer.trace(model)
            if state() != before:  # forward stores something on the model, or draws random numbers to decide
                raise _CannotTrace
    except Exception as error:  # whatever a forward does that symbolic values cannot follow
        raise _CannotTrace from error
    finally:
        random.setstate(random_state)
        for module, values in attributes.items():
            for name in vars(module).keys() - values.keys():
                del vars(module)[name]
            vars(module).update(values)
    return tracer, graph


def _trace(model: nn.Module, names: Sequence[str], training: bool) -> tuple[str, Any]:
    """Source text and function ``f(model, x) → (output, {tap: tensor})`` of the model's traced graph."""
    tracer, graph = _trace_graph(model, training)
    modules = dict(model.named_modules())
    nodes = _traced_nodes(tracer, graph, names, modules)
    _protect(graph, nodes.values(), modules)
    (output,) = (n for n in graph.nodes if n.op == "output")
    output.args = ((output.args[0], nodes),)
    graph.lint()
    graph_module = fx.GraphModule(model, graph)
    return graph_module.code, type(graph_module).forward


class Tapped(nn.Module):
    """A model that returns its taps as values: ``tapped(x) → (output, {tap: tensor})``.

    The wrapped model stays `model`, shares its parameters and is not changed. Where torch.fx can trace it, the same
    way in training and evaluation mode, the traced code runs (`traced` is True) and reads the parameters of `model`;
    otherwise hooks registered here do the reading until `remove` is called.

    Args:
        model: any module.
        names: taps, see this file's head. May be empty.
        example_input: if given, traced and plain output are compared on it once, and hooks take over if they differ.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], example_input: Tensor | None = None):
        super().__init__()
        check_taps(model, names, type(model).__name__)
        self.model = model
        self.names = list(dict.fromkeys(names))
        self._taps: Taps | None = None
        self._function: Any = None
        try:
            (code, function), (code_eval, _) = _trace(model, self.names, True), _trace(model, self.names, False)
            if code == code_eval and (example_input is None or self._agrees(function, example_input)):
                self._function = function
        except _CannotTrace:
            pass
        if self._function is None:
            self._taps = Taps(model, self.names)

    @property
    def traced(self) -> bool:
        """Whether taps are returned by traced code rather than read by hooks."""
        return self._function is not None

    def _agrees(self, function: Any, example_input: Tensor) -> bool:
        with untouched(self.model):
            self.model.eval()
            with tap(self.model, self.names) as taps:
                plain = self.model(example_input)
            try:
                output, features = function(self.model, example_input)
            except Exception:  # traced code that cannot run is no better than none
                return False
            return (
                isinstance(plain, Tensor)
                and torch.equal(plain, output)
                and all(isinstance(features[n], Tensor) and torch.equal(taps[n], features[n]) for n in self.names)
            )

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        if self._function is not None:
            return self._function(self.model, *args, **kwargs)
        assert self._taps is not None
        try:
            output = self.model(*args, **kwargs)
            return output, {name: self._taps[name] for name in self.names}
        finally:
            self._taps.clear()  # the caller owns the tensors; the model must not keep a step's graph alive

    def remove(self) -> None:
        """Take the hooks off the model, if there are any."""
        if self._taps is not None:
            self._taps.remove()


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
