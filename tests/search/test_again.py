"""A hypergradient does the training's passes again: with what the student held then, and with its parameters where they are read.

The truth is plain autograd in float64: of one step of SGD, h_j = −η ⟨∇L_val(θ'), ∇ℓ_j(θ)⟩.
"""

import collections
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from distpro.batch import batch_of
from distpro.build.copying import copied_apart
from distpro.objective import Objective, Term
from distpro.search.estimators import ESTIMATORS
from distpro.search.estimators.base import TrainingStep
from distpro.search.estimators.choice import obstacle
from distpro.search.searcher import Searcher
from distpro.search.weighting import WEIGHTINGS
from distpro.train.state import random_state
from pathways import UserError

RATE, WEIGHTS = 0.1, torch.tensor([0.7, 1.3], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.pre, self.body, self.fc = nn.Linear(5, 5), nn.Linear(5, 8), nn.Linear(8, 3)
        self.more()

    def more(self):
        pass

    def between(self, x):
        return torch.tanh(self.pre(x))

    def forward(self, x):
        return self.fc(torch.tanh(self.body(self.between(x))))


class Counter(Net):
    def more(self):
        self.passes = 0

    def between(self, x):
        self.passes += 1
        return super().between(x) * min(1.0, 0.3 * self.passes)


class Iterator(Counter):
    def more(self):
        self.numbers = [itertools.count(1)]

    def between(self, x):
        return Net.between(self, x) * min(1.0, 0.3 * next(self.numbers[0]))


class OwnGenerator(Net):
    def more(self):
        self.generator = torch.Generator().manual_seed(3)

    def between(self, x):
        return super().between(x) * (torch.rand(x.shape, generator=self.generator) > 0.5) * 2


class SpectralNorm(Net):
    def more(self):
        self.pre = nn.utils.spectral_norm(self.pre)


class RunningScale(Net):
    def more(self):
        self.register_buffer("scale", torch.ones(5, dtype=torch.float64))

    def between(self, x):
        if self.training:
            self.scale = 0.5 * self.scale + 0.5 * x.detach().abs().mean(0)
        return super().between(x) / self.scale


class ReadsItsStatistics(Net):
    def more(self):
        self.norm = nn.BatchNorm1d(5, momentum=0.5)

    def between(self, x):
        return self.norm(super().between(x)) * self.norm.running_var.sqrt() + self.norm.running_mean


class NormInTwoModes(Net):
    def more(self):
        self.norm = nn.BatchNorm1d(5)

    def between(self, x):
        x = super().between(x)
        batch = self.norm(x)
        self.norm.eval()
        running = self.norm(x * 0.5)
        self.norm.train()
        return 0.5 * (batch + running)


class WeightsInAList(Net):
    def more(self):
        self.flat = [self.pre.weight, {"bias": self.pre.bias}]

    def between(self, x):
        return torch.tanh(F.linear(x, self.flat[0], self.flat[1]["bias"]))


Layer = collections.namedtuple("Layer", "weight bias")


class WeightsInTuples(Net):
    def more(self):
        self.flat = [("first", Layer(self.pre.weight, self.pre.bias))]

    def between(self, x):
        return torch.tanh(F.linear(x, *self.flat[0][1]))


class WeightsInAFunction(Net):
    def more(self):
        self.map = functools.partial(F.linear, weight=self.pre.weight, bias=self.pre.bias)

    def between(self, x):
        return torch.tanh(self.map(x))


class Growing:
    def __init__(self):
        self.passes = 0

    def __call__(self, module, args, output):
        self.passes += 1
        return output * (1 + 0.02 * self.passes)

    def as_method(self, module, args, output):
        return self(module, args, output)


class HookOfAnObject(Net):
    def more(self):
        self.pre.register_forward_hook(Growing())


class HookOfAMethod(Net):
    def more(self):
        self.pre.register_forward_hook(Growing().as_method)


class HookOfAClosure(Net):
    def more(self):
        generator, passes = torch.Generator().manual_seed(3), 0

        def disturb(module, args, output):
            nonlocal passes
            passes += 1
            return output + 0.1 * passes * torch.rand(output.shape, generator=generator, dtype=output.dtype)

        self.pre.register_forward_hook(disturb)


class GradientHook(Net):
    def more(self):
        self.pre.weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))


