"""Hypergradients: how the validation loss after a training step depends on the weights of the terms (Eq. 4 and 5).

Every estimator answers h_p = ∂L_val(θ_{t+1}) / ∂w_p for the step θ_t → θ_{t+1} that the training has really taken.
That step is θ_{t+1} = θ_t − U(g_t), with g_t = ∇L_task + λ Σ_p w_p ∇ℓ_p, so

    h_p = λ ⟨∇ℓ_p(θ_t), u⟩,      u = (∂θ_{t+1}/∂g_t)ᵀ ∇L_val(θ_{t+1}),

and u is elementwise for the optimisers here (`StepDerivative`), with a rank-one part from gradient clipping.
All passes use batch statistics as training does, and leave buffers and the random state as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distpro import distributed
from distpro.batch import Batch
from distpro.objective import Evaluation, Objective, entries_of
from distpro.tangents import forward_mode
from pathways.registry import Registry, UserError
from pathways.taps import LOGITS

ESTIMATORS = Registry("hypergradient estimator")


@contextmanager
def no_trace(*modules: nn.Module) -> Iterator[None]:
    """Passes inside leave no trace in buffers (BatchNorm statistics) or in the random state."""
    buffers = [b for m in modules for b in m.buffers()]
    copies = [b.clone() for b in buffers]
    state = random_state(modules[0])
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, copy in zip(buffers, copies, strict=True):
                buffer.copy_(copy)
        set_random_state(state)


def random_state(module: nn.Module) -> dict[str, Tensor]:
    """State of the random generators that a pass of ``module`` may use."""
    device = next(module.parameters()).device
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Back to a state from `random_state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


class StepDerivative:
    """The derivative of an optimiser's step by the gradient, transposed and applied to a vector.

    SGD: −lr, × (1 − dampening) once the momentum buffer exists, × (1 + momentum) with Nesterov. Heavy-ball momentum and
    weight decay add nothing. Adam and AdamW: the update is differentiated elementwise. `clip_grad_norm_` of each of
    ``groups`` (None: of all parameters together) to ``max_norm`` contributes its factor and the dependence of that
    factor on every gradient of the group.

    Call `before_step` after the backward pass and before clipping; call the object after ``optimizer.step()`` while
    ``.grad`` still holds the (clipped) gradients.

    Raises UserError for other optimisers and for options whose derivative is not known here (amsgrad, maximize).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        max_norm: float | None = None,
        groups: Sequence[Sequence[nn.Parameter]] | None = None,
    ):
        self.optimizer, self.max_norm = optimizer, max_norm
        self.groups = groups or [[p for group in optimizer.param_groups for p in group["params"]]]
        kinds = {torch.optim.SGD: self._sgd, torch.optim.Adam: self._adam, torch.optim.AdamW: self._adam}
        if type(optimizer) not in kinds:
            raise UserError(
                f"hypergradient: the step of {type(optimizer).__name__} has no known derivative (allowed: SGD, Adam, AdamW)"
            )
        for group in optimizer.param_groups:
            if group.get("maximize") or group.get("amsgrad"):
                raise UserError("hypergradient: maximize and amsgrad are not supported")
        self._factor: Callable[..., Any] = kinds[type(optimizer)]
        self._norms: list[Tensor] = []
        self._first: set[Tensor] = set()
        self._moments: dict[nn.Parameter, tuple[Tensor, ...]] = {}

    def before_step(self) -> None:
        """Note what the step will overwrite: the gradient norm, and which momentum buffers are new."""
        params = [p for g in self.optimizer.param_groups for p in g["params"] if p.grad is not None]
        states = {p: self.optimizer.state[p] for p in params}
        self._first = {p for p, state in states.items() if state.get("momentum_buffer") is None}
        self._moments = {
            p: tuple(
                state[name].clone() if name in state else torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")
            )
            for p, state in states.items()
            if self._factor == self._adam
        }
        if self.max_norm is not None:
            gradients = [[p.grad for p in group if p.grad is not None] for group in self.groups]
            self._norms = [torch.nn.utils.get_total_norm(g) for g in gradients]

    def __call__(
        self, vector: dict[nn.Parameter, Tensor], theta: dict[nn.Parameter, Tensor]
    ) -> dict[nn.Parameter, Tensor]:
        """u = (∂θ_{t+1}/∂g)ᵀ · vector; ``theta`` are the parameters before the step. Entries that are zero are absent."""
        with torch.no_grad():
            result = {
                p: self._factor(p, group, theta) * vector[p]
                for group in self.optimizer.param_groups
                for p in group["params"]
                if p.grad is not None and p in vector
            }
            if self.max_norm is None:
                return result
            clipped = [self._through_clipping(result, *pair) for pair in zip(self.groups, self._norms, strict=True)]
            return {p: u for group in clipped for p, u in group.items()}

    def _sgd(self, p: nn.Parameter, group: dict[str, Any], theta: Any) -> float:
        factor = -float(group["lr"])
        if group["momentum"]:
            if group["nesterov"]:
                factor *= 1 + group["momentum"]
            elif p not in self._first:
                factor *= 1 - group["dampening"]
        return factor

    def _adam(self, p: nn.Parameter, group: dict[str, Any], theta: dict[nn.Parameter, Tensor]) -> Tensor:
        state, (beta1, beta2) = self.optimizer.state[p], group["betas"]
        gradient = p.grad
        assert gradient is not None
        if group["weight_decay"] and not group["decoupled_weight_decay"]:
            gradient = gradient + group["weight_decay"] * theta[p]
        # With m = β1 m0 + (1-β1) g, v = β2 v0 + (1-β2) g², D = √v/c + ε, c = √(1-β2ᵗ), the derivative of m/D by g is
        # [(1-β1) ε + ((1-β1) β2 v0 - (1-β2) β1 m0 g) / (c √v)] / D²: written so, because dm/D and m·dD/D² cancel.
        mean, square = self._moments[p]
        step = torch.as_tensor(state["step"], dtype=torch.float64)  # stored in float32, too short for 1-β2ᵗ
        c = (1 - beta2**step).sqrt().to(p.dtype)
        root = state["exp_avg_sq"].sqrt()
        denominator = root / c + group["eps"]
        rest = ((1 - beta1) * beta2 * square - (1 - beta2) * beta1 * mean * gradient) / (c * root)
        numerator = (1 - beta1) * group["eps"] + torch.where(root > 0, rest, 0)
        return (-group["lr"] / (1 - beta1**step)).to(p.dtype) * numerator / denominator.square()

    def _through_clipping(
        self, u: dict[nn.Parameter, Tensor], group: Sequence[nn.Parameter], norm: Tensor
    ) -> dict[nn.Parameter, Tensor]:
        # clip_grad_norm_ multiplies g by s = min(1, c / (n + 1e-6)), n = ‖g‖. The transposed Jacobian is
        # s·u − [s < 1] · c / (n + 1e-6)² / n · ⟨g, u⟩ · g, and it reaches parameters outside the vector too.
        assert self.max_norm is not None
        params = [p for p in group if p.grad is not None]
        along = [(p.grad * u[p]).sum() for p in params if p in u]  # type: ignore[operator]
        if not along:
            return {}
        shifted, s = norm + 1e-6, self._clip_factor(norm)
        slope = torch.where(s < 1, self.max_norm / shifted.square() / norm * torch.stack(along).sum() / s, 0.0)
        return {p: s * u.get(p, torch.zeros_like(p)) - slope / s * p.grad for p in params}  # type: ignore[operator]

    def _clip_factor(self, norm: Tensor) -> Tensor:
        assert self.max_norm is not None
        return (self.max_norm / (norm + 1e-6)).clamp(max=1.0)

    def clip_factors(self) -> dict[nn.Parameter, Tensor]:
        """By parameter, the factor by which clipping has shrunk its gradient in this step; empty without clipping."""
        return {
            p: self._clip_factor(norm) for group, norm in zip(self.groups, self._norms, strict=False) for p in group
        }


