"""The search against Algorithm 1 written out by hand in float64, and what is computed, dropped and recorded."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distpro.losses import build_loss
from distpro.objective import Objective, Term
from distpro.search.estimators.base import ESTIMATORS
from distpro.search.searcher import Searcher
from distpro.search.weighting import WEIGHTINGS
from distpro.tasks import Classification
from distpro.train.rates import LearningRate
from distpro.train.trainer import Trainer
from pathways import UserError, build_pathways
from tests.search.algorithm_1 import SGD, Batches, ByHand, network, objective_of_four

STEPS = 7


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(
    estimator="forward_mode",
    weighting="biased_softmax",
    student=SGD,
    steps=STEPS,
    objective=None,
    params=None,
    **options,
) -> Trainer:
    """A trainer whose weights are searched, in the dtype of the day."""
    objective = objective or objective_of_four()
    optimizer = torch.optim.SGD(objective.trainable_parameters(), **student)
    built = ESTIMATORS.build(estimator, objective, optimizer, **(params or {}))
    searcher = Searcher(
        objective, built, WEIGHTINGS.build(weighting), Batches(11).endless, total_steps=steps, **options
    )
    train, test = Batches(10), Batches(12, count=1)
    return Trainer(
        objective, Classification(), optimizer, searcher, train, test, epochs=math.ceil(steps / 5), max_steps=steps
    )


def compare(estimator, weighting="biased_softmax", params=None, window=1, every=1, repeats=False, tolerance=1e-9):
    """Run the search and Algorithm 1 by hand; give their largest differences of α̃, w and θ."""
    trainer = build(estimator, weighting, params=params, every=every, repeats=repeats, learning_rate=0.1, scale=2.0)
    hand = ByHand(trainer.objective, weighting, 0.1, (0.5, 0.999), window, max(every, window), repeats, 2.0)
    trainer.learning_rate = LearningRate("cosine")
    hand.rate = lambda t: (1 + math.cos(math.pi * t / STEPS)) / 2
    alpha_tilde, weights = hand.run(STEPS)
    trainer.fit()
    searcher = trainer.weights
    theta = trainer.objective.trainable_parameters()
    differences = [
        (searcher.history[0] - alpha_tilde).abs().max().item(),
        (searcher.history[1] - weights).abs().max().item(),
        max((found - truth).abs().max().item() for found, truth in zip(theta, hand.theta, strict=True)),
        (searcher.alpha_tilde - hand.alpha).abs().max().item(),
    ]
    assert (
        alpha_tilde[-1] - alpha_tilde[0]
    ).abs().min() > 0.02  # every α̃ has moved: agreement is not for want of movement
    assert max(differences) < tolerance, differences


@pytest.mark.parametrize("estimator", ["forward_mode", "unrolled"])
@pytest.mark.parametrize("every", [1, 2])
def test_search_is_algorithm_1(float64, estimator, every):
    """α̃, w and θ after 7 steps: real step as the virtual one, exact hypergradient, Adam on α̃, λ, momentum, weight
    decay, a term of constant weight beside the learned ones."""
    compare(estimator, every=every)


def test_search_by_finite_difference_approximates_algorithm_1(float64):
    compare("finite_difference", params={"epsilon": 1e-3}, tolerance=1e-5)


@pytest.mark.parametrize("every", [1, 2])
def test_repeats_is_the_literal_algorithm_1(float64, every):
    """α̃ moves first, and the step is taken again from where it began with the new weights."""
    compare("forward_mode", repeats=True, every=every)


@pytest.mark.slow
def test_a_step_that_is_taken_again_leaves_the_traces_of_one(float64):
    """With α̃ held in place it changes nothing: BatchNorm statistics, momentum, random numbers of dropout."""
    results = []
    for repeats in (False, True):
        trainer = of_convolutions(["2", "5"], repeats=repeats, learning_rate=0.0, dropout=0.3)
        torch.manual_seed(7)
        trainer.fit()
        momentum = trainer.optimizer.state_dict()["state"]
        buffers = {f"momentum {n}": state["momentum_buffer"] for n, state in momentum.items()}
        results.append({**trainer.objective.state_dict(), **buffers, "random": torch.get_rng_state()})
    plain, repeated = results
    for name, value in plain.items():
        assert torch.allclose(value, repeated[name], rtol=1e-12, atol=1e-12), name  # sums of another order


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_weighting_searches(float64, weighting):
    compare("forward_mode", weighting)


@pytest.mark.parametrize("estimator", ["unrolled", "sweep"])
@pytest.mark.parametrize("every", [1, 3, 5])
def test_the_gradient_over_a_window_of_three(float64, estimator, every):
    """The gradient of L_val through the last three steps; less than a window between two updates means a window."""
    compare(estimator, params={"steps": 3}, window=3, every=every)


def test_sgd_moves_alpha_against_its_gradient(float64):
    """Two steps of γ = 100 with momentum 0.5, from the same gradient by hand."""
    trainer = build("forward_mode", steps=2, optimizer="sgd", learning_rate=100.0, momentum=0.5)
    hand = ByHand(trainer.objective, "biased_softmax", 100.0, (0, 0), 1, 1, False, 1.0)
    gradients = []

    def update(gradient):
        gradients.append(gradient + 0.5 * gradients[-1] if gradients else gradient)
        hand.alpha = hand.alpha.detach() - 100.0 * gradients[-1]

    hand.update = update
    hand.run(2)
    trainer.fit()
    assert (hand.alpha - 1).abs().min() > 1e-3
    assert torch.allclose(trainer.weights.alpha_tilde, hand.alpha, rtol=1e-10)


def test_h_per_learning_rate(float64):
    """After the rate has dropped to a tenth, the same gradient again: α̃ goes ten times as far as without the division."""
    moves = []
    for per_rate in (False, True):
        trainer = build("forward_mode", steps=2, optimizer="sgd", learning_rate=1.0, momentum=0.0)
        trainer.learning_rate = LearningRate("step", [0.4], 0.1)  # from the second of two steps on
        if per_rate:
            group = trainer.optimizer.param_groups[0]
            base = group["lr"]
            trainer.weights._rate = lambda group=group, base=base: group["lr"] / base
        trainer.fit()
        first, second = (
            trainer.weights.history[0, 1] - 1,
            trainer.weights.alpha_tilde.detach() - trainer.weights.history[0, 1],
        )
        moves.append((first, second))
    (first, second), (same, ten_times) = moves
    assert torch.equal(first, same) and first.abs().min() > 0
    assert torch.allclose(ten_times, 10 * second, rtol=1e-5)


# What is recorded


def convolutions(seed, dropout=0.0):
    torch.manual_seed(seed)
    layers = []
    for size in (4, 6, 8):
        layers += [nn.LazyConv2d(size, 3, stride=2, padding=1), nn.BatchNorm2d(size), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(8, 4))
    model(torch.zeros(2, 3, 16, 16))
    return model


def of_convolutions(taps, dropout=0.0, **options):
    """A search over all pathways between the taps of two convolutional networks."""
    shape = (3, 16, 16)
    teacher, student = convolutions(0), convolutions(1, dropout)
    objective = Objective(teacher, student, build_pathways(teacher, student, torch.zeros(2, *shape), taps, taps))
    trainer = build(objective=objective, **options)
    trainer.train_loader, trainer.test_loader = Batches(0, shape=shape), Batches(2, count=1, shape=shape)
    trainer.weights.validation = Batches(1, shape=shape).endless()
    return trainer


def test_27_pathways_begin_at_one_28th():
    """Initial α̃ = 1 under the biased softmax (Section 3.2), recorded before the first step."""
    trainer = of_convolutions(["2", "5", "8"], steps=2)
    trainer.fit()
    schedule = trainer.weights.schedule(5, {})
    assert schedule.weights.shape == (2, 27)
    assert torch.allclose(schedule.weights[0], torch.full((27,), 1 / 28), rtol=1e-6)
    assert torch.equal(schedule.alpha_tilde[0], torch.ones(27))
    assert (schedule.alpha_tilde[1] != 1).all()


@pytest.mark.parametrize("every", [1, 3])
def test_weights_are_recorded_each_step_and_move_every_nth(every):
    trainer = build(every=every)
    drawn = []
    validation = Batches(11).endless()
    trainer.weights.validation = (drawn.append(n) or next(validation) for n in range(99))
    trainer.fit()
    alpha_tilde, weights = trainer.weights.history
    assert trainer.weights.steps_done == STEPS and len(drawn) == STEPS // every
    for t in range(STEPS):
        assert torch.equal(weights[t], WEIGHTINGS.build("biased_softmax")(alpha_tilde[t]))
        if t:
            assert torch.equal(alpha_tilde[t], alpha_tilde[t - 1]) is (t % every != 0)


def test_the_schedule_says_what_was_learned():
    trainer = build(steps=6)
    trainer.fit()
    schedule = trainer.weights.schedule(2.5, {"data": "toy"})
    assert schedule.keys == ("first", "second", "kd")  # not the constant one
    assert schedule.levels.tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert schedule.transforms == ("", "", "")
    assert schedule.steps_per_epoch == 2.5 and schedule.meta["data"] == "toy"
    told = schedule.meta["gradients"]
    assert told["updates"] == 6 and list(told["of"]) == ["first", "second", "kd"]
    assert schedule.weights.dtype == schedule.alpha_tilde.dtype == torch.float32
    assert torch.equal(schedule.alpha_tilde, trainer.weights.history[0])
    assert torch.equal(schedule.weights, trainer.weights.history[1])


def test_the_schedule_of_a_search_under_way_ends_at_its_last_step():
    trainer = build()
    for batch in Batches(10).batches[:3]:
        trainer.train_step(batch)
    assert len(trainer.weights.schedule(5, {})) == 3


def test_transforms_are_named_in_the_schedule():
    teacher, student = convolutions(0), convolutions(1)
    space = build_pathways(
        teacher, student, torch.zeros(2, 3, 16, 16), ["2"], ["2", "5"], transforms=["attention", "conv1x1"]
    )
    trainer = build(objective=Objective(teacher, student, space))
    trainer.weights.weights(0)
    schedule = trainer.weights.schedule(5, {})
    assert schedule.transforms == ("attention", "conv1x1") * 2
    assert schedule.levels.tolist() == [[1, 1, 1], [1, 1, 2], [1, 2, 1], [1, 2, 2]]


def test_scalars_are_the_last_recorded_row_and_the_validation_loss():
    trainer = build()
    trainer.train_step(Batches(10).batches[0])
    student, held_out = copy.deepcopy(trainer.objective.student.model), Batches(11).batches[0]
    scalars = trainer.weights.scalars()
    assert [scalars[f"alpha_tilde/{key}"] for key in ("first", "second", "kd")] == [1, 1, 1]
    assert scalars["alpha/kd"].item() == pytest.approx(1 / 4)
    expected = F.cross_entropy(student(held_out.inputs), held_out.target)
    assert scalars["search/validation_loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_no_validation_loss_is_logged_before_there_is_one():
    trainer = build(every=2)
    for n, logged in enumerate((False, True)):
        trainer.train_step(Batches(10 + n).batches[0])
        assert ("search/validation_loss" in trainer.weights.scalars()) == logged


# Constants, threshold, scale


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_weights_of_a_step(threshold):
    """λ multiplies learned weights alone; a dropped term keeps its part of the softmax's denominator."""
    searcher = build(threshold=threshold, scale=lambda step: 10.0 * (step + 1)).weights
    values = [2.0, 0.5, 1.0]  # at τ is dropped
    searcher.alpha_tilde.data = torch.tensor(values)
    total = sum(math.exp(v) for v in values) + math.e
    first, second, kd = (20.0 * math.exp(v) / total for v in values)
    expected = [first, 0.3, second if threshold is None else 0.0, kd]
    assert list(searcher.weights(1)) == pytest.approx(expected, rel=1e-6)
    assert searcher.history[1, 1].tolist() == pytest.approx([math.exp(v) / total for v in values], rel=1e-6)


