"""The hypergradient over a horizon, against autograd through all of its steps (`unrolled`) and against real trainings."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distpro.batch import batch_of
from distpro.search.estimators import ESTIMATORS
from distpro.search.estimators.differentiable import clip, differentiable_step
from distpro.search.relative import RelativeStep
from pathways.registry import UserError
from tests.search.test_hypergradient import OPTIMIZERS, Case, relative

STEPS = 12


class Horizon(Case):
    """The same pair with a training of twelve steps."""

    def __init__(self, name, **params):
        super().__init__(*OPTIMIZERS[name], **params)
        generator = torch.Generator().manual_seed(5)
        dtype = self.validation.inputs.dtype
        self.batches = [
            batch_of(
                torch.randn(8, 3, 8, 8, dtype=dtype, generator=generator), torch.randint(4, (8,), generator=generator)
            )
            for _ in range(STEPS)
        ]

    def estimate_all(self, name):
        self.restore()
        torch.manual_seed(7)
        estimator = ESTIMATORS.build(
            name, self.objective, self.optimizer, self.max_norm, self.clip_by, steps=len(self.batches)
        )
        for number, batch in enumerate(self.batches):
            step = self.step(batch, self.weights, estimator)
            step.number = number
        return estimator, estimator(step, [self.validation])


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_gradient_over_twelve_steps_is_exact(name):
    case = Horizon(name)
    assert relative(case.estimate_all("sweep")[1], case.estimate_all("unrolled")[1]) < 1e-8


@pytest.mark.slow
def test_dropout_draws_its_masks_again():
    case = Horizon("nesterov", dropout=0.5)
    assert relative(case.estimate_all("sweep")[1], case.estimate_all("unrolled")[1]) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nesterov, clipped by module", "adamw"])
def test_each_step_has_its_own_gradient(name):
    """By real trainings in which one weight is moved at one step alone."""
    case = Horizon(name, activation=nn.Tanh)
    case.batches = case.batches[:5]
    estimator, _ = case.estimate_all("sweep")

    def validation_loss(at, entry, epsilon):
        case.restore()
        torch.manual_seed(7)
        for number, batch in enumerate(case.batches):
            weights = case.weights.clone()
            weights[entry] += epsilon * (number == at)
            case.step(batch, weights)
        output, _ = case.objective.run_student(case.validation)
        return case.objective.task_loss_of(output, case.validation).item()

    for at, entry in ((0, 2), (1, 8), (4, 8)):
        difference = (validation_loss(at, entry, 1e-5) - validation_loss(at, entry, -1e-5)) / 2e-5
        assert estimator.per_step[at, entry].item() == pytest.approx(difference, rel=1e-5, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_step_is_the_one_step_search(name):
    case = Horizon(name)
    case.batches = case.batches[:1]
    _, h = case.estimate_all("sweep")
    case.restore()
    torch.manual_seed(7)
    forward = ESTIMATORS.build("forward_mode", case.objective, case.optimizer, case.max_norm, case.clip_by)
    step = case.step(case.batches[0], case.weights, forward)
    assert relative(forward(step, [case.validation]), h) < 1e-8


@pytest.mark.slow
def test_several_validation_batches_count_by_their_samples():
    case = Horizon("nesterov")
    case.batches = case.batches[:2]
    whole = case.validation
    parts = [batch_of(whole.inputs[:3], whole.target[:3]), batch_of(whole.inputs[3:], whole.target[3:])]
    found = []
    for validation in ([parts[0]], [parts[1]], parts):
        case.restore()
        estimator = ESTIMATORS.build("sweep", case.objective, case.optimizer, steps=2)
        for batch in case.batches:
            step = case.step(batch, case.weights, estimator)
        found.append(estimator(step, validation))
    assert torch.allclose(found[2], (3 * found[0] + 5 * found[1]) / 8, rtol=1e-9)


OWN = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1),
    "dampening": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.3, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OWN)
def test_the_steps_are_torchs_own(name):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    optimizer = OWN[name]([p])
    step = differentiable_step(optimizer)
    theta, state = p.detach().clone(), {}
    for number in range(4):
        p.grad = torch.randn_like(p)
        theta, after = step(theta, state, p.grad.clone(), optimizer.param_groups[0])
        optimizer.step()
        assert torch.allclose(theta, p, rtol=1e-12, atol=0)
        state = {**after, "step": torch.tensor(float(number + 1))} if "exp_avg" in after else after


def test_clipping_is_torchs_own():
    torch.manual_seed(0)
    params = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(4))]
    for p in params:
        p.grad = torch.randn_like(p)
    found = clip([p.grad.clone() for p in params] + [None], [[0, 2], [1, 3]], 0.5)
    nn.utils.clip_grad_norm_([params[0], params[2]], 0.5)
    nn.utils.clip_grad_norm_([params[1]], 0.5)
    assert all(torch.allclose(f, p.grad) for f, p in zip(found[:3], params, strict=True)) and found[3] is None


def test_unknown_optimisers_are_refused():
    p = [nn.Parameter(torch.zeros(1))]
    with pytest.raises(UserError, match="Adagrad"):
        differentiable_step(torch.optim.Adagrad(p))
    with pytest.raises(UserError, match="amsgrad"):
        differentiable_step(torch.optim.Adam(p, amsgrad=True))


def test_a_relative_step_has_the_size_that_it_is_given():
    """Whatever the gradient's unit; below the floor it is smaller, in proportion."""
    for factor, size in ((1.0, 0.5), (1e4, 0.5), (1e-3, 0.05)):
        p = torch.zeros(3, requires_grad=True)
        p.grad = factor * torch.tensor([1.0, -2.0, 0.0])
        RelativeStep([p], lr=0.5, momentum=0.0, floor=0.02).step()
        assert torch.allclose(p.detach(), torch.tensor([-0.5, 1.0, 0.0]) * size)


class Opaque(torch.autograd.Function):
    """tanh without a forward-mode rule."""

    @staticmethod
    def forward(ctx, x):
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y)


class Forgetful(Opaque):
    """tanh whose rule loses the tangent without a word."""

    @staticmethod
    def jvp(ctx, tangent):
        return torch.zeros_like(tangent)


@pytest.mark.slow
@pytest.mark.parametrize("function", [None, Opaque, Forgetful])
def test_the_product_is_taken_by_a_way_that_is_right(function):
    """Forward over reverse where it is; double backward where an operator has no tangent, or a wrong one."""

    class Activation(nn.Module):
        def forward(self, x):
            return function.apply(x)

    case = Horizon("nesterov", activation=nn.Tanh if function is None else Activation)
    case.batches = case.batches[:3]
    estimator, h = case.estimate_all("sweep")
    assert estimator.over_reverse is (function is None)
    assert relative(h, case.estimate_all("unrolled")[1]) < 1e-8
