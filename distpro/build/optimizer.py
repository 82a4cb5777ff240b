"""From a config to its optimiser."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from distpro.config.schema import Config, OptimizerConfig
from pathways.registry import Registry, UserError, check_parameters, is_code

OPTIMIZERS = Registry("optimiser", takes_code=True)


def build_optimizer(config: Config, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The config's optimiser, in its fused form where there is one that serves; ``package.module:name`` is called with
    the parameters, ``lr`` and the config's ``params``."""
    o = config.training.optimizer
    if not params:
        raise UserError("there is nothing to train: neither the student nor a term has a parameter that is not frozen")
    kind = find_optimizer(o)
    if not is_code(o.name):
        return kind(params, o)
    optimizer = kind(params, lr=o.lr, **o.params)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"optimiser '{o.name}' gives {type(optimizer).__name__}, not a torch.optim.Optimizer")
    if _needs_closure(kind, o):
        raise UserError(
            f"optimiser '{o.name}' evaluates the loss itself, in step(closure); a training's step has one loss and one "
            "gradient (allowed: optimisers whose step() can be called without a closure)"
        )
    return optimizer


def _needs_closure(make: Callable[..., Any], o: OptimizerConfig) -> bool:
    """Whether a step fails for want of one: its signature need not say so (``closure=None``, and an assertion)."""
    still = nn.Parameter(torch.zeros(2, 2))
    still.grad = torch.zeros(2, 2)
    try:
        make([still], lr=o.lr, **o.params).step()
    except Exception as error:  # whatever it does with a parameter of no model
        return "closure" in str(error)
    return False


def find_optimizer(o: OptimizerConfig) -> Callable[..., Any]:
    """What makes the optimiser. Raises UserError for an unknown one, and for parameters that it does not take."""
    kind = OPTIMIZERS[o.name]
    if not is_code(o.name):
        if o.params:
            raise UserError(
                f"training.optimizer.params: for an optimiser of one's own; {o.name} takes its parameters beside its name"
            )
        return kind
    check_parameters(f"optimiser '{o.name}'", kind, o.params)
    try:
        inspect.signature(kind).bind([], lr=o.lr, **o.params)
    except TypeError as error:
        raise UserError(f"optimiser '{o.name}' is called with the parameters, lr and params: {error}") from None
    return kind


@OPTIMIZERS.register("sgd")
def _sgd(params: list[nn.Parameter], o: Any) -> torch.optim.Optimizer:
    nesterov = o.nesterov and o.momentum > 0 and o.dampening == 0
    fused = o.dampening == 0  # dampening treats a first step apart, and a fused step cannot mix first and later ones
    sgd = torch.optim.SGD(params, o.lr, o.momentum, o.dampening, o.weight_decay, nesterov=nesterov, fused=fused)
    if fused and o.momentum:
        for p in params:  # of a term that is dropped at first, the first gradient comes late
            sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return sgd


@OPTIMIZERS.register("adam")
def _adam(params: list[nn.Parameter], o: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=True)


@OPTIMIZERS.register("adamw")
def _adamw(params: list[nn.Parameter], o: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=True)
