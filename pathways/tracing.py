"""The graph of a model with its taps as outputs, by torch.fx, where running it does what running the model does."""

from __future__ import annotations

import inspect
import operator
import random
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.immutable_collections import immutable_dict

from pathways.probing import untouched
from pathways.registry import UserError
from pathways.taps import ACTIVATION_FUNCTIONS, TapName, locate, read_input, read_output
from pathways.trust import Unchanged, only_known_code_runs, trusted

_ACTIVATION_MODULES = (nn.ReLU, nn.Hardtanh, nn.LeakyReLU)  # ReLU6 is a Hardtanh
_ACTIVATION_METHODS = ("relu", "relu_")
_INPLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem")
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
_GIVE_TUPLES = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
_MAY_RETURN_INPUT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten, nn.Unflatten)


class CannotTrace(Exception):
    """The graph would not do what the model does, or there is none."""


def _contexts() -> tuple[bool, ...]:
    """What a ``with`` block inside a forward may switch, and a trace does not record."""
    return torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


class _Tracer(fx.Tracer):
    """Symbolic tracer that remembers what went into and came out of every module."""

    proxy_buffer_attributes = True  # or what forward does to a buffer would be done once, to the model, while tracing

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.outputs: dict[str, Any] = {}
        self.hidden: set[nn.Module] = set()  # modules inside those that stay one node
        self.contexts = _contexts()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _contexts() != self.contexts:  # no_grad, autocast, or an autograd.Function
            raise CannotTrace
        if not only_known_code_runs(_trace_graph.__code__):  # somebody's own function, or activation checkpointing
            raise CannotTrace
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if type(a) is OrderedDict:  # which a graph would give as a dict
            return self.create_node("call_function", OrderedDict, (super().create_arg(dict(a)),), {})
        if isinstance(a, dict) and type(a) not in (dict, immutable_dict):
            raise CannotTrace
        return super().create_arg(a)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        output = super().call_module(m, forward, args, kwargs)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            self.hidden.update(inner for inner in m.modules() if inner is not m)
        self.inputs[path], self.outputs[path] = (args, kwargs), output
        return output


def _node_of(name: str, tap: TapName, tracer: _Tracer, modules: Mapping[str, nn.Module]) -> fx.Node:
    """The node that a tap reads, of the last call of its module."""
    leaf = (fx.Proxy, fx.Node, Tensor)
    try:
        if tap.point == "input":
            found = read_input(name, tap, modules[tap.module], *tracer.inputs[tap.module], leaf)
        else:
            found = read_output(name, tap, tracer.outputs[tap.module], leaf)
    except (KeyError, UserError) as error:
        # Inside a leaf such as nn.TransformerEncoderLayer or never called; or unclear, which the hooks will tell
        raise CannotTrace from error
    node = found.node if isinstance(found, fx.Proxy) else found
    if not isinstance(node, fx.Node):
        raise CannotTrace
    source = modules[str(node.target)] if node.op == "call_module" else None
    if isinstance(source, _GIVE_TUPLES) or getattr(source, "return_indices", False):
        raise CannotTrace  # one node for several tensors
    return node


def _opened(output: Any) -> Any:
    """A graph's output, with what a node makes a container of in place of that node."""
    if isinstance(output, fx.Node) and output.target is OrderedDict:
        return output.args[0]
    if isinstance(output, fx.Node) and isinstance(output.target, type) and is_dataclass(output.target):
        return output.kwargs
    return output


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
            raise CannotTrace  # one node, but another tensor before and after the write
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
    (end,) = (n for n in graph.nodes if n.op == "output")
    tracer.outputs[""] = _opened(end.args[0])
    tracer.inputs[""] = tuple(n for n in graph.nodes if n.op == "placeholder"), {}
    nodes = {}
    for name in names:
        tap = locate(name, modules)
        if modules[tap.module] in tracer.hidden:
            raise CannotTrace
        node = _node_of(name, tap, tracer, modules)
        if tap.point == "pre_relu":
            if not _is_activation(node, modules):
                raise UserError(f"tap '{name}': '{tap.module}' does not end in a ReLU; tap its output instead")
            node = node.all_input_nodes[0]
        nodes[name] = node
    return nodes


def _attribute(model: nn.Module, path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(model.get_submodule(module), name)


def _trace_graph(model: nn.Module, training: bool) -> tuple[_Tracer, fx.Graph]:
    """The model's graph. Raises CannotTrace where running the graph would not do what running the model does."""
    if not trusted(model):
        raise CannotTrace

    def state() -> tuple[Any, ...]:
        buffers = [(name, id(b)) for m in model.modules() for name, b in m._buffers.items()]
        return buffers, random.getstate(), torch.get_rng_state().tolist()

    try:
        parameters = inspect.signature(model.forward).parameters.values()
        if any(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            raise CannotTrace  # an argument that forward may ask for
        device = next((p.device.type for p in model.parameters()), "cpu")
        # The graphs of both modes have to agree, so autocast in one of them shows who switches it on or off.
        with (
            untouched(model),
            torch.enable_grad(),
            torch.autocast(device, torch.bfloat16, enabled=training),
        ):
            model.train(training)
            unchanged, before = Unchanged(model), state()
            tracer = _Tracer()
            graph = tracer.trace(model)
            if (
                not unchanged() or state() != before
            ):  # forward stores something on the model, or draws random numbers to decide
                raise CannotTrace
            owners = Counter(id(t) for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values()))
            if any(owners[id(_attribute(model, str(n.target)))] > 1 for n in graph.nodes if n.op == "get_attr"):
                raise CannotTrace  # one tensor under two names: the graph knows one, and they may part
    except Exception as error:  # whatever a forward does that symbolic values cannot follow
        raise CannotTrace from error
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
        raise CannotTrace  # a buffer is updated, which nothing needs to read, or it is unknown what is written to
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


def trace(model: nn.Module, names: Sequence[str], training: bool, output: bool) -> fx.Graph:
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


def as_function(model: nn.Module, graph: fx.Graph) -> tuple[str, Any]:
    """The graph's source text, and its function ``f(model, x)``."""
    graph_module = fx.GraphModule(model, graph)
    return graph_module.code, type(graph_module).forward