class AccumulatedGradientHook(Net):
    def more(self):
        self.pre.weight.register_post_accumulate_grad_hook(lambda parameter: parameter.grad.mul_(0.5))


class Checkpointed(Net):
    def between(self, x):
        return checkpoint(lambda x: torch.tanh(self.pre(x).sin()), x, use_reentrant=False)


class WholeNumberFirst(Net):
    def more(self):
        self.version = nn.Parameter(torch.tensor(3), requires_grad=False)


class WritesToItsInput(Net):
    def between(self, x):
        return super().between(x.sub_(0.5).div_(2))


class EMA(Net):
    def more(self):
        self.slow = nn.Linear(5, 5).requires_grad_(False)

    def between(self, x):
        for slow, fast in zip(self.slow.parameters(), self.pre.parameters(), strict=True):
            slow.data.lerp_(fast.detach(), 0.5)
        return super().between(x) + self.slow(x)


class L2(nn.Module):
    def forward(self, student, teacher, target=None, index=None):
        return F.mse_loss(student, teacher)


class Cosine(nn.Module):
    def forward(self, student, teacher, target=None, index=None):
        return (1 - F.cosine_similarity(student, teacher, dim=1)).mean()


def batches():
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(6, 5, generator=generator, dtype=torch.float64), LABELS) for _ in range(2)]


def made(seed, kind):
    torch.manual_seed(seed)
    return kind().double()


def truth(kind):
    student, teacher = made(0, kind), made(1, Net)
    parameters = [p for p in student.parameters() if p.requires_grad]
    (x, y), validation = batches()
    with torch.no_grad():
        taught = teacher.body(teacher.between(x)), teacher(x)
    read = []
    handle = student.body.register_forward_hook(lambda _m, _a, output: read.append(output))
    torch.manual_seed(9)
    logits = student(x.clone())
    handle.remove()
    losses = [F.mse_loss(read[0], taught[0]), (1 - F.cosine_similarity(logits, taught[1], dim=1)).mean()]
    loss = F.cross_entropy(logits, y) + sum(w * value for w, value in zip(WEIGHTS, losses, strict=True))
    by_loss = [torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True) for value in losses]
    with torch.no_grad():
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.sub_(RATE * g)
    judged = torch.autograd.grad(F.cross_entropy(student(validation[0]), validation[1]), parameters)
    rows = [[(v * g).sum() for v, g in zip(judged, own, strict=True) if g is not None] for own in by_loss]
    return torch.stack([-RATE * torch.stack(row).sum() for row in rows])


def estimated(kind, name):
    student, teacher = made(0, kind), made(1, Net)
    objective = Objective(teacher, student, [Term(L2(), "l2", ["body"], ["body"]), Term(Cosine(), "cosine")])
    optimizer = torch.optim.SGD(objective.trainable_parameters(), RATE)
    params = {"sweep": {"steps": 1}, "unrolled": {"steps": 1}, "finite_difference": {"epsilon": 1e-3}}.get(name, {})
    estimator = ESTIMATORS.build(name, objective, optimizer, **params)
    batch, validation = (batch_of(x.clone(), y) for x, y in batches())
    torch.manual_seed(9)
    state = random_state(student)
    estimator.before_pass()
    done = objective.training_pass(batch, WEIGHTS, capture=estimator.needs_views)
    done.loss.backward()
    theta = {p: p.detach().clone() for p in objective.trainable_parameters()}
    step = TrainingStep(batch, WEIGHTS, 1.0, theta, state, done)
    estimator.before_step(step)
    optimizer.step()
    estimator.check(step)
    return estimator(step, [validation])


KINDS = [
    Net,
    Counter,
    Iterator,
    OwnGenerator,
    SpectralNorm,
    RunningScale,
    ReadsItsStatistics,
    NormInTwoModes,
    WeightsInAList,
    WeightsInTuples,
    WeightsInAFunction,
    HookOfAnObject,
    HookOfAMethod,
    HookOfAClosure,
    Checkpointed,
    WholeNumberFirst,
]


