"""Which parameters are trained without weight decay, and at which share of the learning rate."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn

from distpro.config.schema import OptimizerConfig

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def parameter_groups(
    o: OptimizerConfig,
    params: Sequence[nn.Parameter],
    model: nn.Module | None = None,
    undecayed: Collection[nn.Parameter] = (),
) -> list[Any]:
    """The parameters as an optimiser takes them: as they are, or in groups {params, lr, weight_decay}, those of the full
    learning rate first.

    With ``no_decay: norms_and_biases`` parameters of one dimension (biases, norms, layer scales) and those that the model's
    ``no_weight_decay()`` names (timm's embeddings of positions and classes) have no weight decay, as in timm. With
    ``layer_decay`` a student's layer has the rate lr · decay^(layers behind it); what is no parameter of ``model`` has lr.
    ``undecayed``: those that have no weight decay whatever the config says.
    """
    if o.no_decay == "none" and o.layer_decay == 1 and not undecayed:
        return list(params)
    depths = depths_of(model) if model is not None and o.layer_decay != 1 else {}
    last = max(depths.values(), default=0)
    spared = {*undecayed, *(_spared(model) if o.no_decay != "none" else ())}
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for p in params:
        decays = p not in spared and (o.no_decay == "none" or p.dim() > 1)
        groups.setdefault((last - depths.get(p, last), decays), []).append(p)
    return [
        {"params": found, "lr": o.lr * o.layer_decay**behind, **({} if decays else {"weight_decay": 0.0})}
        for (behind, decays), found in sorted(groups.items(), key=lambda item: (item[0][0], not item[0][1]))
    ]


def _spared(model: nn.Module | None) -> set[nn.Parameter]:
    named = getattr(model, "no_weight_decay", None)
    names = named() if callable(named) else ()
    return {p for name, p in model.named_parameters() if name in names} if model is not None else set()


def depths_of(model: nn.Module) -> dict[nn.Parameter, int]:
    """The layer that each parameter is in, from 0 at the input: as the model's ``group_matcher`` says (timm's), else in the order in
    which its modules are registered.

    Then a layer is a module of the model or of a container in it; a module that holds more than half of the parameters around
    it stands for the layers in it. What has parameters of one dimension only (a norm) belongs to the layer before it, and
    parameters that are in no layer (tokens, embeddings of positions) to the first.
    """
    matcher: Any = getattr(model, "group_matcher", None)
    if matcher is not None:
        from timm.models import group_parameters

        named = dict(model.named_parameters())
        said = group_parameters(model, matcher(coarse=False), reverse=True)
        return {named[name]: depth for name, depth in said.items()}
    return _by_registration(model)


def _by_registration(model: nn.Module) -> dict[nn.Parameter, int]:
    found = dict.fromkeys(model.parameters(), 0)
    depth = -1
    for layer in _layers(model):
        depth += 1 if depth < 0 or any(p.dim() > 1 for p in layer.parameters()) else 0
        found |= dict.fromkeys(layer.parameters(), depth)
    return found


def _layers(module: nn.Module, whole: bool = True) -> Iterator[nn.Module]:
    """``whole``: whether a child may stand for more than half of the module, and not be one of several blocks."""
    most = _size(module) / 2 if whole else _size(module)
    for child in module.children():
        size = _size(child)
        if type(child) in CONTAINERS:
            yield from _layers(child, whole=False)
        elif size > most and any(_size(inner) for inner in child.children()):
            yield from _layers(child)
        elif size:
            yield child


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
