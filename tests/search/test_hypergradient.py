"""Hypergradients against float64 autograd through the actual update, against the field's tools, and against each other."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distpro.batch import batch_of
from distpro.objective import Objective, Term
from distpro.search.estimators.base import ESTIMATORS, TrainingStep
from distpro.search.estimators.step import StepDerivative
from distpro.train.state import no_trace, random_state
from pathways import UserError, build_pathways


def grouped(params):
    """Every other parameter without weight decay, at a rate of its own."""
    params = list(params)
    return [{"params": params[1::2]}, {"params": params[::2], "lr": 0.004, "weight_decay": 0.0}]


OPTIMIZERS = {
    "sgd": (lambda p: torch.optim.SGD(p, 0.1), None),
    "momentum and weight decay": (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=5e-4), None),
    "nesterov": (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4), None),
    "dampening": (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.3), None),
    "nesterov, clipped": (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True), 1.0),
    "nesterov, clipped by module": (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True), 0.4, "module"),
    "clipping that does not bite": (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), 1e3),
    "adam": (lambda p: torch.optim.Adam(p, 1e-2, eps=1e-3, weight_decay=0.1), None),
    "adamw": (lambda p: torch.optim.AdamW(p, 1e-2, eps=1e-3, weight_decay=0.1), None),
    "groups": (lambda p: torch.optim.SGD(grouped(p), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-2), 1.0),
    "adamw, clipped": (lambda p: torch.optim.AdamW(p, 1e-2, eps=1e-3), 0.7),
    "adamw, clipped by module": (lambda p: torch.optim.AdamW(p, 1e-2, eps=1e-3), 0.4, "module"),
    "fused": (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True), None),
}


def network(seed: int, activation: type[nn.Module] = nn.ReLU, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        activation(),
        nn.Dropout(dropout),
        nn.Conv2d(6, 8, 3, padding=1, stride=2),
        nn.BatchNorm2d(8),
        activation(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


class Case:
    """A small BatchNorm pair with 8 pathways and a logit term, some steps into its training."""

    def __init__(
        self,
        make_optimizer,
        max_norm=None,
        clip_by="all",
        dtype=torch.float64,
        steps_before=2,
        activation=nn.ReLU,
        dropout=0.0,
    ):
        teacher, student = network(0).to(dtype).eval(), network(1, activation, dropout).to(dtype)
        self.batches = [
            batch_of(torch.randn(8, 3, 8, 8, dtype=dtype), torch.randint(4, (8,))) for _ in range(steps_before + 5)
        ]
        space = build_pathways(
            teacher, student, self.batches[0].inputs, ["2", "6"], ["2", "6"], transforms=["conv1x1", "attention"]
        )
        terms = [*space, Term(Similarity(), "similarity")]
        self.objective = Objective(teacher, student, [t.to(dtype) for t in terms])
        self.params = self.objective.trainable_parameters()
        self.optimizer = make_optimizer(self.params)
        self.max_norm, self.clip_by = max_norm, clip_by
        self.weights = torch.rand(9, dtype=dtype) + 0.1
        self.scale = 2.0
        self.validation = self.batches.pop()
        for _ in range(steps_before):
            self.step(self.batches.pop(), self.weights)
        self.start = copy.deepcopy((self.objective.state_dict(), self.optimizer.state_dict()))

    def restore(self):
        self.objective.load_state_dict(self.start[0])
        self.optimizer.load_state_dict(copy.deepcopy(self.start[1]))

    def step(self, batch, weights, estimator=None, capture=False):
        self.optimizer.zero_grad()
        state = random_state(self.objective.student)
        if estimator is not None:
            estimator.before_pass()
        capture = capture or (estimator is not None and estimator.needs_views)
        done = self.objective.training_pass(batch, self.scale * weights, capture)
        done.loss.backward()
        theta = {p: p.detach().clone() for p in self.params}
        step = TrainingStep(batch, weights, self.scale, theta, state, done)
        if estimator is not None:
            estimator.before_step(step)
        if self.max_norm is not None:
            modules = [self.objective.student, *self.objective.terms] if self.clip_by == "module" else [self.objective]
            for module in modules:
                nn.utils.clip_grad_norm_([p for p in module.parameters() if p.grad is not None], self.max_norm)
        self.optimizer.step()
        return step

    def estimate(self, name, steps=1, **params):
        self.restore()
        estimator = ESTIMATORS.build(name, self.objective, self.optimizer, self.max_norm, self.clip_by, **params)
        for batch in self.batches[:steps]:
            last = self.step(batch, self.weights, estimator)
        return estimator(last, [self.validation])

    def validation_loss(self, weights, steps=1):
        """L_val after real steps with these weights: the function whose gradient is asked for."""
        self.restore()
        torch.manual_seed(7)
        for batch in self.batches[:steps]:
            self.step(batch, weights)
        with no_trace(self.objective.student):
            return self.objective.task_loss_of(self.objective.run_student(self.validation)[0], self.validation).item()

    def differences(self, steps=1, epsilon=1e-5):
        """Central differences of `validation_loss` by each weight."""
        unit = torch.eye(len(self.weights), dtype=self.weights.dtype) * epsilon
        rows = [
            (self.validation_loss(self.weights + e, steps) - self.validation_loss(self.weights - e, steps))
            / (2 * epsilon)
            for e in unit
        ]
        return torch.tensor(rows, dtype=self.weights.dtype)


class Similarity(nn.Module):
    """A relation-based term on logits, smooth."""

    def forward(self, student, teacher, target=None, index=None):
        return F.mse_loss(F.normalize(student @ student.T), F.normalize(teacher @ teacher.T))


def relative(found, truth):
    return ((found - truth).norm() / truth.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_forward_mode_is_exact(name, steps_before):
    """Against autograd through the whole update (`unrolled`), scale included; and that against brute force."""
    case = Case(*OPTIMIZERS[name], steps_before=steps_before)
    truth = case.estimate("unrolled")
    assert relative(case.estimate("forward_mode"), truth) < 1e-8
    assert relative(case.differences(), truth) < 1e-6


def test_adam_with_its_default_eps_is_exact():
    """After some steps only: Adam's first step is −lr·sign(g) but for eps, and autograd itself loses it to rounding."""
    case = Case(lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1))
    assert relative(case.estimate("forward_mode"), case.estimate("unrolled")) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nesterov, clipped", "nesterov, clipped by module"])