@pytest.mark.parametrize("name", ["forward_mode", "finite_difference", "unrolled", "sweep"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_pass_of_the_training(kind, name):
    if (kind, name) == (Checkpointed, "unrolled"):  # whose last backward pass goes through several steps
        with pytest.raises(UserError, match="activation checkpointing.*use search.estimator=sweep"):
            estimated(kind, name)
        return
    if kind is WeightsInAFunction and name != "finite_difference":  # which alone moves the parameters in place
        with pytest.raises(UserError, match="other losses.*from a function, a partial.*finite_difference follows"):
            estimated(kind, name)
        return
    if kind in (SpectralNorm, ReadsItsStatistics, NormInTwoModes) and name == "finite_difference":
        pytest.skip(
            "central differences see the power iteration and running statistics, through which no gradient goes"
        )
    if (kind, name) == (NormInTwoModes, "unrolled"):
        pytest.skip("PyTorch's backward pass of the second mode reads the statistics that a later pass has moved")
    expected = truth(kind)
    found = estimated(kind, name)
    tolerance = 1e-4 if name == "finite_difference" else 1e-9  # its error is of the order of epsilon squared
    assert ((found - expected).norm() / expected.norm()).item() < tolerance


@pytest.mark.parametrize("name", ["forward_mode", "finite_difference", "unrolled", "sweep"])
@pytest.mark.parametrize("kind", [WritesToItsInput, EMA])
def test_what_cannot_be_put_back_is_refused(kind, name):
    with pytest.raises(UserError, match="a training pass that is done again gives other losses"):
        estimated(kind, name)


def test_weights_in_a_function_are_noticed_however_small_the_step_is(monkeypatch):
    monkeypatch.setattr("tests.search.test_again.RATE", 1e-6)
    with pytest.raises(UserError, match="other losses"):
        estimated(WeightsInAFunction, "forward_mode")
    expected = truth(WeightsInTuples)
    assert ((estimated(WeightsInTuples, "forward_mode") - expected).norm() / expected.norm()).item() < 1e-9


@pytest.mark.parametrize("kind", [GradientHook, AccumulatedGradientHook])
def test_hooks_on_gradients_are_refused(kind):
    with pytest.raises(UserError, match="search: parameter 'pre.weight' has a hook on its gradient"):
        estimated(kind, "forward_mode")
    with pytest.raises(UserError, match="search: parameter 'pre.weight' has a hook on its gradient"):
        copied_apart(made(0, kind))  # which would have lost it


class Projected(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, student, teacher, target=None, index=None):
        return F.mse_loss(self.layer(student), teacher)


def sharing(layer_of):
    student, teacher = made(0, Net), made(1, Net)
    layer = layer_of(student)
    terms = [
        Term(Projected(layer), "a", ["pre"], ["pre"]),
        Term(Projected(layer), "b", ["pre"], ["pre"]),
    ]
    return Objective(teacher, student, terms)


def test_forward_mode_refuses_what_terms_share():
    """Gradients of shared parameters are no term's own. They matter where the term moves the student beside its taps, or where
    clipping gives the term's own parameters a part."""
    batch = batch_of(*batches()[0])
    own = sharing(lambda student: nn.Linear(5, 5).double())
    assert obstacle(own, batch) == ""
    assert obstacle(own, batch, clipped=True) == "term 'b' shares parameters with term 'a'"
    students = sharing(lambda student: student.pre)
    assert obstacle(students, batch) == "term 'a' shares parameters with the student"
    optimizer = torch.optim.SGD(students.trainable_parameters(), RATE)
    with pytest.raises(UserError, match="forward_mode: term 'a' shares parameters with the student; use finite_diff"):
        ESTIMATORS.build("forward_mode", students, optimizer)


def test_a_search_tries_it():
    student, teacher = made(0, WritesToItsInput).float(), made(1, Net).float()
    objective = Objective(teacher, student, [Term(L2(), "l2", ["body"], ["body"]), Term(Cosine(), "cosine")])
    optimizer = torch.optim.SGD(objective.trainable_parameters(), RATE)
    estimator = ESTIMATORS.build("forward_mode", objective, optimizer)
    batch, validation = (batch_of(x.float(), y) for x, y in batches())
    weighting = WEIGHTINGS.build("biased_softmax")
    searcher = Searcher(objective, estimator, weighting, lambda _: itertools.repeat(validation), total_steps=4)
    weights = searcher.weights(0)
    state = random_state(student)
    done = objective.training_pass(batch, weights, capture=estimator.needs_views)
    done.loss.backward()
    searcher.before_update(0, batch, state, done)
    optimizer.step()
    with pytest.raises(UserError, match="a training pass that is done again"):
        searcher.after_update(0)
