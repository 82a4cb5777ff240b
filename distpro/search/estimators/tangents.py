"""One forward-mode pass of a model: outputs and their tangents along a direction of its parameters.

PyTorch's own forward-mode rule of train-mode BatchNorm is a chain of elementwise operations that takes half of such a
pass on a CPU, and that of its backward pass a longer one; `_BatchNorm` replaces both by the fused backward kernel.
"""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from distpro.search.estimators.swap import swapped
from pathways.call import Call, map_tensors
from pathways.registry import UserError


class NoRule(UserError):
    """A model has an operator without a forward-mode rule. ``operator``: its name."""

    def __init__(self, operator: str):
        super().__init__(f"forward_mode: {operator} has no forward-mode rule; use search.estimator=finite_difference")
        self.operator = operator


def forward_mode(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    inputs: Any,
    precision: torch.dtype | None = None,
) -> Any:
    """Tangents of the model's output for ``inputs`` (see `Call.of`) at ``parameters`` along ``direction``.

    Runs with the model's mode (batch statistics in training), attention in its plain form (the fused kernels have no
    forward mode); buffers stay as they are. What the model computes under ``no_grad`` has no tangent, as it has no gradient.

    Args:
        parameters: name → value, all parameters of the model.
        direction: name → tangent, for the parameters that move.
        precision: dtype of autocast, None for full precision.

    Returns the model's output with every tensor replaced by its tangent (zeros where it does not move). Raises `NoRule`.
    """
    device = next(iter(parameters.values())).device.type
    autocast = torch.autocast(device, precision, enabled=precision is not None)
    with dual_numbers(statistics=True), autocast, ExitStack() as contexts:
        values: dict[Tensor, Tensor] = {
            own: forward_ad.make_dual(parameters[name].detach(), direction[name].detach())
            if name in direction
            else parameters[name].detach()
            for name, own in model.named_parameters()
        }
        contexts.enter_context(swapped(model, values | {b: b.detach().clone() for b in model.buffers()}))
        try:
            return map_tensors(_tangent, Call.of(inputs).run(model))
        except NotImplementedError as error:
            operator = _without_rule(error)
            if operator is None:
                raise
            raise NoRule(operator) from error


@contextmanager
def dual_numbers(statistics: bool = False) -> Iterator[None]:
    """Where tensors may have tangents, with the rules of this module; a backward pass inside has them too (forward over
    reverse). ``statistics``: running statistics go on, for a model that reads them in the same pass; they are to be copies."""
    # Gradients are enabled also where nothing needs one, so that a no_grad of the model's own shows.
    with torch.enable_grad(), forward_ad.dual_level(), _quiet(), sdpa_kernel(SDPBackend.MATH), TangentRules(statistics):
        yield


def _without_rule(error: NotImplementedError) -> str | None:
    """The operator that PyTorch complains about; None where it complains about something else."""
    named = re.match(r"Trying to use forward AD with (\w+)", str(error))
    if named is not None:
        return named[1]
    if "jvp function for custom autograd.Function" not in str(error):
        return None
    owners = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = [kind.__name__ for kind in (getattr(owner, "_forward_cls", None) for owner in owners) if kind is not None]
    return f"autograd.Function {found[-1]}" if found else "an autograd.Function"


def _tangent(output: Tensor) -> Tensor:
    tangent = forward_ad.unpack_dual(output).tangent
    return torch.zeros_like(output) if tangent is None else tangent


@contextmanager
def _quiet() -> Iterator[None]:
    # The first forward-mode pass of a process makes torch load decompositions that use its own deprecated jit.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.*", category=Warning)
        yield


