"""From a config to its optimiser."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from distpro.build.groups import parameter_groups
from distpro.config.schema import Config, OptimizerConfig
from distpro.console import pip_install
from pathways.registry import Registry, UserError, check_parameters, is_code, module_of_file, nearest

OPTIMIZERS = Registry("optimiser", takes_code=True)
"""Those whose step has a derivative, which a search needs."""

OTHERS = ("lbfgs", "sparseadam", "muon")
"""Of torch.optim what cannot train a network by itself: steps by closures, for sparse gradients, for matrices alone."""

OWN_KEYS = ("momentum", "nesterov", "dampening", "betas", "eps")
"""Keys of a config for the optimisers of `OPTIMIZERS`."""


def build_optimizer(
    config: Config,
    params: list[nn.Parameter],
    model: nn.Module | None = None,
    undecayed: Collection[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """The config's optimiser, in its fused form where there is one that serves; one of torch.optim and timm.optim is called with
    the parameters, ``lr``, ``weight_decay`` and the config's ``params``, ``package.module:name`` without weight decay.

    ``model``: the student, whose layers are told apart where the config asks for that. ``undecayed``: those of the parameters
    that are never to have weight decay.
    """
    o = config.training.optimizer
    if not params:
        raise UserError("there is nothing to train: neither the student nor a term has a parameter that is not frozen")
    kind = find_optimizer(o)
    groups = parameter_groups(o, params, model, undecayed)
    if o.name in OPTIMIZERS:
        return kind(groups, o, _may_fuse(o, groups, model))
    more = o.params if is_code(o.name) else {"weight_decay": o.weight_decay, **o.params}
    try:
        optimizer = kind(groups, lr=o.lr, **more)
    except (AssertionError, TypeError, ValueError) as error:
        if is_code(o.name):  # whose place is said
            raise
        raise UserError(f"optimiser '{o.name}': {str(error).splitlines()[0]}") from None
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"optimiser '{o.name}' gives {type(optimizer).__name__}, not a torch.optim.Optimizer")
    wrong = _tried(kind, o.lr, more)
    if "closure" in wrong:
        raise UserError(
            f"optimiser '{o.name}' evaluates the loss itself, in step(closure); a training's step has one loss and one "
            "gradient (allowed: optimisers whose step() can be called without a closure)"
        )
    if wrong and not is_code(o.name):
        raise UserError(f"optimiser '{o.name}' cannot step with these training.optimizer.params ({wrong})")
    return optimizer


def _tried(make: Callable[..., Any], lr: float, params: Mapping[str, Any]) -> str:
    """Why a step fails, "" where it does not: that it wants a closure need not be in its signature (``closure=None``, and an
    assertion)."""
    still = nn.Parameter(torch.zeros(2, 2))
    still.grad = torch.zeros(2, 2)
    try:
        make([still], lr=lr, **params).step()
    except Exception as error:  # whatever it does with a parameter of no model
        return str(error).partition("\n")[0] or type(error).__name__
    return ""


def find_optimizer(o: OptimizerConfig) -> Callable[..., Any]:
    """What makes the optimiser. Raises UserError for an unknown one, and for parameters that it does not take."""
    if o.name in OPTIMIZERS:
        if o.params:
            raise UserError(
                f"training.optimizer.params: for other optimisers; {o.name} takes its parameters beside its name"
            )
        return OPTIMIZERS[o.name]
    for key in ("lr", "weight_decay"):
        if key in o.params and not (key == "weight_decay" and is_code(o.name)):
            raise UserError(
                f"training.optimizer.params.{key}: has a key of its own beside params, training.optimizer.{key}"
            )
    kind = OPTIMIZERS[o.name] if is_code(o.name) else _of_library(o)
    check_parameters(f"optimiser '{o.name}'", kind, o.params)
    try:
        inspect.signature(kind).bind([], lr=o.lr, **o.params)
    except TypeError as error:
        raise UserError(f"optimiser '{o.name}' is called with the parameters, lr and params: {error}") from None
    return kind


def _of_library(o: OptimizerConfig) -> Callable[..., Any]:
    name = o.name.lower()
    kind = _of_torch().get(name)
    if kind is None:
        known = libraries()
        if name not in known:
            timm = "" if _timm() else f"; those of timm with {pip_install('timm')}"
            allowed = ", ".join([*OPTIMIZERS, *(n for n, library in known.items() if library == "torch.optim")])
            near = module_of_file(o.name) or nearest(name, [*OPTIMIZERS, *known])
            raise UserError(
                f"unknown optimiser '{o.name}'{near} (allowed: {allowed}, those of timm.optim{timm}, or package.module:name)"
            )
        kind = _timm().get_optimizer_class(name)
        momentum = inspect.signature(kind).parameters.get("momentum")
        if momentum is not None and momentum.default == 0:
            kind = partial(kind, momentum=0.9)  # as timm's own create_optimizer_v2: with Nesterov's there must be some
    for key in OWN_KEYS:
        if getattr(o, key) != OptimizerConfig.model_fields[key].default:
            raise UserError(f"training.optimizer.{key}: {o.name} takes it under training.optimizer.params, if at all")
    takes = inspect.signature(kind).parameters
    if "weight_decay" not in takes and o.weight_decay:
        raise UserError(f"training.optimizer.weight_decay: {o.name} has none; set it to 0")
    return kind if "weight_decay" in takes else lambda params, weight_decay=0.0, **more: kind(params, **more)


@cache
def _of_torch() -> dict[str, Callable[..., Any]]:
    kinds = {name.lower(): kind for name, kind in vars(torch.optim).items() if isinstance(kind, type)}
    return {
        name: kind
        for name, kind in kinds.items()
        if issubclass(kind, torch.optim.Optimizer) and name not in (*OPTIMIZERS, *OTHERS, "optimizer")
    }


@cache
def _timm() -> Any:
    """timm.optim, None where it is not installed."""
    try:
        import timm.optim
    except ImportError:
        return None
    return timm.optim


@cache
def libraries() -> dict[str, str]:
    """Optimisers beside those of `OPTIMIZERS`: name → where it is from, sorted. Without those of timm that need second
    derivatives or packages that are not there."""
    found = dict.fromkeys(_of_torch(), "torch.optim")
    timm = _timm()
    for name in () if timm is None else timm.list_optimizers():
        info = timm.get_optimizer_info(name)
        foreign = name.startswith(("bnb", "fused"))  # bitsandbytes' and Apex'
        draws = name.startswith("kron")  # when to renew its preconditioner: a resumed run would not repeat it
        if not (info.second_order or foreign or draws or name in OPTIMIZERS):
            found.setdefault(name, "timm.optim")
    return dict(sorted(found.items()))


def _may_fuse(o: OptimizerConfig, groups: list[Any], model: nn.Module | None) -> bool:
    """Whether a fused step can take every parameter: it takes neither complex ones nor sparse gradients. Raises UserError for sparse
    gradients that no step of the optimiser takes."""
    sparse = {
        m.weight: name
        for name, m in (() if model is None else model.named_modules())
        if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse
    }
    fuses = True
    for group in groups:
        decay = group.get("weight_decay", o.weight_decay) if isinstance(group, dict) else o.weight_decay
        for p in _flat([group]):
            if p in sparse and (o.name != "sgd" or decay):
                cannot = "with training.optimizer.weight_decay" if o.name == "sgd" else "at all"
                raise UserError(
                    f"optimiser '{o.name}' takes no sparse gradients {cannot}, which the student's '{sparse[p]}' gives (sparse=True): "
                    "make it with sparse=False, or take sgd without weight decay"
                )
            fuses = fuses and p not in sparse and p.is_floating_point()
    return fuses


def _flat(params: list[Any]) -> list[nn.Parameter]:
    return [p for group in params for p in (group["params"] if isinstance(group, dict) else [group])]


@OPTIMIZERS.register("sgd")
def _sgd(params: list[Any], o: Any, fused: bool) -> torch.optim.Optimizer:
    nesterov = o.nesterov and o.momentum > 0 and o.dampening == 0
    # Dampening treats a first step apart, and a fused step cannot mix first and later ones.
    fused = fused and o.dampening == 0
    sgd = torch.optim.SGD(params, o.lr, o.momentum, o.dampening, o.weight_decay, nesterov=nesterov, fused=fused)
    if fused and o.momentum:
        for p in _flat(params):  # of a term that is dropped at first, the first gradient comes late
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return sgd


@OPTIMIZERS.register("adam")
def _adam(params: list[Any], o: Any, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=fused)


@OPTIMIZERS.register("adamw")
def _adamw(params: list[Any], o: Any, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=fused)
