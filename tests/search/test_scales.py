"""A term does not win a search by the units of its loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distpro.batch import batch_of
from distpro.objective import Objective, Term
from distpro.schedule import Schedule
from distpro.search.estimators.forward_mode import ForwardMode
from distpro.search.scales import measure_scales
from distpro.search.searcher import Searcher
from distpro.search.weighting import BiasedSoftmax
from distpro.tasks import Classification
from distpro.train.trainer import Trainer
from distpro.weights import replay
from pathways import UserError
from tests.pairs import Distance, batch, free, network, schedule
from tests.search.algorithm_1 import Batches


class Times(nn.Module):
    """A loss in other units."""

    def __init__(self, loss, factor):
        super().__init__()
        self.loss, self.factor = loss, factor

    def forward(self, *args, **kwargs):
        return self.factor * self.loss(*args, **kwargs)


def objective_of(factors):
    torch.manual_seed(4)
    terms = [Term(Times(Distance(), factor), f"t{n}", [tap], [tap]) for n, (tap, factor) in enumerate(factors)]
    return Objective(network(0), network(1), terms)


def batches(count=2):
    return [batch_of(*batch(n=6 + n)) for n in range(count)]


@pytest.mark.parametrize("how", ["gradient", "loss"])
def test_the_factor_undoes_the_units(how):
    plain = measure_scales(objective_of([("2", 1.0), ("5", 1.0)]), batches(), how)
    scaled = measure_scales(objective_of([("2", 1000.0), ("5", 1e-4)]), batches(), how)
    assert scaled.tolist() == pytest.approx((plain * torch.tensor([1e-3, 1e4])).tolist(), rel=1e-5)
    assert plain[0] != plain[1]


def test_gradient_is_the_ratio_of_the_norms():
    """Against one backward pass per loss, over the parameters of student and term."""
    objective = objective_of([("2", 3.0), ("5", 0.1)])
    norms = torch.zeros(3, 2, dtype=torch.float64)
    for column, one in enumerate(batches()):
        for row, weights in enumerate(([0.0, 0.0], [1.0, 0.0], [0.0, 1.0])):
            objective.task_weight = float(row == 0)
            objective.zero_grad()
            objective.training_pass(one, weights).loss.backward()
            params = objective.trainable_parameters()
            norms[row, column] = sum(p.grad.double().square().sum() for p in params if p.grad is not None) ** 0.5
    objective.task_weight = 1.0
    found = measure_scales(objective, batches(), "gradient")
    assert found.tolist() == pytest.approx((norms[0].mean() / norms[1:].mean(1)).tolist(), rel=1e-5)


def test_measuring_leaves_no_trace():
    objective = objective_of([("2", 1.0)])
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    random = torch.get_rng_state()
    measure_scales(objective, batches(), "gradient")
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in objective.parameters())


def test_what_cannot_be_measured_is_said():
    with pytest.raises(UserError, match="cannot normalise by 'size'"):
        measure_scales(objective_of([("2", 1.0)]), batches(), "size")
    with pytest.raises(UserError, match="not finite before the first step: t1"):
        measure_scales(objective_of([("2", 1.0), ("5", float("inf"))]), batches(), "loss")
    silent = objective_of([("2", 0.0), ("5", 1.0)])
    assert measure_scales(silent, batches(), "gradient")[0] == 1


def searched(factors, how):
    """α̃ after a search over terms in these units, and the trained student."""
    objective = objective_of(factors)
    optimizer = torch.optim.SGD(objective.trainable_parameters(), 0.05, 0.9)
    train = Batches(10, shape=(3, 8, 8))
    searcher = Searcher(
        objective,
        ForwardMode(objective, optimizer),
        BiasedSoftmax(),
        Batches(11, shape=(3, 8, 8)).endless,
        total_steps=8,
        measure=None if how is None else lambda: measure_scales(objective, list(train.epoch(0))[:2], how),
    )
    trainer = Trainer(
        objective, Classification(), optimizer, searcher, train, Batches(12, count=1, shape=(3, 8, 8)), 2, max_steps=8
    )
    trainer.fit()
    return searcher, {k: v.clone() for k, v in objective.student.model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["gradient", "loss"])
def test_a_search_does_not_see_the_units(how):
    """The same α̃, weights and student whether a loss is in units a thousand times as small or not; without
    normalisation it is another search."""
    (plain, student), (scaled, other) = (searched([("2", 1.0), ("5", f)], how) for f in (1.0, 1000.0))
    assert scaled.history.flatten().tolist() == pytest.approx(plain.history.flatten().tolist(), rel=1e-4)
    for name, value in student.items():
        assert torch.allclose(value, other[name], rtol=1e-3, atol=1e-5), name
    without = searched([("2", 1.0), ("5", 10.0)], None)[0]
    assert (without.history - plain.history).abs().max() > 0.01


def test_the_schedule_carries_the_factors_into_a_retrain(tmp_path):
    searcher, _ = searched([("2", 10.0), ("5", 0.1)], "gradient")
    searcher.schedule(4, {}).save(tmp_path / "alpha.pt")
    found = Schedule.load(tmp_path / "alpha.pt")
    assert torch.equal(found.scales, searcher.scales) and (found.scales != 1).all()
    objective = objective_of([("2", 10.0), ("5", 0.1)])
    objective.follow(found, total_steps=8, scale=3.0)
    for step in (0, 5, 7):
        expected = 3.0 * searcher.scales * searcher.history[1, step]
        assert objective.weights_at(step) == pytest.approx(expected.tolist(), rel=1e-5)
    replay(objective, "equal", 8, found, scale=3.0)
    assert objective.weights_at(0) == pytest.approx((1.5 * searcher.scales).tolist(), rel=1e-6)


def test_factors_mean_nothing_to_another_loss():
    """A sum over columns drives a loss of its own units."""
    given = schedule([[0.2, 0.3]], ["a", "b"], [[1, 1, 1], [2, 1, 1]])
    object.__setattr__(given, "scales", torch.tensor([1000.0, 2.0]))
    objective = Objective(network(0), network(1), free(["other"], reduction="total"))
    objective.follow(given, total_steps=1)
    assert objective.weights_at(0) == pytest.approx([0.5])


@pytest.mark.slow
def test_a_resumed_search_keeps_its_factors():
    searcher, _ = searched([("2", 10.0), ("5", 0.1)], "gradient")
    other, _ = searched([("2", 1.0), ("5", 1.0)], None)
    other.load_state_dict(searcher.state_dict())
    assert torch.equal(other.scales, searcher.scales)