@dataclass
class TrainingStep:
    """One training step as an estimator has to know it.

    Attributes:
        batch: what was trained on.
        weights: w, (N,), without λ.
        scale: λ, or (N,) the factor on each entry of w.
        theta: trainable parameters before the step.
        state: random state before the forward pass.
        evaluation: the forward pass, backward done.
    """

    batch: Batch
    weights: Tensor
    scale: float | Tensor
    theta: dict[nn.Parameter, Tensor]
    state: dict[str, Tensor]
    evaluation: Evaluation


class Estimator:
    """Common part: the objective, the optimiser, and the gradient of the validation loss.

    Attributes:
        needs_views: whether the training backward has to keep every term's gradient by its inputs.
        window: training steps that one hypergradient looks at.
    """

    needs_views = False
    window = 1

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        max_norm: float | None = None,
        clip_by: str = "all",
    ):
        self.objective, self.optimizer = objective, optimizer
        self.derivative = StepDerivative(optimizer, max_norm, objective.clip_groups(clip_by))
        self.validation_loss = torch.zeros(())

    def before_step(self, step: TrainingStep) -> None:
        """After the backward pass of a step that counts, before clipping and ``optimizer.step()``."""
        self.derivative.before_step()

    def __call__(self, step: TrainingStep, validation: Batch) -> Tensor:
        """h = ∂L_val/∂w, (N,), after ``optimizer.step()``."""
        raise NotImplementedError

    def direction(self, step: TrainingStep, validation: Batch) -> dict[nn.Parameter, Tensor]:
        """u = (∂θ_{t+1}/∂g)ᵀ ∇L_val(θ_{t+1}). One forward and one backward pass of the student."""
        params = [p for p in self.objective.student.parameters() if p.requires_grad]
        with no_trace(self.objective.student):
            output, _ = self.objective.study(validation.x)
            loss = self.objective.task_loss_of(output, validation.y)
            gradients = torch.autograd.grad(loss, params, allow_unused=True)
        self.validation_loss = loss.detach()
        v = {p: g for p, g in zip(params, gradients, strict=True) if g is not None}
        distributed.average(v.values())
        return self.derivative(v, step.theta)