class TangentRules(TorchFunctionMode):
    """In it, tangents are as a student needs them, in a forward pass and in a backward pass through one (forward over
    reverse): train-mode F.batch_norm is `_BatchNorm` (running statistics are not touched, but for ``statistics``), ``no_grad``
    stops tangents, and the mean of F.mse_loss is taken apart, whose backward fails where its incoming gradient has no tangent."""

    def __init__(self, statistics: bool = False):
        super().__init__()
        self._statistics = statistics

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        torch._C._set_fwd_grad_enabled(True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled:
            torch._C._set_fwd_grad_enabled(*args)
        if func is F.batch_norm:
            return _batch_norm(self._statistics, *args, **kwargs)
        if func is F.mse_loss and len(args) == 2 and kwargs.get("reduction", "mean") == "mean":
            return func(*args, **{**kwargs, "reduction": "none"}).mean()
        return func(*args, **kwargs)


def _batch_norm(
    statistics: bool,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    weight = x.new_ones(x.shape[1]) if weight is None else weight
    bias = x.new_zeros(x.shape[1]) if bias is None else bias
    kept: list[Tensor] = []
    y: Tensor = _BatchNorm.apply(x, weight, bias, eps, kept)
    if statistics and running_mean is not None and running_var is not None:
        mean, inverse = kept
        count = x.numel() // x.shape[1]
        variance = (inverse.pow(-2) - eps) * (count / (count - 1))
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(variance.to(running_var.dtype), momentum)
    return y


class _BatchNorm(torch.autograd.Function):
    """Train-mode BatchNorm with a fused forward-mode rule, of its backward too.

    With x̂ = (x − μ) / σ the tangent of y = γ x̂ + β is  γ/σ (ẋ − mean ẋ − x̂ mean(x̂ ẋ)) + γ̇ x̂ + β̇. Its first part is a
    symmetric matrix times ẋ, so it is what BatchNorm's backward kernel returns for an incoming gradient ẋ.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, kept: list[Tensor]) -> Tensor:
        """``kept`` gets mean and 1/σ."""
        y, mean, inverse = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        kept[:] = mean, inverse
        ctx.eps = eps
        ctx.save_for_forward(x, weight, mean, inverse)
        ctx.save_for_backward(x, weight, mean, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return (*_BatchNormBackward.apply(gradient, *ctx.saved_tensors, ctx.eps), None, None)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dweight: Tensor | None, dbias: Tensor | None, *_: None) -> Tensor:
        x, weight, mean, inverse = ctx.saved_tensors
        dy = None
        if dx is not None:
            dy, _, _ = _kernel(dx, x, weight, mean, inverse, ctx.eps)
        if dweight is not None or dbias is not None:
            scale = torch.zeros_like(mean) if dweight is None else dweight * inverse
            shift = -scale * mean if dbias is None else dbias - scale * mean
            affine = torch.addcmul(_channels(shift, x), x, _channels(scale, x))
            dy = affine if dy is None else dy.add_(affine)
        assert dy is not None
        return dy


class _BatchNormBackward(torch.autograd.Function):
    """(g, x, γ, μ, 1/σ) → the gradients by x, γ and β, with their tangents.

    With P v = v − mean v − x̂ mean(x̂ v), N values per channel, and S = Σ g x̂ they are  γ/σ P g,  S  and  Σ g. As x̂ has the
    tangent P ẋ / σ, and 1/σ the tangent −mean(x̂ ẋ) / σ², the first one's is

        γ/σ P ġ + (γ̇ − γ mean(x̂ ẋ) / σ) P g / σ − γ/(σN) (S P ẋ / σ + x̂ Σ g P ẋ / σ).
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, eps: float) -> Any:
        plain, along, total = _kernel(g, x, torch.ones_like(weight), mean, inverse, eps)
        ctx.eps = eps
        ctx.save_for_forward(g, x, weight, mean, inverse, plain, along)
        return plain * _channels(weight, x), along, total

    @staticmethod
    def jvp(ctx: Any, dg: Tensor | None, dx: Tensor | None, dweight: Tensor | None, *_: None) -> Any:
        g, x, weight, mean, inverse, plain, along = ctx.saved_tensors
        per_channel = x.numel() // x.shape[1]
        first, dalong, dtotal = torch.zeros_like(x), torch.zeros_like(along), torch.zeros_like(along)
        if dg is not None:
            first, dalong, dtotal = _kernel(dg, x, weight, mean, inverse, ctx.eps)
        factor = torch.zeros_like(mean) if dweight is None else dweight.to(mean.dtype)
        if dx is not None:
            moved, beside, _ = _kernel(dx, x, torch.ones_like(weight), mean, inverse, ctx.eps)
            both = (g * moved).sum([n for n in range(x.dim()) if n != 1], dtype=mean.dtype)
            dalong = dalong + both
            share = weight * inverse / per_channel
            factor = factor - share * beside
            first = torch.addcmul(first, moved, _channels(share * along, x), value=-1)
            centred = torch.addcmul(_channels(-mean * inverse, x), x, _channels(inverse, x))
            first.addcmul_(centred, _channels(share * both, x), value=-1)
        return first.addcmul_(plain, _channels(factor, x)), dalong, dtotal


def _kernel(g: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse: Tensor, eps: float) -> Any:
    """BatchNorm's backward kernel: γ/σ P g, Σ g x̂ and Σ g, see `_BatchNormBackward`."""
    backward = torch.ops.aten.native_batch_norm_backward
    return backward(g, x, weight, None, None, mean, inverse, True, eps, [True, True, True])


def _channels(values: Tensor, like: Tensor) -> Tensor:
    """(C,) as a factor of (N, C, ...)."""
    return values.to(like.dtype).view(1, -1, *[1] * (like.dim() - 2))