@pytest.mark.parametrize("estimator", ["forward_mode", "finite_difference"])
@pytest.mark.parametrize(
    ("options", "computed"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6]),
        ({"threshold": 0.5}, []),
        ({"threshold": 0.5, "revive_every": 3}, [0, 3, 6]),
        ({"threshold": 0.5, "revive_every": 2, "every": 2}, [0, 1, 4, 5]),
    ],
)
def test_a_dropped_term_is_not_computed(estimator, options, computed):
    """With α̃ held in place: the steps in which the term below the threshold is computed."""
    trainer = build(estimator, learning_rate=0.0, **options)
    trainer.weights.alpha_tilde.data = torch.tensor([1.0, 0.4, 1.0])
    kept, _, dropped, _ = (term.loss for term in trainer.objective.terms)
    ran = []
    for step, batch in zip(range(STEPS), Batches(10).endless(), strict=False):
        before = kept.calls, dropped.calls
        trainer.train_step(batch)
        assert kept.calls > before[0]
        ran += [step] if dropped.calls > before[1] else []
    assert ran == computed


class Recording:
    """An estimator that keeps what it has answered."""

    def __init__(self, estimator):
        self.estimator, self.answers = estimator, []

    def __getattr__(self, name):
        return getattr(self.estimator, name)

    def __call__(self, *args):
        self.answers.append(self.estimator(*args))
        return self.answers[-1]