def test_unrolled_over_several_steps_is_exact(name):
    case = Case(*OPTIMIZERS[name])
    assert relative(case.estimate("unrolled", steps=3), case.differences(steps=3)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("epsilon", "bound"), [(1e-2, 0.15), (1e-3, 0.03)])
def test_finite_difference_error_is_that_of_relu_kinks(epsilon, bound):
    """Eq. 5 on a ReLU network: percents, as documented; on a smooth one it converges like ε²."""
    errors = []
    for _ in range(5):
        case = Case(*OPTIMIZERS["nesterov"])
        errors.append(relative(case.estimate("finite_difference", epsilon=epsilon), case.estimate("forward_mode")))
    assert sum(errors) / len(errors) < bound


def test_finite_difference_converges_on_a_smooth_network():
    case = Case(*OPTIMIZERS["nesterov"], activation=nn.Tanh)
    truth = case.estimate("forward_mode")
    coarse, fine = (relative(case.estimate("finite_difference", epsilon=e), truth) for e in (1e-2, 1e-3))
    assert fine < 1e-4
    assert coarse / fine > 50


def test_float32_forward_mode_keeps_float32_accuracy():
    torch.manual_seed(3)
    case = Case(*OPTIMIZERS["nesterov"], dtype=torch.float32)
    assert relative(case.estimate("forward_mode"), case.estimate("unrolled")) < 1e-4


def test_dropout_uses_the_same_masks_in_the_tangent_pass():
    case = Case(*OPTIMIZERS["nesterov"], dropout=0.5)
    torch.manual_seed(7)
    forward = case.estimate("forward_mode")
    torch.manual_seed(7)
    assert relative(forward, case.estimate("unrolled")) < 1e-8


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimate_leaves_no_trace(name):
    """Parameters, buffers, gradients, optimiser state and random state are those of a plain training step."""
    case = Case(*OPTIMIZERS["nesterov"], dropout=0.3)
    results = []
    for estimator in (None, name):
        case.restore()
        torch.manual_seed(11)
        built = ESTIMATORS.build(estimator, case.objective, case.optimizer) if estimator else None
        capture = ESTIMATORS.build(name, case.objective, case.optimizer).needs_views  # it fixes the order of sums
        step = case.step(case.batches[0], case.weights, built, capture)
        if built is not None:
            built(step, [case.validation])
        results.append(
            copy.deepcopy(
                (
                    case.objective.state_dict(),
                    case.optimizer.state_dict()["state"],
                    [p.grad for p in case.params],
                    torch.get_rng_state(),
                )
            )
        )
    plain, probed = results
    for key, value in plain[0].items():
        assert torch.equal(value, probed[0][key]), key
    for number, state in plain[1].items():
        assert torch.equal(state["momentum_buffer"], probed[1][number]["momentum_buffer"])
    assert all(torch.equal(a, b) for a, b in zip(plain[2], probed[2], strict=True))
    assert torch.equal(plain[3], probed[3])
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in case.objective.modules()]
    assert not any(hooks)


