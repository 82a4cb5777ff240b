"""Whether a loss has the derivative by its scalars that a search needs, found out before the first step.

A scalar x acts through the gradient: the search takes m = d/dx ⟨∂ℓ/∂f, c⟩, f what the term reads and its own parameters. A loss
that takes x as a plain number on the way (``float(x)``, a function of its own without that derivative) has 0 there without
a word, so m is compared with a difference of gradients, in float64 (in float32 where a loss has constants of its own in that).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from distpro.batch import Batch
from distpro.features import Features
from distpro.objective import Objective, entries_of
from distpro.search.estimators.swap import swapped
from distpro.search.estimators.tangents import dual_numbers
from distpro.search.learned import LearnedScalars
from distpro.train.state import no_trace, random_state, set_random_state

STEP = {torch.float64: 1e-4, torch.float32: 1e-2}
"""Of the difference, relative to the scalar, by the precision."""
AGREEMENT = 0.01
"""Relative difference of the two that may be rounding, or the difference's own error; what is lost is off by its share."""
NOTHING = 1e-6
"""Derivatives below this share of the gradient are none: a scalar may have no effect, as the weight of a level that a small map
does not have."""


def obstacles(objective: Objective, scalars: LearnedScalars, batch: Batch) -> tuple[list[str], bool]:
    """What is in the way of learning each scalar, in words, on a training batch; and whether forward over reverse sees
    their derivatives too, where double backward does. Leaves no trace in the models."""
    found, forward = [], True
    with no_trace(objective.student, objective.terms), torch.enable_grad():
        with torch.no_grad():
            read = objective.run_student(batch)[1], objective.run_teacher(replace(batch, index=None))
        for n, name in enumerate(scalars.names):
            if scalars.places[n] is None:  # the task's weight is a factor
                continue
            try:
                slope = _Slope(objective, scalars, n, *read, batch, torch.float64)
            except RuntimeError:
                slope = _Slope(objective, scalars, n, *read, batch, torch.float32)
            said, sees = slope.compare()
            found += [f"scalar '{name}' cannot be learned: {said}; state a number or a process"] if said else []
            forward = forward and sees
    return found, forward


class _Slope:
    """⟨∂ℓ/∂f, c⟩ of one scalar's term as a function of that scalar."""

    def __init__(
        self,
        objective: Objective,
        scalars: LearnedScalars,
        number: int,
        student: Features,
        teacher: Features,
        batch: Batch,
        dtype: torch.dtype,
    ):
        self.dtype = dtype
        self.objective, self.scalars, self.number, self.batch = objective, scalars, number, batch
        self.values = scalars.values().tolist()
        place = scalars.places[number]
        assert place is not None
        self.what = getattr(place[0].loss, "what", type(place[0].loss).__name__)
        self.term = place[0]
        self.active = [t is self.term for t in objective.terms for _ in entries_of(t)]
        self.names = [name for name, f in student.items() if f.is_floating_point()]
        self.student, self.teacher = ({name: self._as(f) for name, f in read.items()} for read in (student, teacher))
        self.own = [p for p in self.term.parameters() if p.requires_grad]
        self.at = [*(self.student[name] for name in self.names), *(self._as(p) for p in self.own)]
        self.state = random_state(objective.student)
        self.buffers = {b: self._as(b).clone() for b in self.term.buffers()}
        self._loss(self.at, self.values[number], self.buffers)  # a memory's normalisation is fixed in its first call
        generator = torch.Generator().manual_seed(0)
        self.along = [torch.randn(x.shape, generator=generator, dtype=dtype).to(x.device) for x in self.at]

    def compare(self) -> tuple[str, bool]:
        """What is wrong, in words, and whether forward over reverse is right."""
        x = torch.tensor(self.values[self.number], dtype=self.dtype, device=self.objective.device)
        step = STEP[self.dtype]
        above, below = (self._gradient(x * (1 + sign * step))[0] for sign in (1, -1))
        expected = ((above - below) / (2 * step * x)).item()
        size = self._gradient(x)[1].item() / x.item()

        def right(found: float) -> bool:
            return abs(found - expected) <= AGREEMENT * abs(expected) + NOTHING * size

        try:
            found = self._double_backward(x)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of a function that takes numbers only
            return f"{self.what} takes no tensor in its place ({str(error).splitlines()[0][:120]})", True
        if not right(found):
            return (
                f"{self.what} has no right derivative by it ({found:.3g}, and {expected:.3g} by a difference): is it made a "
                "plain number on the way?",
                True,
            )
        try:
            return "", right(self._forward_over_reverse(x))
        except (NotImplementedError, RuntimeError):
            return "", False

    def _gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The slope at a plain number, and how large it can be."""
        at = [f.detach().requires_grad_() for f in self.at]
        gradients = self._by(at, self._loss(at, x.item()), False)
        sizes = [g.norm() * c.norm() for g, c in zip(gradients, self.along, strict=True) if g is not None]
        return self._along(gradients), torch.stack(sizes).sum()

    def _double_backward(self, x: Tensor) -> float:
        at, leaf = [f.detach().requires_grad_() for f in self.at], x.detach().clone().requires_grad_()
        slope = self._along(self._by(at, self._loss(at, leaf), True))
        if not slope.requires_grad:
            return 0.0
        (found,) = torch.autograd.grad(slope, leaf, allow_unused=True)
        return 0.0 if found is None else found.item()

    def _forward_over_reverse(self, x: Tensor) -> float:
        with dual_numbers():
            at = [
                forward_ad.make_dual(f.detach().requires_grad_(), c) for f, c in zip(self.at, self.along, strict=True)
            ]
            leaf = x.detach().clone().requires_grad_()
            (found,) = torch.autograd.grad(self._loss(at, leaf), leaf, allow_unused=True)
            tangent = None if found is None else forward_ad.unpack_dual(found).tangent
            return 0.0 if tangent is None else tangent.item()

    def _loss(self, at: Sequence[Tensor], x: float | Tensor, buffers: dict[Tensor, Tensor] | None = None) -> Tensor:
        """ℓ with the scalar at ``x``; the same random numbers and buffers each time, or with ``buffers``, which it changes."""
        set_random_state(self.state)
        count = len(self.names)
        own = {b: kept.clone() for b, kept in self.buffers.items()} if buffers is None else dict(buffers)
        own |= dict(zip(self.own, at[count:], strict=True))
        own |= {p: self._as(p) for p in self.term.parameters() if not p.requires_grad}
        values: list[float | Tensor] = [*self.values]
        values[self.number] = x
        student = {**self.student, **dict(zip(self.names, at[:count], strict=True))}
        with swapped(self.term, own), self.scalars.held(values):
            losses = self.objective.term_losses(student, self.teacher, self.batch, self.active, autocast=False)
            return torch.stack([loss for loss in losses if loss is not None]).sum()

    @staticmethod
    def _by(at: Sequence[Tensor], loss: Tensor, create_graph: bool) -> Sequence[Tensor | None]:
        return torch.autograd.grad(loss, at, create_graph=create_graph, allow_unused=True)

    def _along(self, gradients: Sequence[Tensor | None]) -> Tensor:
        return torch.stack([(g * c).sum() for g, c in zip(gradients, self.along, strict=True) if g is not None]).sum()

    def _as(self, x: Tensor) -> Tensor:
        return x.detach().to(self.dtype) if x.is_floating_point() else x.detach()
