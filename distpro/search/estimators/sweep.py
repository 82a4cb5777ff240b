"""The exact hypergradient over a horizon of training steps, by a backward sweep through them.

A training is a chain of steps s_{t+1} = Φ_t(s_t, w(t)), s the parameters and the optimiser's state. The sweep goes back
through it (reverse mode; Maclaurin et al. 2015) with the adjoints a of the parameters and b of the optimiser's state.
Φ is the gradient g = ∇L_t(θ; w), then clipping and the optimiser's elementwise step, so that per step

    u, a', b'  = (∂(θ', s') / ∂(g, θ, s))ᵀ (a, b)       elementwise
    h_j(t)     = λ s_j ⟨∇ℓ_j(θ_t), u⟩                   the one-step search's inner product, with a better direction
    a          = a' + ∇²L_t(θ_t; w(t)) u                one exact Hessian-vector product

A number x beside the weights (the task's weight, a temperature) has h_x(t) = ⟨∂∇L_t/∂x, u⟩, of which h_j is the case in which
L_t is linear: all are one row, by the same product. (Kemaev et al. 2025 call this form mixed-mode.) With a horizon of one step it is the one-step search.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from distpro.batch import Batch
from distpro.objective import Objective
from distpro.search.estimators.base import ESTIMATORS, Estimator, TrainingStep
from distpro.search.estimators.differentiable import State, clip, differentiable_step
from distpro.search.estimators.formulas import Formulas
from distpro.search.estimators.replay import Kept, Replay, Snapshot
from distpro.search.estimators.start import Start
from distpro.search.estimators.swap import swapped
from distpro.search.estimators.tangents import dual_numbers
from distpro.train import distributed
from distpro.train.state import no_trace, set_random_state
from pathways.registry import UserError


@ESTIMATORS.register("sweep")
class Sweep(Estimator):
    """Exact derivative through the last ``steps`` training steps, see the module.

    The Hessian-vector product comes by forward over reverse: the backward pass's tangent along u, which gives the term
    losses' tangents too. Where the first step's is not what the derivative of the backward pass says (double backward; an
    operator may have no forward-mode rule, or lose the tangent without a word), that is taken from there on.

    Per step it keeps the parameters, the gradient, the optimiser's state, the buffers, the batch and the teacher's
    tensors; everything else is computed again, uncompiled and without autocast whatever the training does, attention in
    its plain form (the fused kernels have no second derivative). With a ``stretch`` of k steps only the first of every k is kept
    so, of the others the batch alone: the sweep does the k steps again, as the training did them, before it goes back
    through them. That costs the window's training once more, and with k = √N keeps 2 √N steps in the place of N.
    A run keeps checkpoints between windows only; one that is told to stop inside goes on from the window's beginning.

    Args:
        objective, optimizer, max_norm, clip_by: as of any `Estimator`.
        steps: N, the window.
        stretch: k; 1 keeps every step.

    Attributes:
        per_step: the last window's h of each step, (steps, N), with learned scalars (steps, N + S).
        over_reverse: whether the product comes by forward over reverse; None: not known yet.
        tolerance: largest relative difference of the two products that counts as rounding.

    Raises UserError for an optimiser whose step is not written out in `differentiable`.
    """

    name = "sweep"
    learns_scalars = True
    tolerance = 1e-3  # of float32; a lost tangent is off by its whole share

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        max_norm: float | None = None,
        clip_by: str = "all",
        steps: int = 12,
        stretch: int = 1,
    ):
        super().__init__(objective, optimizer, max_norm, clip_by)
        for name, value in (("steps", steps), ("stretch", stretch)):
            if value < 1:
                raise UserError(f"sweep: {name} must be at least 1, got {value}")
        self.window, self.stretch = steps, stretch
        self._replay = Replay(objective, optimizer, max_norm, clip_by)
        self.per_step = torch.zeros(0, 0)
        self._step_of = differentiable_step(optimizer)
        self._params = [(p, n) for n, group in enumerate(optimizer.param_groups) for p in group["params"]]
        place = {p: n for n, (p, _) in enumerate(self._params)}
        self._clip_groups = [[place[p] for p in group] for group in objective.clip_groups(clip_by)]
        self._max_norm = max_norm
        self.over_reverse: bool | None = None
        self._kept: list[Kept] = []

    def before_pass(self) -> None:
        self.start = Start(self.objective) if self._keeps_whole else None

    @property
    def _keeps_whole(self) -> bool:
        """Whether the next step is the first of a stretch."""
        return len(self._kept) % self.stretch == 0

    def before_step(self, step: TrainingStep) -> None:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        lean = replace(step.done, loss=step.done.task, output=None, views=[], teacher={})  # without the graph
        before = None
        if self._keeps_whole:
            start = self.start or Start(self.objective)
            before = Snapshot([step.theta[p] for p, _ in self._params], self._replay.states(), start)
        kept = Kept(replace(step, done=lean, theta={}), groups, before)
        if self.stretch == 1:
            kept.gradients, kept.teacher = self._replay.gradients(), step.done.teacher
        self._kept.append(kept)

    def __call__(self, step: TrainingStep, validation: Sequence[Batch]) -> Tensor:
        found: list[Tensor] = []
        with no_trace(self.objective.student, self.objective.terms), torch.enable_grad():
            with _plain(self.objective):
                v = self.validation_gradient(validation)
            a = [v[p] if p in v else torch.zeros_like(p) for p, _ in self._params]
            b: list[State] = [{} for _ in a]
            with ExitStack() as stack:
                then = stack.enter_context(self._replay.put_back()) if self.stretch > 1 else []
                while self._kept:
                    start = (len(self._kept) - 1) // self.stretch * self.stretch
                    stretch, self._kept = self._kept[start:], self._kept[:start]
                    if self.stretch > 1:
                        self._replay.fill(stretch, then)
                        then = stretch[0].before.theta  # type: ignore[union-attr]
                    with _plain(self.objective):
                        while stretch:
                            h, a, b = self._back(stretch.pop(), a, b)
                            found.append(h)
        self.objective.at(step.number)
        self.per_step = torch.stack(found[::-1])
        return self.per_step.sum(0)

    def _back(self, kept: Kept, a: list[Tensor], b: list[State]) -> tuple[Tensor, list[Tensor], list[State]]:
        """From the adjoints after a step to h of the step and the adjoints before it."""
        assert kept.before is not None and kept.gradients is not None
        theta = kept.before.theta
        u, a, b = self._through_step(kept, [t.clone() for t in theta], kept.gradients, a, b)
        if self.over_reverse is None:
            self.over_reverse = not distributed.any_of(not self._agree(kept, theta, u))
        product, h = (self._forward_over_reverse if self.over_reverse else self._double_backward)(kept, theta, u)
        averaged = distributed.average_where_any(product, theta)
        return h, [x if s is None else x + s for x, s in zip(a, averaged, strict=True)], b

    def _agree(self, kept: Kept, theta: list[Tensor], u: list[Tensor | None]) -> bool:
        """Whether both ways to the Hessian-vector product give the same for a step."""
        truth = _joined(*self._double_backward(kept, theta, u))
        try:
            found = _joined(*self._forward_over_reverse(kept, theta, u))
        except (NotImplementedError, RuntimeError):
            return False
        return found.shape == truth.shape and bool((found - truth).norm() <= self.tolerance * truth.norm())

    def _double_backward(
        self, kept: Kept, theta: list[Tensor], u: list[Tensor | None]
    ) -> tuple[list[Tensor | None], Tensor]:
        """∇²L u by parameter and h, as the derivative of ⟨∇L, u⟩."""
        leaves = [t.detach().requires_grad_() for t in theta]
        row = _row(kept.step)
        with self._again(kept, leaves, row) as loss:
            gradients = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            pull = [(g * x).sum() for g, x in zip(gradients, u, strict=True) if g is not None and x is not None]
            found: list[Tensor | None] = list(
                torch.autograd.grad(torch.stack(pull).sum(), [*leaves, row], allow_unused=True)
            )
        return found[:-1], _or_zero(found[-1], row)

    def _forward_over_reverse(
        self, kept: Kept, theta: list[Tensor], u: list[Tensor | None]
    ) -> tuple[list[Tensor | None], Tensor]:
        """The same as the tangents, along u, of the gradients by θ and by the row (by w: of λ s ℓ)."""
        with dual_numbers():
            leaves = [
                t.detach().requires_grad_() if x is None else forward_ad.make_dual(t.detach().requires_grad_(), x)
                for t, x in zip(theta, u, strict=True)
            ]
            row = _row(kept.step)
            with self._again(kept, leaves, row) as loss:
                gradients = torch.autograd.grad(loss, [*leaves, row], allow_unused=True)
            tangents = [None if g is None else forward_ad.unpack_dual(g).tangent for g in gradients]
            *product, h = [None if t is None else t.detach().clone() for t in tangents]
            return product, _or_zero(h, row)

    @contextmanager
    def _again(self, kept: Kept, theta: list[Tensor], row: Tensor) -> Iterator[Tensor]:
        """The step's loss with other tensors in the place of the parameters, w and scalars; the same random numbers and
        buffers. The tensors stay there inside: activation checkpointing runs the student again in the backward pass."""
        step = kept.step
        weights, scalars = row[: len(step.weights)], row[len(step.weights) :]
        assert kept.before is not None
        kept.before.start.put_back()
        set_random_state(step.state)
        self.objective.at(step.number)
        held = nullcontext() if self.scalars is None else self.scalars.held(scalars.unbind())
        with held, swapped(self.objective, dict(zip([p for p, _ in self._params], theta, strict=True))):
            taught = kept.teacher or None
            yield self.objective.training_pass(step.batch, step.scale * weights, teacher=taught).loss

    def _through_step(
        self, kept: Kept, theta: Sequence[Tensor], gradients: Sequence[Tensor | None], a: list[Tensor], b: list[State]
    ) -> tuple[list[Tensor | None], list[Tensor], list[State]]:
        """The transposed derivative of clipping and the optimiser's step: adjoints of the gradient, θ and the state."""
        leaves = [t.requires_grad_() for t in theta]
        g = [None if x is None else x.detach().requires_grad_() for x in gradients]
        clipped = list(g) if self._max_norm is None else clip(g, self._clip_groups, self._max_norm)
        inputs, outputs, adjoints = [], [], []
        states = []
        for n, (_, group) in enumerate(self._params):
            before = kept.before.states[n]  # type: ignore[union-attr]
            state = {k: v if k == "step" else v.detach().requires_grad_() for k, v in before.items()}
            states.append(state)
            if g[n] is None:
                continue
            inputs += [g[n], leaves[n], *(v for k, v in state.items() if k != "step")]
            after, state_after = self._step_of(leaves[n], state, clipped[n], kept.groups[group])
            outputs.append(after)
            adjoints.append(a[n])
            for name, value in state_after.items():
                if name in b[n]:
                    outputs.append(value)
                    adjoints.append(b[n][name])
        found = iter(torch.autograd.grad(outputs, inputs, adjoints, allow_unused=True))  # type: ignore[arg-type]
        u: list[Tensor | None] = []
        for n, state in enumerate(states):
            if g[n] is None:  # the optimiser has left it and its state alone
                u.append(None)
                continue
            u.append(next(found))
            a[n] = _or_zero(next(found), leaves[n])
            b[n] = {k: _or_zero(next(found), v) for k, v in state.items() if k != "step"}
        return u, a, b


def _row(step: TrainingStep) -> Tensor:
    """What a step's loss is differentiated by beside the parameters, as a leaf: w, then the learned scalars."""
    row = step.weights if step.scalars is None else torch.cat([step.weights, step.scalars])
    return row.detach().clone().requires_grad_()


def _joined(product: list[Tensor | None], h: Tensor) -> Tensor:
    return torch.cat([h.flatten(), *(t.flatten() for t in product if t is not None)])


def _or_zero(x: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if x is None else x


@contextmanager
def _plain(objective: Objective) -> Iterator[None]:
    """The objective without autocast, uncompiled (compiled code has neither second derivatives nor tangents), attention without
    its fused kernels, and with formulas for operators that have no derivative."""
    precision, objective.precision = objective.precision, None
    uncompiled = nullcontext() if objective.backend is None else torch.compiler.set_stance("force_eager")
    try:
        with uncompiled, Formulas(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        objective.precision = precision
