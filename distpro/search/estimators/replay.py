"""Training steps that are done again, for the states between those that were kept."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distpro.batch import Batch
from distpro.objective import Objective
from distpro.search.estimators.base import TrainingStep
from distpro.search.estimators.differentiable import State
from distpro.search.estimators.start import Start
from distpro.train import distributed
from distpro.train.state import set_random_state
from pathways.call import tensors_in
from pathways.registry import UserError


@dataclass
class Snapshot:
    """What a training step starts from: parameters, the optimiser's state of each, and what a pass begins with besides."""

    theta: list[Tensor]
    states: list[State]
    start: Start


@dataclass
class Kept:
    """A training step as a sweep goes back through it.

    Attributes:
        step: without the parameters, the graph and the teacher's tensors.
        groups: the optimiser's settings, by group.
        before: what it started from; None where that is to be made again.
        gradients: before clipping, likewise.
        teacher: the teacher's tensors; empty where the pass computes them.
    """

    step: TrainingStep
    groups: list[dict[str, Any]]
    before: Snapshot | None = None
    gradients: list[Tensor | None] | None = None
    teacher: Mapping[str, Tensor] | None = None


class Replay:
    """Does steps of a training again as the trainer has done them, precision and compilation included, from a snapshot.

    On a CPU the same bits come out. Where they differ by more than rounding, the student or a loss keeps something outside
    of its buffers, and the gradient would be that of another training.

    Args:
        objective, optimizer, max_norm, clip_by: of the training.
    """

    tolerance = 1e-3
    """Largest relative difference of the parameters after some steps that counts as rounding (of a GPU's atomic sums)."""

    def __init__(self, objective: Objective, optimizer: torch.optim.Optimizer, max_norm: float | None, clip_by: str):
        self.objective, self.optimizer, self.max_norm = objective, optimizer, max_norm
        self.params: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        self._clip_groups = objective.clip_groups(clip_by)

    def snapshot(self) -> Snapshot:
        """A copy of where the training is."""
        return Snapshot([p.detach().clone() for p in self.params], self.states(), Start(self.objective))

    def states(self) -> list[State]:
        """A copy of the optimiser's state of each parameter."""
        known = [self.optimizer.state.get(p, {}) for p in self.params]
        return [{k: v.detach().clone() for k, v in state.items() if isinstance(v, Tensor)} for state in known]

    def gradients(self) -> list[Tensor | None]:
        """A copy of the parameters' gradients."""
        return [None if p.grad is None else p.grad.detach().clone() for p in self.params]

    @contextmanager
    def put_back(self) -> Iterator[list[Tensor]]:
        """Afterwards the training is where it was; gives the parameters there."""
        now, groups = self.snapshot(), [{**group} for group in self.optimizer.param_groups]
        states, gradients = [self.optimizer.state.get(p) for p in self.params], [p.grad for p in self.params]
        try:
            yield now.theta
        finally:
            self._load(now)
            for p, state, gradient in zip(self.params, states, gradients, strict=True):
                p.grad = gradient
                if state is None:
                    self.optimizer.state.pop(p, None)
                else:
                    self.optimizer.state[p] = state
            for group, kept in zip(self.optimizer.param_groups, groups, strict=True):
                group.update(kept)

    def fill(self, stretch: Sequence[Kept], then: Sequence[Tensor]) -> None:
        """Give every step of ``stretch``, of which the first has its snapshot, what it started from and its gradients. For use
        inside `put_back`.

        Args:
            then: the parameters after the last one, as the training had them.

        Raises UserError where other parameters come out.
        """
        first = stretch[0].before
        assert first is not None
        self._load(first)
        for kept in stretch:
            if kept.before is None:
                kept.before = self.snapshot()
            self._step(kept)
        off = _distance(self.params, then)
        if not off <= self.tolerance:
            raise UserError(
                f"search.horizon: training steps that are repeated end in other parameters ({off:.1e} of their norm): the student "
                "or a loss keeps something outside of its buffers; set search.memory so that every step fits, or a shorter horizon"
            )

    def _step(self, kept: Kept) -> None:
        step = kept.step
        for p in self.params:
            p.grad = None
        for group, settings in zip(self.optimizer.param_groups, kept.groups, strict=True):
            group.update(settings)
        set_random_state(step.state)
        self.objective.at(step.number)
        done = self.objective.training_pass(
            step.batch, step.scale * step.weights if step.weighted is None else step.weighted
        )
        if done.loss.requires_grad:
            done.loss.backward()
        distributed.average_gradients(self.objective.trainable_parameters())
        kept.gradients, kept.teacher = self.gradients(), done.teacher
        if self.max_norm is not None:
            for clipped in self._clip_groups:
                torch.nn.utils.clip_grad_norm_(clipped, self.max_norm)
        self.optimizer.step()

    @torch.no_grad()
    def _load(self, snapshot: Snapshot) -> None:
        for p, value, state in zip(self.params, snapshot.theta, snapshot.states, strict=True):
            p.copy_(value)
            self.optimizer.state.pop(p, None)
            if state:
                self.optimizer.state[p] = {k: v.clone() for k, v in state.items()}
        snapshot.start.put_back()


@torch.no_grad()
def _distance(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Norm of the difference by the norm, of all tensors together."""
    squares = [(x - y).double().square().sum() for x, y in zip(found, wanted, strict=True)]
    norms = [y.double().square().sum() for y in wanted]
    return float((torch.stack(squares).sum() / torch.stack(norms).sum().clamp(min=1e-30)).sqrt())


@dataclass
class Room:
    """What a sweep keeps of training steps, in bytes, at most.

    Attributes:
        state: parameters with a gradient and two moments each, and buffers.
        batch: inputs and targets.
        taught: the teacher's tensors.
    """

    state: int
    batch: int
    taught: int

    @classmethod
    def of(cls, objective: Objective, batch_size: int, example: Batch) -> Room:
        """``example``: a batch of any number of samples."""
        buffers = (*objective.student.buffers(), *objective.terms.buffers())
        state = 4 * sum(map(_bytes, objective.trainable_parameters())) + sum(map(_bytes, buffers))
        read = {id(t): t for t in (*tensors_in(example.inputs), *tensors_in(example.target))}
        batch, taught = sum(map(_bytes, read.values())), sum(map(_bytes, objective.run_teacher(example).values()))
        return cls(state, batch * batch_size // example.samples, taught * batch_size // example.samples)

    def takes(self, steps: int, stretch: int) -> int:
        """Bytes for a window of ``steps`` in stretches."""
        each = self.state + self.batch + self.taught
        if stretch == 1:
            return steps * each
        return math.ceil(steps / stretch) * self.state + steps * self.batch + stretch * each

    def fit(self, steps: int, limit: float) -> tuple[int, int]:
        """The window, or as much of it as ``limit`` bytes hold, at least one step; and the shortest stretch with which it fits."""
        if self.takes(steps, 1) <= limit:
            return steps, 1
        fits = bisect_left(range(1, steps + 1), True, key=lambda n: self.takes(n, self._leanest(n)) > limit)
        if fits <= 1 or self.takes(fits, 1) <= limit:
            return max(1, int(limit / self.takes(1, 1))), 1
        return fits, next(k for k in range(2, fits + 1) if self.takes(fits, k) <= limit)

    def _leanest(self, steps: int) -> int:
        near = math.isqrt(max(1, steps * self.state // max(1, self.state + self.batch + self.taught)))
        return min(range(max(2, near), max(2, near) + 2), key=lambda k: self.takes(steps, k))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