def test_unknown_optimisers_and_options_are_refused():
    p = [nn.Parameter(torch.zeros(1))]
    with pytest.raises(UserError, match="Adagrad"):
        StepDerivative(torch.optim.Adagrad(p))
    with pytest.raises(UserError, match="amsgrad"):
        StepDerivative(torch.optim.AdamW(p, amsgrad=True))


class GoldenNet(nn.Module):
    """The network of the golden files: Linear 6-8-8-4 with tanh."""

    def __init__(self):
        super().__init__()
        self.l1, self.l2, self.l3 = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.h1, self.h2 = nn.Tanh(), nn.Tanh()

    def forward(self, x):
        return self.l3(self.h2(self.l2(self.h1(self.l1(x)))))


class GoldenTeacher(nn.Module):
    """Gives the stored teacher features."""

    def __init__(self, t1, t2):
        super().__init__()
        self.t1, self.t2 = nn.Identity(), nn.Identity()
        self.register_buffer("first", t1)
        self.register_buffer("second", t2)

    def forward(self, x):
        return self.t1(self.first) + self.t2(self.second)


class GoldenPath(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 5)

    def forward(self, student, teacher, target=None, index=None):
        return F.mse_loss(self.linear(student), teacher)


@pytest.mark.parametrize("name", ["sgd", "momentum", "nesterov"])
@pytest.mark.parametrize("estimator", ["forward_mode", "unrolled", "finite_difference"])
def test_golden_hypergradients(name, estimator, golden_folder):
    """dL_val(θ_{t+1})/dα̃ as `higher` gives it (exact) and as DARTS's finite differences do."""
    from distpro.search.weighting import BiasedSoftmax

    file = np.load(golden_folder / f"hypergrad_{name}.npz")
    arrays = {k: torch.from_numpy(np.asarray(v)) for k, v in file.items()}
    arrays = {k: v.double() if v.is_floating_point() else v for k, v in arrays.items()}
    student = GoldenNet().double()
    student.load_state_dict({k: arrays[f"param.{k}"] for k in student.state_dict()})
    places = [("t1", "h1"), ("t1", "h2"), ("t2", "h1"), ("t2", "h2")]
    terms = []
    for n, (teacher_tap, student_tap) in enumerate(places):
        path = GoldenPath().double()
        path.linear.load_state_dict({k: arrays[f"param.paths.{n}.{k}"] for k in ("weight", "bias")})
        terms.append(Term(path, f"path{n}", [student_tap], [teacher_tap]))
    objective = Objective(GoldenTeacher(arrays["t1"], arrays["t2"]).double(), student, terms)
    settings = {"sgd": {}, "momentum": {"momentum": 0.9, "weight_decay": 5e-4}}
    settings["nesterov"] = {**settings["momentum"], "nesterov": True}
    optimizer = torch.optim.SGD(objective.trainable_parameters(), lr=0.1, **settings[name])
    names = {p: n for n, p in student.named_parameters()}
    for n, term in enumerate(objective.terms):
        names |= {p: f"paths.{n}.{k}" for k, p in term.loss.linear.named_parameters()}
    if name != "sgd":
        for p in objective.trainable_parameters():
            optimizer.state[p]["momentum_buffer"] = arrays[f"momentum.{names[p]}"].clone()
    weighting = BiasedSoftmax(g=1.0)
    alpha_tilde = arrays["alpha_tilde"]
    weights = weighting(alpha_tilde)
    assert torch.allclose(weights, arrays["alpha"], rtol=1e-6)

    built = ESTIMATORS.build(estimator, objective, optimizer)
    batch = batch_of(arrays["x_train"], arrays["y_train"])
    done = objective.training_pass(batch, weights, built.needs_views)
    done.loss.backward()
    theta = {p: p.detach().clone() for p in objective.trainable_parameters()}
    step = TrainingStep(batch, weights, 1.0, theta, random_state(student), done)
    built.before_step(step)
    optimizer.step()
    h = built(step, [batch_of(arrays["x_val"], arrays["y_val"])])

    assert torch.allclose(done.terms.double(), arrays["terms"], rtol=1e-5)
    for p in objective.trainable_parameters():
        assert torch.allclose(p, arrays[f"next.{names[p]}"], rtol=1e-5, atol=1e-7)
    gradient = weighting.pull_back(alpha_tilde, h)
    # The inputs are stored in float32, so the float64 results of the file hold to its precision.
    bound = 1e-4 if estimator == "finite_difference" else 1e-6
    assert relative(gradient, arrays["grad_alpha_exact_f64"]) < bound