@ESTIMATORS.register("forward_mode")
class ForwardMode(Estimator):
    """Exact directional derivative, without ε: h_p = ⟨∂(λℓ_p)/∂f, ḟ⟩ summed over the features f that term p reads.

    The training backward has already computed λ w_p ∂ℓ_p/∂f (`Evaluation.views`), so one forward-mode pass of the
    student alone along u gives the tangents ḟ and with them every h_p. Parameters of a term's own (transforms) come in
    only where clipping gives u a part along them; their gradient is theirs alone and known too.

    A term of weight zero has no signal: its h_p is 0.

    Args:
        precision: ``float32`` or ``bfloat16`` for the forward-mode pass; None is the training's own precision. In
            bfloat16 h differs by 2.5 % (median), where another validation batch moves it by 114 % (docs/performance.md).
    """

    needs_views = True

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        max_norm: float | None = None,
        clip_by: str = "all",
        precision: str | None = None,
    ):
        super().__init__(objective, optimizer, max_norm, clip_by)
        allowed = {None: objective.precision, "float32": None, "bfloat16": torch.bfloat16}
        if precision not in allowed:
            raise UserError(f"forward_mode: precision is '{precision}' (allowed: float32, bfloat16)")
        self.precision = allowed[precision]

    def __call__(self, step: TrainingStep, validation: Batch) -> Tensor:
        u = self.direction(step, validation)
        tangents = self.feature_tangents(step, u)
        clipped = self.derivative.clip_factors()
        result = []
        for term, views in zip(self.objective.terms, step.evaluation.views, strict=True):
            if len(entries_of(term)) > 1:
                raise UserError(f"forward_mode: term '{term.key}' has several weights; use finite_difference")
            parts = [_inner(v.grad, tangents[tap]) for tap, v in views.items() if v.grad is not None]
            if clipped:
                parts += [_inner(p.grad, u[p]) / clipped[p] for p in term.parameters() if p in u and p.grad is not None]
            result.append(sum(parts) if parts else step.weights.new_zeros(()))
        h = torch.stack(result).to(step.weights.dtype)  # type: ignore[arg-type]
        return torch.where(step.weights != 0, h / step.weights, torch.zeros_like(h))

    def feature_tangents(self, step: TrainingStep, u: dict[nn.Parameter, Tensor]) -> dict[str, Tensor]:
        """ḟ of the student's taps and output along u at θ_t: one forward-mode pass on the training batch."""
        student = self.objective.student
        now = random_state(student)
        set_random_state(step.state)
        output, features = forward_mode(
            student,
            {name: step.theta.get(p, p) for name, p in student.named_parameters()},
            {name: u[p] for name, p in student.named_parameters() if p in u},
            step.batch.x,
            self.precision,
        )
        set_random_state(now)
        return {name: tangent.to(step.weights.dtype) for name, tangent in {**features, LOGITS: output}.items()}


