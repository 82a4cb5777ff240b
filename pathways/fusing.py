"""Faster forms of a traced model that compute the same: ReLUs in place, and a frozen model's convolutions in one
operation with the BatchNorm, the sum and the ReLU that follow them."""

from __future__ import annotations

import operator
import os
from collections.abc import Mapping
from itertools import chain
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

# Each gives new memory, and none needs its result again in the backward pass.
_BEFORE_IN_PLACE = (nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Linear)
_SUMS = (operator.add, operator.iadd, torch.add)
_RELU_FUNCTIONS = (F.relu, torch.relu)


def fused(graph: fx.Graph, modules: Mapping[str, nn.Module], frozen: bool) -> fx.Graph:
    """A copy of a traced graph with its ReLUs in place where nothing else reads what they overwrite (a tap counts as a
    reader). A ``frozen`` model's convolutions also take in what follows them, see `FrozenConv`."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    if frozen:
        _fold(copy, modules)
    for node in list(copy.nodes):
        if _is_relu(node, modules) and len(node.all_input_nodes[0].users) == 1:
            if _gives_new_memory(node.all_input_nodes[0], modules):
                _replace(copy, node, torch.relu_, (node.all_input_nodes[0],))
    copy.lint()
    return copy


def _is_relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[str(node.target)]) is nn.ReLU
    return (node.op == "call_function" and node.target in _RELU_FUNCTIONS) or (
        node.op == "call_method" and node.target == "relu"
    )


def _gives_new_memory(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[str(node.target)]) in _BEFORE_IN_PLACE
    is_sum = node.target in (operator.add, torch.add) and len(node.all_input_nodes) == 2
    return node.op == "call_function" and (is_sum or isinstance(node.target, FrozenConv))


def _replace(graph: fx.Graph, node: fx.Node, function: Any, args: tuple[Any, ...]) -> fx.Node:
    with graph.inserting_before(node):
        new = graph.call_function(function, args)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def _fold(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
    for conv in list(graph.nodes):
        if conv.op != "call_module" or not _is_plain(modules[str(conv.target)]) or not conv.args:
            continue
        taken, norm, other = [conv], None, None
        following = _only_user(conv)
        if following is not None and following.op == "call_module":
            if type(modules[str(following.target)]) is nn.BatchNorm2d:
                norm = following
                taken.append(norm)
        following = _only_user(taken[-1])
        if following is not None and _adds_to(following, taken[-1]):
            other = next(n for n in following.all_input_nodes if n is not taken[-1])
            taken.append(following)
        following = _only_user(taken[-1])
        relu = following is not None and _is_relu(following, modules)
        if following is not None and relu:
            taken.append(following)
        if len(taken) > 1:
            with graph.inserting_before(taken[-1]):
                parts = [None if n is None else graph.get_attr(str(n.target)) for n in (conv, norm)]
                new = graph.call_function(FrozenConv(relu), (*parts, conv.args[0], other))
            taken[-1].replace_all_uses_with(new)
            for node in reversed(taken):
                graph.erase_node(node)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _adds_to(node: fx.Node, term: fx.Node) -> bool:
    """Whether a node is the plain sum of ``term`` and another tensor, and leaves the other one as it is."""
    plain = node.op == "call_function" and node.target in _SUMS and not node.kwargs and len(node.all_input_nodes) == 2
    return plain and (node.target is not operator.iadd or node.args[0] is term)


def _is_plain(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)


class FrozenConv:
    """ReLU(BatchNorm(conv(x)) + other) of a frozen model in evaluation mode, any part but the convolution optional.

    BatchNorm becomes a factor on the convolution's weights and a bias; they are computed once, and again when a value
    of weights or statistics is another than it was then (they are compared in every pass: tensors can be written to in
    ways that count no version, such as ``.data``). The sum and the ReLU are part of oneDNN's convolution.
    """

    __module__ = __name__  # torch.fx asks a function for both
    __name__ = "frozen_conv"

    def __init__(self, relu: bool):
        self.relu = relu
        self._takes_sum = self._finite = True
        self._made_from: Any = None
        self._sources: list[Tensor | None] = []
        self._known: tuple[Tensor, Tensor | None] | None = None

    def __call__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, x: Tensor, other: Tensor | None) -> Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        weight, bias = self._folded(conv, norm, dtype)
        x = x.to(dtype)
        if kind == "cpu" and _onednn_takes(dtype) and self._finite:  # its ReLU makes 0 of NaN
            return self._onednn(conv, x, weight, bias, other)
        y = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        y = y if other is None else y + other
        return y.relu_() if self.relu else y

    def _onednn(self, conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None) -> Tensor:
        operation = torch.ops.mkldnn._convolution_pointwise
        settings = list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups
        if other is None:
            return operation(x, weight, bias, *settings, "relu" if self.relu else "none", [], "")
        if self._takes_sum and other.dtype == x.dtype and other.shape == _output_shape(conv, x):
            then = "relu" if self.relu else None
            try:
                return operation.binary(x, other, weight, bias, *settings, "add", 1.0, then, [], "")
            except RuntimeError:  # for some layouts and groups there is no such operation in bfloat16
                self._takes_sum = False
        y = operation(x, weight, bias, *settings, "none", [], "") + other
        return y.relu_() if self.relu else y

    @torch.no_grad()
    def _folded(self, conv: nn.Conv2d, norm: nn.BatchNorm2d | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        sources: list[Tensor | None] = [conv.weight, conv.bias]
        if norm is not None:
            sources += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
        state = dtype, None if norm is None else norm.eps
        if self._known is None or self._made_from != state or not all(map(_equal, self._sources, sources)):
            self._made_from, self._sources = state, [None if t is None else t.detach().clone() for t in sources]
            weight, bias = conv.weight, conv.bias
            if norm is not None:
                assert norm.running_mean is not None and norm.running_var is not None
                factor = (norm.running_var + norm.eps).rsqrt()
                factor = factor if norm.weight is None else factor * norm.weight
                shift = -norm.running_mean if bias is None else bias - norm.running_mean
                bias = factor * shift if norm.bias is None else factor * shift + norm.bias
                weight = weight * factor.view(-1, 1, 1, 1)  # type: ignore[assignment]
            self._known = weight.to(dtype), None if bias is None else bias.to(dtype)
            self._finite = all(bool(t.isfinite().all()) for t in self._known if t is not None)
        return self._known


def _equal(kept: Tensor | None, now: Tensor | None) -> bool:
    """Whether a tensor has the type, shape and values that it had."""
    if kept is None or now is None:
        return kept is now
    return kept.dtype == now.dtype and kept.device == now.device and torch.equal(kept, now)


def _onednn_takes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:  # type: ignore[attr-defined]
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def computes_in_bfloat16() -> bool:
    """Whether the CPU has units for bfloat16, and oneDNN may use them: its environment variable can hold it to an older
    instruction set. On others PyTorch emulates it, an order of magnitude slower than float32."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "default")).lower()
    allowed = limit in ("default", "all") or any(unit in limit for unit in ("bf16", "fp16", "amx"))
    return allowed and any(getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("avx512_bf16", "amx_tile"))


def _output_shape(conv: nn.Conv2d, x: Tensor) -> torch.Size:
    sizes = (
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for size, pad, dilation, kernel, stride in zip(
            x.shape[2:], cast(tuple[int, ...], conv.padding), conv.dilation, conv.kernel_size, conv.stride, strict=True
        )
    )
    return torch.Size([x.shape[0], conv.out_channels, *sizes])


def foldable(model: nn.Module) -> bool:
    """Whether a model keeps the statistics of its BatchNorms, and lies where comparing its weights costs next to
    nothing: on the CPU."""
    norms = (m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    tensors = chain(model.parameters(), model.buffers())
    return all(n.running_mean is not None for n in norms) and all(t.device.type == "cpu" for t in tensors)
