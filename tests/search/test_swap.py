"""Searches leave a student its parameters, also one whose modules are reachable by two names."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distpro.batch import batch_of
from distpro.losses import build_loss
from distpro.objective import Objective, Term
from distpro.search.estimators import ESTIMATORS, TrainingStep
from distpro.search.estimators.swap import swapped
from distpro.search.searcher import Searcher
from distpro.search.weighting import BiasedSoftmax
from distpro.train.state import random_state


class Net(nn.Module):
    """One block that runs twice, under one name or under two."""

    def __init__(self, aliased: bool):
        super().__init__()
        self.stem, self.block = nn.Linear(4, 8), nn.Linear(8, 8)
        self.again = self.block if aliased else None
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.block(self.stem(x).relu()).relu()
        return self.head((self.block if self.again is None else self.again)(h))


def searched(aliased: bool, estimator: str):
    """The student and α̃ after five steps of a search."""
    torch.manual_seed(0)
    teacher, student = Net(False).double(), Net(aliased).double()
    batch = batch_of(torch.randn(16, 4, dtype=torch.float64), torch.randint(0, 3, (16,)))
    terms = [Term(build_loss("l2", [(8,)], [(8,)]).double(), "l2", ["stem"], ["stem"]), Term(build_loss("kd"), "kd")]
    objective = Objective(teacher, student, terms, example_input=batch.inputs)
    optimizer = torch.optim.SGD(objective.trainable_parameters(), 0.1, momentum=0.9)
    searcher = Searcher(
        objective,
        ESTIMATORS.build(estimator, objective, optimizer),
        BiasedSoftmax(),
        lambda start: iter(lambda: batch, None),
        total_steps=5,
    )
    for step in range(5):
        optimizer.zero_grad()
        state = random_state(student)
        done = objective.training_pass(batch, searcher.weights(step), capture=searcher.needs_views)
        done.loss.backward()
        searcher.before_update(step, batch, state, done)
        optimizer.step()
        searcher.after_update(step)
    return student, searcher.alpha_tilde.detach()


@pytest.mark.parametrize("estimator", ["forward_mode", "finite_difference", "unrolled"])
def test_a_shared_module_is_trained_on(estimator):
    plain, expected = searched(False, estimator)
    shared, alpha = searched(True, estimator)
    assert isinstance(shared.block.weight, nn.Parameter) and shared.again is shared.block
    for ours, theirs in zip(shared.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)
    assert torch.allclose(alpha, expected, rtol=1e-6)


def test_what_was_swapped_comes_back_after_an_error():
    model = nn.ModuleDict({"a": nn.BatchNorm1d(3), "b": nn.Linear(3, 3)})
    model["c"] = model["b"]
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with pytest.raises(KeyError), swapped(model, {p: torch.zeros_like(p) for p in before.values()}):
        assert not model["c"].weight.any() and not model["a"].running_var.any()
        raise KeyError
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(after[name] is tensor for name, tensor in before.items())
    assert model["c"].weight is model["b"].weight


def test_recurrent_layers_run_on_the_swapped_weights():
    torch.manual_seed(0)
    model, other = nn.LSTM(3, 4, batch_first=True), nn.LSTM(3, 4, batch_first=True)
    x = torch.randn(2, 5, 3)
    values = dict(zip(model.parameters(), other.parameters(), strict=True))
    plain = model(x)[0]
    with swapped(model, values):
        assert torch.equal(model(x)[0], other(x)[0])
    assert torch.equal(model(x)[0], plain)


def test_a_training_step_knows_its_own_parameters():
    """What a search step of the default estimator leaves of a student with tied weights: one parameter."""
    student = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    student[2].weight = student[0].weight
    batch = batch_of(torch.randn(6, 4), torch.randint(0, 4, (6,)))
    objective = Objective(nn.Linear(4, 4), student, [Term(build_loss("kd"), "kd")], batch.inputs)
    optimizer = torch.optim.SGD(objective.trainable_parameters(), 0.1)
    estimator = ESTIMATORS.build("forward_mode", objective, optimizer)
    state = random_state(student)
    done = objective.training_pass(batch, torch.ones(1), capture=True)
    done.loss.backward()
    theta = {p: p.detach().clone() for p in objective.trainable_parameters()}
    step = TrainingStep(batch, torch.ones(1), 1.0, theta, state, done)
    estimator.before_step(step)
    optimizer.step()
    assert estimator(step, [batch]).isfinite().all()
    assert student[2].weight is student[0].weight and isinstance(student[0].weight, nn.Parameter)
