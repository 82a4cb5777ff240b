"""Several processes that train one student: ``torchrun --nproc_per_node 2 -m distpro.cli retrain CFG``.

Each process (rank) runs its share of every batch; gradients, hypergradients and metrics are averaged over the ranks, so
that parameters and α̃ stay the same on all of them. ``training.batch_size`` is the batch of all ranks together: the
number of ranks does not change what a step means, and a checkpoint of four ranks resumes on two. Gradients are averaged
in one exchange after the backward pass: students are small, there is little to overlap.

Without ``torchrun`` there is one rank, and every function here does nothing.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.overrides import TorchFunctionMode

from pathways.registry import UserError

LOST = r"(?i)gloo|nccl|connection (closed|reset)|timed? ?out|broken pipe|\b(tcp)?store\b"
"""What PyTorch says where another process does not answer."""


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _running() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _running() else 1


def is_main() -> bool:
    """Whether this process writes files and talks to people."""
    return rank() == 0


def local_rank() -> int:
    """This process's number on its machine: which of its GPUs it uses."""
    return int(os.environ.get("LOCAL_RANK", 0))


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def started(device: str = "auto", timeout_minutes: float = 10.0) -> Iterator[None]:
    """Join the other processes, if ``torchrun`` says that there are any: NCCL between GPUs, gloo between CPUs.

    ``timeout_minutes``: how long a rank waits for the others before it gives up.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or _running():
        yield
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        torch.cuda.set_device(local_rank())
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(minutes=timeout_minutes))
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if is_main() else nowhere):
            yield
        dist.barrier()  # who leaves first takes the connection away from the others
    except RuntimeError as error:
        if not re.search(LOST, str(error)):
            raise
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"rank {rank()}: lost the other processes ({reason}): one of them has ended, failed or hangs, what it says comes "
            "first; --resume goes on from the last checkpoint"
        ) from None
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def average(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over the ranks, in one exchange per dtype."""
    if world_size() == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for same in by_dtype.values():
        flat = torch.cat([t.reshape(-1) for t in same])
        dist.all_reduce(flat)
        flat /= world_size()
        for tensor, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
            tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def average_where_any(values: Iterable[Tensor | None], like: Iterable[Tensor]) -> list[Tensor | None]:
    """The mean over the ranks of each value, in place where this rank has it. One that only other ranks have counts as
    zero, with the shape of its entry in ``like``; one that no rank has stays None.

    Which values there are may differ from rank to rank (a layer that is dropped, a branch that is not taken); their
    number and order must not. Two exchanges: who has which, and the values that any rank has.
    """
    values = list(values)
    if world_size() == 1 or not values:
        return values
    like = list(like)
    present = total(torch.tensor([float(v is not None) for v in values], device=like[0].device)).tolist()
    averaged = [
        (torch.zeros_like(x) if v is None else v) if count else None
        for v, x, count in zip(values, like, present, strict=True)
    ]
    average(v for v in averaged if v is not None)
    return averaged


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients over the ranks, parameter by parameter, see `average_where_any`. All ranks call it with the
    same parameters."""
    parameters = list(parameters)
    for parameter, gradient in zip(
        parameters, average_where_any([p.grad for p in parameters], parameters), strict=True
    ):
        parameter.grad = gradient


def total(tensor: Tensor) -> Tensor:
    """The sum over the ranks."""
    if world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def gather(state: Any) -> list[Any]:
    """The plain values and tensors (on the CPU) of every rank, in the order of the ranks."""
    if world_size() == 1:
        return [state]
    states: list[Any] = [None] * world_size()
    dist.all_gather_object(states, state)
    return states


def any_of(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    if world_size() == 1:
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return bool(total(torch.tensor(float(flag), device=device)).item())


def share(batch_size: int) -> int:
    """This rank's part of a batch. Raises UserError where it cannot be cut into equal parts."""
    if batch_size % world_size():
        raise UserError(f"training.batch_size {batch_size} cannot be cut into {world_size()} equal parts")
    return batch_size // world_size()


