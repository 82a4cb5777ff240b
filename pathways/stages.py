"""Find the stages of a model that nobody has described: by what its modules give, see `pathways.layouts`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from os.path import commonprefix
from typing import Any

from torch import nn

from pathways.call import Call
from pathways.layouts import Record, Seen
from pathways.registry import UserError

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)  # not their subclasses, which are blocks of some kind
_SHRINKS = 0.6  # of the positions are left, at most: an unpadded convolution takes some and begins no stage
_SHOWN = 8


def find_stages(model: nn.Module, example_input: Any, token_stages: int = 4) -> list[str]:
    """Taps after each stage of an unknown model, shallow to deep.

    A stage ends where the model goes on at a smaller size: of feature maps in either layout, or of token grids. It is
    tapped at the last module that gives this size, a block rather than a bare norm or activation; sizes of the input,
    1×1, and those to which a decoder grows again are none. Where a model keeps one size, ``token_stages`` blocks,
    evenly spaced, the last included, of the most sibling modules of one class and one output shape, the outermost where
    there are as many; what lies before the first of them is the embedding. A model that computes several sizes side by
    side has no such order, and none are found. Modules that give no tensor, or several, or one of another size each
    time, are passed over, and so is what blocks have inside: heads, attention.

    ``example_input`` is anything that `Call.of` takes. Raises UserError if none are found.
    """
    call = Call.of(example_input).copied()
    seen = Record(model, call).outputs
    inputs = {tuple(t.shape[-2:]) for t in call.tensors() if t.dim() >= 3}
    features = [s for s in seen if s.layout is not None and len(s.shape) > 1]
    trunk = _Trunk(features).below("", max(map(prod, inputs), default=0))
    trunk = [s for s in trunk if _cells(s) > 1 and _size(s) not in inputs]
    stages, blocks = _by_size(trunk), _blocks(features)
    repeats = len(blocks) >= token_stages
    if stages is not None and len(stages) >= 2 and not (repeats and _embeds(trunk, blocks)):
        return [s.name for s in stages]
    if stages is not None and repeats:
        return [blocks[(i + 1) * len(blocks) // token_stages - 1].name for i in range(token_stages)]
    raise UserError(f"no stages found in {type(model).__name__}: name its taps in the config{_candidates(seen, trunk)}")


def _size(s: Seen) -> tuple[int, ...]:
    assert s.layout is not None
    return s.layout.size


def _cells(s: Seen) -> int:
    return prod(_size(s))


class _Trunk:
    """The features that a model hands from module to module, in their order."""

    def __init__(self, features: Sequence[Seen]):
        self.children: dict[str, list[Seen]] = {}
        scopes = {s.name for s in features if type(s.module) not in _CONTAINERS}
        for s in features:
            self.children.setdefault(_scope(s.name, scopes), []).append(s)

    def below(self, scope: str, above: int) -> list[Seen]:
        """The features inside a module that takes one of ``above`` positions (0: unknown). Of a module that makes them
        smaller more than once, those inside it; any other is one step."""
        steps: list[list[Seen]] = []
        end = None  # of the body, where that is one module: a head that follows it keeps its size
        smallest = above or float("inf")
        for s in self.children.get(scope, []):
            inside = self.below(s.name, above) if s.name in self.children else []
            sizes = {_cells(i) for i in inside if 1 < _cells(i) < smallest}
            deep = len(sizes) >= 2 and min(sizes) >= _cells(s)
            steps.append(inside if deep else [s])
            if deep:
                end = len(steps)
            elif _cells(s) < smallest:
                end = None
            smallest = min(smallest, _cells(s))
        return [s for step in steps[:end] for s in step]


def _scope(name: str, scopes: set[str]) -> str:
    """The innermost of the modules ``scopes`` that a module is inside of; "" if it is in none."""
    while name:
        name = name.rpartition(".")[0]
        if name in scopes:
            return name
    return ""


def _by_size(trunk: Sequence[Seen]) -> list[Seen] | None:
    """The last block of each size, until the model grows again; None where it then shrinks again, as one does that
    computes several sizes side by side."""
    stages: list[Seen] = []
    grown = False
    for s in trunk:
        ratio = _cells(s) / _cells(stages[-1]) if stages else 0.0
        if ratio > 1 / _SHRINKS:
            grown = True
        elif grown:
            return None
        elif ratio < _SHRINKS:
            stages.append(s)
        elif not _minor(s.module) or _minor(stages[-1].module):
            stages[-1] = s
    return stages


def _minor(module: nn.Module) -> bool:
    """Whether it is a single layer, or a norm, rather than a block."""
    return not any(module.children()) or isinstance(module, (nn.modules.batchnorm._NormBase, nn.LayerNorm))


def _blocks(features: Sequence[Seen]) -> list[Seen]:
    """The most sibling modules of one class and one output shape, the outermost where there are as many."""
    blocks: dict[tuple[Any, ...], list[Seen]] = {}
    for s in features:
        parent = s.name.rpartition(".")[0]
        if parent and not _minor(s.module):
            blocks.setdefault((parent, type(s.module), s.shape), []).append(s)
    return max(blocks.values(), key=lambda group: (len(group), -group[0].name.count(".")), default=[])


def _embeds(trunk: Sequence[Seen], blocks: Sequence[Seen]) -> bool:
    """Whether what is larger is the embedding of patches before blocks of tokens of one size: in another branch."""
    if len(blocks[0].shape) != 2 or any(_cells(s) < _cells(blocks[0]) for s in trunk):
        return False
    above = [s.name for s in trunk if _cells(s) > _cells(blocks[0])]
    names = [name.split(".") for name in (blocks[0].name, *above)]
    common = len(commonprefix(names))
    return all(name[common : common + 1] != names[0][common : common + 1] for name in names[1:])


def _candidates(seen: Sequence[Seen], trunk: Sequence[Seen]) -> str:
    """What could be named, in words: the last module of each shape, or what is not clear."""
    names = [f"{s.name} {'×'.join(map(str, s.shape))} {s.layout}" for s in {s.shape: s for s in trunk}.values()]
    unclear = [f"{s.name} {'×'.join(map(str, s.shape))}, no map for sure" for s in seen if s.layout is None]
    shown = "; ".join((names or unclear)[:_SHOWN])
    return f" (it gives, for instance: {shown})" if shown else ""
