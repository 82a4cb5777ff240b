"""Models that return their taps as values: traced with torch.fx where the model allows it, with hooks otherwise."""

from __future__ import annotations

import inspect
import math
import operator
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from pathways.fusing import foldable, fused
from pathways.registry import UserError
from pathways.taps import ACTIVATION_FUNCTIONS, LOGITS, Taps, check_taps, parse_tap, tap, untouched

_ACTIVATION_MODULES = (nn.ReLU, nn.Hardtanh, nn.LeakyReLU)  # ReLU6 is a Hardtanh
_ACTIVATION_METHODS = ("relu", "relu_")
_INPLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem")
_WAIT_FOR_THE_END = ("torch.nn.parallel", "torch.distributed")  # modules that prepare the exchange of gradients then
_NEW_MEMORY = (
    "clone",
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.matmul,
    torch.add,
    torch.cat,
)
_MAY_RETURN_INPUT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten, nn.Unflatten)


class _CannotTrace(Exception):
    pass


class _AllRead(Exception):
    """Every tap has been read; what is left of the forward pass is not wanted."""


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Give the modules back their present attributes afterwards, and Python its random state."""
    attributes = {m: dict(vars(m)) for m in model.modules()}
    random_state = random.getstate()
    try:
        yield
    finally:
        random.setstate(random_state)
        for module, values in attributes.items():
            for name in vars(module).keys() - values.keys():
                del vars(module)[name]
            vars(module).update(values)


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
    return node.op == "call_function" and node.target in ACTIVATION_FUNCTIONS


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

    try:
        parameters = inspect.signature(model.forward).parameters.values()
        if any(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            raise _CannotTrace  # an argument that forward may ask for
        device = next((p.device.type for p in model.parameters()), "cpu")
        # The graphs of both modes have to agree, so autocast in one of them shows who switches it on or off.
        with (
            _restored(model),
            untouched(model),
            torch.enable_grad(),
            torch.autocast(device, torch.bfloat16, enabled=training),
        ):
            model.train(training)
            before = state()
            tracer = _Tracer()
            graph = tracer.trace(model)
            if state() != before:  # forward stores something on the model, or draws random numbers to decide
                raise _CannotTrace
    except Exception as error:  # whatever a forward does that symbolic values cannot follow
        raise _CannotTrace from error
    return tracer, graph


def _with_inputs(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes and everything that they are computed from."""
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _storages(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> dict[fx.Node, fx.Node | str]:
    """The node or buffer in whose memory each node may lie. Nodes of different storages share none."""
    storages: dict[fx.Node, fx.Node | str] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            shares = _writes_in_place(node, modules) or isinstance(modules[str(node.target)], _MAY_RETURN_INPUT)
        else:
            shares = node.op in ("call_function", "call_method") and node.target not in _NEW_MEMORY
        if node.op == "get_attr":
            storages[node] = str(node.target)
        else:
            storages[node] = storages[node.all_input_nodes[0]] if shares and node.all_input_nodes else node
    return storages


def _prune(graph: fx.Graph, unused: Sequence[fx.Node], modules: Mapping[str, nn.Module]) -> None:
    """Take out what the graph's output does not depend on.

    Kept besides are writes in place to what is read later on, and those of ``unused`` (nodes that are there for their
    effect, such as ``torch._assert``) that need no module to run for them alone.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    storages = _storages(graph, modules)
    writers = [n for n in graph.nodes if n.all_input_nodes and _writes_in_place(n, modules)]
    if any(isinstance(storages[n], str) for n in writers) or any("out" in n.kwargs for n in graph.nodes):
        raise _CannotTrace  # a buffer is updated, which nothing needs to read, or it is unknown what is written to
    needed = _with_inputs(n for n in graph.nodes if n.op == "output")
    while True:
        last_read = {storages[i]: order[n] for n in sorted(needed, key=order.__getitem__) for i in n.all_input_nodes}
        more = [n for n in writers if order[n] < last_read.get(storages[n], -1)]
        more += [n for n in unused if all(i.op != "call_module" for i in _with_inputs([n]) - needed)]
        if needed.issuperset(more):
            break
        needed |= _with_inputs(more)
    for node in reversed(list(graph.nodes)):
        if node not in needed and node.op != "placeholder":
            graph.erase_node(node)


def _trace(model: nn.Module, names: Sequence[str], training: bool, output: bool) -> fx.Graph:
    """The model's traced graph, ``x → (output, {tap: tensor})``. Without ``output`` it gives None for that and is
    pruned."""
    tracer, graph = _trace_graph(model, training)
    modules = dict(model.named_modules())
    nodes = _traced_nodes(tracer, graph, names, modules)
    unused = [n for n in graph.nodes if not n.users and n.op in ("call_function", "call_method")]
    _protect(graph, nodes.values(), modules)
    (end,) = (n for n in graph.nodes if n.op == "output")
    end.args = ((end.args[0] if output else None, nodes),)
    if not output:
        _prune(graph, unused, modules)
    graph.lint()
    return graph


def _compiled(model: nn.Module, graph: fx.Graph) -> tuple[str, Any]:
    """The graph's source text, and its function ``f(model, x)``."""
    graph_module = fx.GraphModule(model, graph)
    return graph_module.code, type(graph_module).forward


class _Reads:
    """Counts how often each tap is read, and can end a forward pass once all of them have been."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self.counts: Counter[str] = Counter()
        self._model, self._names = model, names
        self._ending = False
        modules = dict(model.named_modules())
        self._handles = []
        for name in names:
            module, point = parse_tap(name)
            target = model if name == LOGITS and LOGITS not in modules else modules[module]
            register: Any = target.register_forward_pre_hook if point == "input" else target.register_forward_hook
            self._handles.append(register(partial(self._count, name)))

    def _count(self, name: str, *_: Any) -> None:
        self.counts[name] += 1
        if self._ending and len(self.counts) == len(self._names):
            raise _AllRead

    def run(self, *args: Any, **kwargs: Any) -> None:
        """A forward pass that ends with the last tap."""
        self.counts.clear()
        self._ending = True  # only here: activation checkpointing runs hooks in the backward pass too
        try:
            self._model(*args, **kwargs)
        except _AllRead:
            pass
        finally:
            self._ending = False

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _may_end(model: nn.Module, names: Sequence[str], example_input: Any) -> bool:
    """Whether a forward pass can be left as soon as every tap has been read: each is read once, in training and
    evaluation mode, and no module has work to do when its submodules have run."""
    for module in model.modules():
        hooks = module._forward_hooks.keys() - module._forward_hooks_always_called.keys()
        if hooks or "forward" in vars(module) or type(module).__module__.startswith(_WAIT_FOR_THE_END):
            return False
    reads = _Reads(model, names)
    try:
        with _restored(model), untouched(model):
            for training in (True, False):
                reads.counts.clear()
                model.train(training)(example_input)
                if reads.counts != dict.fromkeys(names, 1):
                    return False
    except Exception:  # a model that one batch does not fit, in one of the modes
        return False
    finally:
        reads.remove()
    return True


def _has_hooks(module: nn.Module) -> bool:
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def _global_hooks() -> bool:
    of = nn.modules.module
    forward = of._global_forward_hooks or of._global_forward_pre_hooks
    return bool(forward or of._global_backward_hooks or of._global_backward_pre_hooks)


def _alike(expected: Any, found: Any, tolerance: float) -> bool:
    """Whether two tensors differ by no more than ``tolerance`` × the largest element."""
    if not (isinstance(expected, Tensor) and isinstance(found, Tensor) and expected.shape == found.shape):
        return False
    if torch.equal(expected, found):
        return True
    return bool((expected - found).abs().max() <= tolerance * expected.abs().max())


class Tapped(nn.Module):
    """A model that returns its taps as values: ``tapped(x) → (output, {tap: tensor})``.

    The wrapped model stays `model`, shares its parameters and is not changed. Where torch.fx can trace it, the same
    way in training and evaluation mode, the traced code runs (`traced` is True) and reads the parameters of `model`;
    otherwise hooks registered here do the reading until `remove` is called.

    Without ``output``, ``tapped(x) → (None, {tap: tensor})`` and only what the taps depend on runs. Modules that do
    not run update no buffers, draw no random numbers (so that what is drawn later differs) and get no gradients (DDP
    around it needs ``find_unused_parameters``). A model that cannot be traced runs up to its last tap, or to its end
    where that could change a tap: without an example, where the example reads a tap more than once, and in models
    that wait for a pass to end (DDP, hooks).

    Args:
        model: any module.
        names: taps, see this file's head. May be empty.
        example_input: if given, traced and plain output are compared on it once, and hooks take over if they differ.
        output: whether the model's output is wanted. `logits` among the taps is always given.
        frozen: the model is no longer trained: without gradients and in evaluation mode, its convolutions run as one
            operation with what follows them (`pathways.fusing`), if the example shows the same result.

    With an example, traced code overwrites what a ReLU reads where nothing else does. Hooks that are registered later,
    and modules that are replaced, are respected.

    Attributes:
        modules_run: modules of torch.nn that a forward pass runs, by name and in order; None where hooks read the taps.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        example_input: Tensor | None = None,
        output: bool = True,
        frozen: bool = False,
    ):
        super().__init__()
        check_taps(model, names, type(model).__name__)
        self.model = model
        self.names = list(dict.fromkeys(names))
        self.output = output
        self.modules_run: list[str] | None = None
        self._taps: Taps | None = None
        self._reads: _Reads | None = None
        self._function: Any = None
        self._fused: Any = None
        self._frozen = frozen
        if not (output or self.names):
            self.modules_run = []
            return
        try:
            graph = _trace(model, self.names, True, output)
            code, function = _compiled(model, graph)
            code_eval, _ = _compiled(model, _trace(model, self.names, False, output))
            if code == code_eval and (example_input is None or self._agrees(function, example_input)):
                self._function = function
                self.modules_run = list(dict.fromkeys(str(n.target) for n in graph.nodes if n.op == "call_module"))
                if example_input is not None:
                    self._fuse(graph, example_input)
        except _CannotTrace:
            pass
        if self._function is None:
            may_end = not output and example_input is not None and _may_end(model, self.names, example_input)
            self._taps = Taps(model, self.names)
            self._reads = _Reads(model, self.names) if may_end else None  # its hooks run after those of the taps

    @property
    def traced(self) -> bool:
        """Whether taps are returned by traced code rather than read by hooks."""
        return self._function is not None

    def _fuse(self, graph: fx.Graph, example_input: Tensor) -> None:
        self._seen = list(self.model.modules())
        self._frozen = self._frozen and foldable(self.model)
        _, function = _compiled(self.model, fused(graph, dict(self.model.named_modules()), self._frozen))
        device = example_input.device.type
        if self._agrees(function, example_input, 1e-4 if self._frozen else 0):
            with torch.autocast(device, torch.bfloat16, enabled=device == "cpu"):
                if self._agrees(
                    function, example_input, math.inf
                ):  # it runs: oneDNN has operations for some types only
                    self._fused = function

    @property
    def runs_fused(self) -> bool:
        """Whether a forward pass now takes the faster code of `pathways.fusing`: there is some, the modules are those
        that were traced, and nobody looks at what that code leaves out."""
        if self._fused is None or torch.compiler.is_compiling():
            return False
        modules = list(self.model.modules())
        same = len(modules) == len(self._seen) and all(map(operator.is_, modules, self._seen))
        if not same or _global_hooks() or any(map(_has_hooks, modules)):
            return False
        return not self._frozen or not (torch.is_grad_enabled() or any(m.training for m in modules))

    def _agrees(self, function: Any, example_input: Tensor, tolerance: float = 0) -> bool:
        with untouched(self.model):
            self.model.eval()
            with tap(self.model, self.names) as taps:
                plain = self.model(example_input)
            try:
                output, features = function(self.model, example_input)
            except Exception:  # traced code that cannot run is no better than none
                return False
            return (not self.output or _alike(plain, output, tolerance)) and all(
                _alike(taps[n], features[n], tolerance) for n in self.names
            )

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        if self.runs_fused:
            return self._fused(self.model, *args, **kwargs)
        if self._function is not None:
            return self._function(self.model, *args, **kwargs)
        if self._taps is None:
            return None, {}
        try:
            output = (self._reads.run if self._reads else self.model)(*args, **kwargs)
            return output if self.output else None, {name: self._taps[name] for name in self.names}
        finally:
            self._taps.clear()  # the caller owns the tensors; the model must not keep a step's graph alive

    def remove(self) -> None:
        """Take the hooks off the model, if there are any."""
        for hooks in (self._taps, self._reads):
            if hooks is not None:
                hooks.remove()