class _Total(torch.autograd.Function):
    """`total` in a graph: whatever one rank makes of the sum moves every rank's part of it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return total(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Total.apply(gradient.contiguous())


class _Standardise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) per channel of (N, C, ...) over the batch of all ranks, whose parts may differ in
    size, and 1 / sqrt(variance + eps) (C,), of which the backward pass is made, so that it can be differentiated again.
    Beside them, without a gradient, mean and variance (C,), and how many values a channel has.

    A rank's mean is taken off before anything is squared, and the ranks' means and sums of squares are merged in float64
    (Chan, Golub & LeVeque 1983), so that a mean much larger than the deviation costs no digits.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        axes, shape = _but_channels(x)
        own = x.numel() // x.shape[1]
        anchor = x.mean(axes) if own else x.new_zeros(x.shape[1])
        centred = x - anchor.view(shape)
        rest = centred.mean(axes) if own else anchor  # what rounding has left in
        squares = (centred - rest.view(shape)).square().sum(axes)
        count = x.new_full((x.shape[1],), own, dtype=torch.float64)
        parts = torch.stack([count, anchor.double() + rest.double(), squares.double()])
        gathered = [torch.empty_like(parts) for _ in range(world_size())]
        dist.all_gather(gathered, parts)
        counts, means, sums = torch.stack(gathered).unbind(1)
        n = counts.sum(0)
        if own < 2 and n.min() < 2:
            raise UserError(
                "batch normalisation: one value per channel has no statistics; use larger batches, or drop_last"
            )
        mean = (counts * means).sum(0) / n
        variance = (sums + counts * (means - mean).square()).sum(0) / n
        scale = (variance + eps).rsqrt().to(x.dtype)
        standard = (centred - (mean - anchor).to(x.dtype).view(shape)) * scale.view(shape)
        ctx.save_for_backward(standard, scale, n)
        ctx.mark_non_differentiable(mean, variance, n)
        ctx.set_materialize_grads(False)
        return standard, scale, mean, variance, n

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, of_scale: Tensor | None, *_: None) -> tuple[Tensor | None, None]:
        standard, scale, n = ctx.saved_tensors
        axes, shape = _but_channels(standard)
        result = None
        if gradient is not None:
            sums = _Total.apply(torch.stack([gradient.sum(axes), (gradient * standard).sum(axes)]))
            mean, along = (sums / n).to(standard.dtype)
            result = (gradient - mean.view(shape) - standard * along.view(shape)) * scale.view(shape)
        if of_scale is not None:  # in a second backward pass alone
            along = (_Total.apply(of_scale) / n).to(scale.dtype) * scale.square()
            by_scale = standard * along.view(shape)
            result = -by_scale if result is None else result - by_scale
        return result, None


def _but_channels(x: Tensor) -> tuple[list[int], list[int]]:
    """The dimensions of (N, C, ...) other than the channels', and the shape that gives (C,) to them."""
    return [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm` in training, over the batch of all ranks; half precision reckons in float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y, _, mean, variance, n = _Standardise.apply(wide, eps)
    with torch.no_grad():
        for running, new in ((running_mean, mean), (running_var, variance * n / (n - 1))):
            if running is not None:
                running.lerp_(new.to(running.dtype), momentum)
    _, shape = _but_channels(x)
    if weight is not None:
        y = y * weight.view(shape)
    if bias is not None:
        y = y + bias.view(shape)
    return y.to(x.dtype)


class _BatchOfAllRanks(TorchFunctionMode):
    """Inside, `torch.nn.functional.batch_norm` in training takes the batch of all ranks. ``met``: whether it was called."""

    met = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.batch_norm:
            return func(*args, **kwargs)
        self.met = True
        training = kwargs["training"] if "training" in kwargs else len(args) > 5 and args[5]
        if training:
            if "input" in kwargs:
                kwargs = {**kwargs, "x": kwargs["input"]}
                del kwargs["input"]
            return _batch_norm(*args, **kwargs)
        return func(*args, **kwargs)


class SyncBatchNorm(_BatchNorm):
    """BatchNorm over the batch of all ranks, on any device, while training: a base that goes before a class of BatchNorm.

    That class's forward runs, whatever it does beside normalising (timm's layers put an activation behind it), as long
    as it normalises by `torch.nn.functional.batch_norm`. Raises UserError where it does not.
    """

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input, *args, **kwargs)
        with _BatchOfAllRanks() as ranks:
            y = super().forward(input, *args, **kwargs)
        if not ranks.met:
            raise _cannot_synchronise(type(self).__mro__[2], "does not normalise by torch.nn.functional.batch_norm")
        return y


def _cannot_synchronise(kind: type, why: str) -> UserError:
    return UserError(
        f"sync_batch_norm: {kind.__module__}.{kind.__qualname__} {why}; leave sync_batch_norm out, or use another layer"
    )


@cache
def _synchronised(kind: type[nn.Module]) -> type[nn.Module]:
    forward = torch.compiler.disable(SyncBatchNorm.forward)  # here, as it imports the compiler
    return type(f"Sync{kind.__name__}", (SyncBatchNorm, kind), {"__module__": __name__, "forward": forward})


def synchronise_batch_norm(model: nn.Module) -> None:
    """Turn the model's BatchNorm layers, in place, into ones over the batch of all ranks: those of PyTorch and of any class
    that is derived from them (timm's). Raises UserError for one that cannot be."""
    for module in model.modules():
        if not isinstance(module, _BatchNorm) or isinstance(module, (SyncBatchNorm, nn.SyncBatchNorm)):
            continue
        if isinstance(module, LazyModuleMixin):
            raise _cannot_synchronise(type(module), "does not know its width before its first batch")
        module.__class__ = _synchronised(type(module))  # type: ignore[assignment, arg-type]
