"""Several processes that train one student: ``torchrun --nproc_per_node 2 -m distpro.cli retrain CFG``.

Each process (rank) runs its share of every batch; gradients, hypergradients and metrics are averaged over the ranks, so
that parameters and α̃ stay the same on all of them. ``training.batch_size`` is the batch of all ranks together: the
number of ranks does not change what a step means, and a checkpoint of four ranks resumes on two. Gradients are averaged
in one exchange after the backward pass: students are small, there is little to overlap.

Without ``torchrun`` there is one rank, and every function here does nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pathways.registry import UserError


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


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients that there are. All ranks have them for the same parameters: weights are theirs alike."""
    average(p.grad for p in parameters if p.grad is not None)


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


class _Sum(torch.autograd.Function):
    """The sum over the ranks; so is the gradient's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return total(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return total(gradient)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the batch of all ranks, on any device. (N, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        wide = x.float()
        count = wide.numel() / wide.shape[1] * world_size()
        sums = _Sum.apply(torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))]))
        mean, square = sums / count
        variance = square - mean.square()
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
                momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)  # type: ignore[arg-type]
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * count / (count - 1), momentum)
        scale = (variance + self.eps).rsqrt() * (self.weight if self.weight is not None else 1)
        shift = (self.bias if self.bias is not None else 0) - mean * scale
        return (wide * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)).to(x.dtype)


def synchronise_batch_norm(model: nn.Module) -> None:
    """Turn the model's BatchNorm2d layers, in place, into ones over the batch of all ranks."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