@pytest.mark.parametrize("estimator", ["forward_mode", "finite_difference"])
def test_a_dropped_term_has_a_signal_only_when_it_is_revived(estimator):
    trainer = build(estimator, learning_rate=0.0, threshold=0.5, revive_every=3)
    trainer.weights.alpha_tilde.data = torch.tensor([1.0, 0.4, 1.0])
    recording = trainer.weights.estimator = Recording(trainer.weights.estimator)
    trainer.fit()
    signals = torch.stack(recording.answers) != 0
    assert signals[:, 0].all() and signals[:, 3].all()
    assert signals[:, 2].tolist() == [True, False, False, True, False, False, True]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("constant", [0.0, 0.3])
def test_a_search_survives_that_everything_is_dropped(estimator, constant):
    """τ at the initial α̃. No learned term then moves the student, which trains as it would without them."""
    objective = objective_of_four()
    objective.terms[1].weight = constant
    alone = Objective(*copy.deepcopy((objective.teacher.model, objective.student.model, [objective.terms[1]])))
    trainer = build(estimator, objective=objective, threshold=1.0, learning_rate=0.0)
    trainer.fit()
    optimizer = torch.optim.SGD(alone.trainable_parameters(), **SGD)
    for _, batch in zip(range(STEPS), Batches(10).endless(), strict=False):
        optimizer.zero_grad()
        alone(batch)[0].backward()
        optimizer.step()
    for found, truth in zip(objective.student.parameters(), alone.student.parameters(), strict=True):
        assert torch.allclose(found, truth, atol=1e-7)


def test_a_search_needs_something_to_learn():
    objective = objective_of_four()
    objective.keep([objective.terms[1]])
    with pytest.raises(UserError, match="no term whose weight is to be learned"):
        build(objective=objective)


def test_forward_mode_refuses_a_loss_of_several_weights():
    shapes = [(8,), (8,)]
    loss = build_loss("l2", student_shapes=shapes, teacher_shapes=shapes)
    term = Term(loss, "l2", ["1", "3"], ["1", "3"], per_level=True)
    trainer = build("forward_mode", objective=Objective(network(0), network(1), [term]))
    with pytest.raises(UserError, match="'l2' has several weights; use finite_difference"):
        trainer.fit()
