"""Passes that only look leave buffers as they were, whatever happens in them."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from distpro.batch import batch_of
from distpro.losses import build_loss
from distpro.objective import Objective, Term
from distpro.search.estimators import ESTIMATORS, obstacle
from distpro.search.scales import measure_scales
from distpro.search.searcher import Searcher
from distpro.search.weighting import BiasedSoftmax
from distpro.tasks import Classification
from distpro.train.state import no_trace, random_state, set_random_state
from distpro.train.trainer import Trainer


def quantised() -> nn.Module:
    """A student as quantisation-aware training prepares it: observers with a range per channel, empty at first."""
    quantization = torch.ao.quantization
    torch.manual_seed(0)
    model = nn.Sequential(
        quantization.QuantStub(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        return quantization.prepare_qat(model.train())


def state(model):
    return {name: b.clone() for name, b in model.named_buffers()}


def same(before, after):
    assert before.keys() == after.keys()
    assert all(torch.equal(b, after[name]) and b.dtype == after[name].dtype for name, b in before.items())


def test_observers_that_have_taken_a_size_are_given_back():
    model = quantised()
    before, objects = state(model), dict(model.named_buffers())
    assert any(b.numel() == 0 for b in before.values())
    with no_trace(model):
        model(torch.randn(2, 3, 8, 8))
        assert any(b.shape != before[name].shape for name, b in model.named_buffers())
    same(before, state(model))
    assert all(b is objects[name] for name, b in model.named_buffers())


def test_a_pass_that_fails_midway_leaves_no_trace():
    model = quantised()
    model.append(nn.Dropout())
    model.append(nn.Linear(7, 1))
    before, random = state(model), torch.get_rng_state()
    with pytest.raises(RuntimeError), no_trace(model):
        model(torch.randn(2, 3, 8, 8))
    same(before, state(model))
    assert torch.equal(torch.get_rng_state(), random)


def test_buffers_that_a_pass_makes_or_puts_in_place_of_others():
    model = nn.BatchNorm1d(3)
    kept = model.running_mean
    model.register_buffer("expanded", torch.zeros(1).expand(3))
    with no_trace(model):
        model.running_mean = torch.ones(5)
        model.register_buffer("seen", torch.ones(1))
        model.num_batches_tracked += 1
    assert model.running_mean is kept and not kept.any()
    assert set(model._buffers) == {"running_mean", "running_var", "num_batches_tracked", "expanded"}
    assert model.num_batches_tracked == 0 and model.expanded.tolist() == [0, 0, 0]


def test_a_search_of_a_quantised_student():
    """Each look before the first step leaves the observers empty, and finite differences search."""
    student, teacher = quantised(), nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 3))
    batch = batch_of(torch.randn(8, 3, 8, 8), torch.randint(3, (8,)))
    objective = Objective(teacher, student, [Term(build_loss(name), name) for name in ("kd", "dist")], batch.inputs)
    before = state(student)
    assert "_fq_helper has no forward-mode rule" in obstacle(objective, batch)
    same(before, state(student))
    assert measure_scales(objective, [batch]).isfinite().all()
    same(before, state(student))
    optimizer = torch.optim.SGD(objective.trainable_parameters(), 0.1)
    estimator = ESTIMATORS.build("finite_difference", objective, optimizer)
    searcher = Searcher(objective, estimator, BiasedSoftmax(), lambda start: iter(lambda: batch, None), total_steps=3)
    for step in range(3):
        optimizer.zero_grad()
        random = random_state(student)
        done = objective.training_pass(batch, searcher.weights(step), searcher.needs_views)
        done.loss.backward()
        searcher.before_update(step, batch, random, done)
        optimizer.step()
        trained = state(student)
        searcher.after_update(step)
        same(trained, state(student))
    assert searcher.alpha_tilde.isfinite().all() and (searcher.alpha_tilde != 1).all()


def test_python_and_numpy_draw_again():
    """What a student draws from Python's or NumPy's own generators is drawn again when a step is repeated."""
    import random

    import numpy as np

    model = torch.nn.Linear(2, 2)
    random.gauss(0, 1), np.random.randn()  # each keeps a second number for the next call
    state = random_state(model)

    def draw():
        return random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.rand(()).item()

    first = draw()
    assert draw() != first
    set_random_state(state)
    assert draw() == first


class Counting(nn.Module):
    """A model that counts its passes, as one whose own schedule anneals something does."""

    def __init__(self):
        super().__init__()
        self.layer, self.passes, self.share = nn.Linear(3, 3), 0, 1.0

    def forward(self, x):
        self.passes += 1
        self.share *= 0.5
        return self.layer(x)


@pytest.mark.parametrize("fails", [False, True])
def test_numbers_that_a_model_keeps_are_given_back(fails):
    model = nn.Sequential(nn.Linear(3, 3), Counting())
    model(torch.zeros(2, 3))
    with pytest.raises(ZeroDivisionError) if fails else torch.enable_grad(), no_trace(model):
        model(torch.zeros(2, 3))
        1 / (not fails)
    assert (model[1].passes, model[1].share) == (1, 0.5)


class Following(nn.Module):
    """A student that counts its passes in a frozen parameter, in a module that is hidden, and in a number."""

    def __init__(self):
        super().__init__()
        self.layer, self.passes = nn.Linear(4, 3), 0
        self.key = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.hidden = (nn.BatchNorm1d(4),)

    def forward(self, x):
        self.key.data.add_(1)
        self.hidden[0](x)
        self.passes += 1
        return self.layer(x)


@pytest.mark.parametrize("repeats", [False, True])
def test_a_step_that_is_taken_again_is_one_pass(repeats):
    torch.manual_seed(0)
    student, teacher = Following(), nn.Sequential(nn.BatchNorm1d(4), Following())
    batch = batch_of(torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
    terms = [Term(build_loss(name), name) for name in ("kd", "dist")]
    objective = Objective(teacher, student, terms, teacher_training=True)
    optimizer = torch.optim.SGD(objective.trainable_parameters(), 0.1)
    estimator = ESTIMATORS.build("finite_difference", objective, optimizer)
    held_out = lambda start: iter(lambda: batch, None)  # noqa: E731
    searcher = Searcher(objective, estimator, BiasedSoftmax(), held_out, total_steps=3, repeats=repeats)
    trainer = Trainer(objective, Classification(), optimizer, searcher, [batch] * 3, [batch], epochs=1)
    for _ in range(3):
        trainer.train_step(batch)
    assert (searcher.alpha_tilde != 1).all()
    for model in (student, teacher[1]):
        assert model.key.item() == model.passes == model.hidden[0].num_batches_tracked == 3
    assert teacher[0].num_batches_tracked == 3