def _inner(a: Tensor, b: Tensor) -> Tensor:
    # In the order in which ``a`` lies in memory, so that channels_last features are not copied to be flattened.
    order = sorted(range(a.dim()), key=a.stride, reverse=True)
    return torch.dot(a.permute(order).reshape(-1).to(b.dtype), b.permute(order).reshape(-1))


@ESTIMATORS.register("finite_difference")
class FiniteDifference(Estimator):
    """Central difference of the vector of term losses along u (Eq. 5): two more passes of student and terms.

    h_p = λ [ℓ_p(θ_t + εu) − ℓ_p(θ_t − εu)] / 2ε with ε = ``epsilon`` / ‖u‖, 0.01 as in DARTS (u is −ξ∇L_val for plain
    SGD, so this is the paper's perturbation). The passes run in full precision: under bf16 the difference is noise.
    A term of weight zero is not computed: its h_p is 0.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        max_norm: float | None = None,
        clip_by: str = "all",
        epsilon: float = 0.01,
    ):
        super().__init__(objective, optimizer, max_norm, clip_by)
        if epsilon <= 0:
            raise UserError(f"finite_difference: epsilon must be positive, got {epsilon}")
        self.epsilon = epsilon

    @torch.no_grad()
    def __call__(self, step: TrainingStep, validation: Batch) -> Tensor:
        with torch.enable_grad():
            u = self.direction(step, validation)
        norm = torch.nn.utils.get_total_norm(list(u.values()))
        epsilon = self.epsilon / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        after = {p: p.detach().clone() for p in step.theta}
        try:
            plus, minus = (self._losses(step, {p: epsilon * sign * d for p, d in u.items()}) for sign in (1, -1))
        finally:
            _assign(after)
        return step.scale * (plus - minus) / (2 * epsilon)

    def _losses(self, step: TrainingStep, shift: dict[nn.Parameter, Tensor]) -> Tensor:
        _assign({p: value + shift[p] if p in shift else value for p, value in step.theta.items()})
        with no_trace(self.objective.student, self.objective.terms):
            set_random_state(step.state)
            _, features = self.objective.study(step.batch.x, autocast=False)
            teacher = {name: f.to(step.batch.x.dtype) for name, f in step.evaluation.teacher.items()}
            losses = self.objective.term_losses(
                features, teacher, step.batch.y, step.batch.index, (step.weights != 0).tolist(), autocast=False
            )
        zero = step.weights.new_zeros(())
        return torch.stack([zero if value is None else value.to(zero.dtype) for value in losses])


def _assign(values: dict[nn.Parameter, Tensor]) -> None:
    torch._foreach_copy_([p.data for p in values], list(values.values()))


@ESTIMATORS.register("unrolled")
def _unrolled(*args: Any, **params: Any) -> Estimator:
    from distpro.unrolled import Unrolled  # imports `higher`, which the other estimators do not need

    return Unrolled(*args, **params)
