"""What a schedule says itself acts in every replay: λ, warm-up, threshold, start, scales, scalars; and at which step."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import distpro
from distpro.objective import Objective, Term
from distpro.weights import replay
from pathways import UserError
from tests.pairs import Distance, batch, free, network, schedule


def meant():
    """Ten steps of two terms, with λ, a warm-up over the first of two epochs, scales, a threshold that drops b at the
    end, and a start."""
    weights = torch.stack([torch.linspace(0.1, 1, 10), torch.linspace(0.9, 0, 10)], 1)
    given = schedule(weights.tolist(), ["a", "b"], alpha_tilde=(weights + 0.3).tolist())
    return replace(
        given,
        scales=torch.tensor([2.0, 10.0]),
        steps_per_epoch=5.0,
        strength=3.0,
        warmup=2.0,
        threshold=0.5,
        start=0.3,
    )


def truth(total, strength=3.0, warmup=2.0, threshold=0.5, start=0.3):
    """λ · s · w of every step, in float64 with NumPy."""
    given = meant()
    position = np.linspace(int(start * 10), 9, total)
    w, alpha = (
        np.stack([np.interp(position, np.arange(10), column) for column in table.double().T.numpy()], 1)
        for table in (given.weights, given.alpha_tilde)
    )
    kept = True if threshold is None else alpha > threshold
    by = np.array([strength * min(1, (step // (total / 2) + 1) / warmup if warmup else 1) for step in range(total)])
    return by[:, None] * given.scales.numpy() * w * kept


@pytest.mark.parametrize("total", [8, 20, 34])
def test_follow_alone_means_all_that_the_schedule_says(total):
    objective = Objective(network(0), network(1), free(["a", "b"]))
    objective.follow(meant(), total)
    found = np.array([objective.weights_at(step) for step in range(total)])
    np.testing.assert_allclose(found, truth(total), rtol=1e-5)
    assert (found[:, 1] == 0).any() and (found[:, 1] > 0).any()


@pytest.mark.parametrize(
    "given, said",
    [
        ({"threshold": None}, {"threshold": None}),
        ({"threshold": 0.9}, {"threshold": 0.9}),
        ({"start": 0.0}, {"start": 0.0}),
        ({"scale": 5.0}, {"strength": 5.0, "warmup": 0.0}),
        ({"scale": lambda step: 5.0}, {"strength": 5.0, "warmup": 0.0}),
        ({"scale": 1.0, "threshold": None, "start": 0}, {"strength": 1, "warmup": 0, "threshold": None, "start": 0}),
    ],
)
def test_what_is_given_stands_in_the_place_of_what_the_schedule_says(given, said):
    ours, again = (Objective(network(0), network(1), free(["a", "b"])) for _ in range(2))
    ours.follow(meant(), 20, **given)
    replay(again, "searched", 20, meant(), **given)
    for objective in (ours, again):
        found = np.array([objective.weights_at(step) for step in range(20)])
        np.testing.assert_allclose(found, truth(20, **said), rtol=1e-5)


def test_other_words_in_their_place_are_refused():
    objective = Objective(network(0), network(1), free(["a", "b"]))
    for wrong in ({"threshold": "0.5"}, {"start": "0"}, {"scale": "3"}):
        with pytest.raises(UserError, match="is '(0.5|0|3)'"):
            objective.follow(meant(), 20, **wrong)


@pytest.mark.parametrize("how", ["searched", "final", "mean", "shuffled", "permuted", "random", "equal"])
def test_a_control_made_in_python_is_the_retrains(how):
    """λ and scales act in all of them."""
    ours, theirs = (Objective(network(0), network(1), free(["a", "b"])) for _ in range(2))
    replay(theirs, how, 20, meant())
    control = meant() if how == "searched" else getattr(meant(), how)()
    ours.follow(control, 20)
    assert ours.keys == theirs.keys == (["a"] if how == "final" else ["a", "b"])  # b ends below the threshold
    for step in range(20):
        assert ours.weights_at(step) == pytest.approx(theirs.weights_at(step), rel=1e-6)
    if how in ("equal", "random"):
        by = [3.0 * min(1, (step // 10 + 1) / 2) for step in range(20)]
        sums = [sum(w / s for w, s in zip(ours.weights_at(step), (2, 10), strict=True)) for step in range(20)]
        assert sums == pytest.approx(by, rel=1e-5)  # the schedule's own weights have a sum of 1 too


def test_by_level_and_in_sums_the_rest_is_kept():
    levels = [[1, 1, 1], [2, 1, 1]]
    given = replace(meant(), levels=torch.tensor(levels), transforms=("x", "x"))
    terms = [Term(Distance(), f"other{n}", ["5"], ["5"], level=tuple(level)) for n, level in enumerate(levels)]
    for term in terms:
        term.transform_name = "x"
    objective = Objective(network(0), network(1), terms)
    objective.follow(given, 20)
    np.testing.assert_allclose([objective.weights_at(step) for step in range(20)], truth(20), rtol=1e-5)

    objective = Objective(network(0), network(1), free(["kd"], reduction="total"))
    objective.follow(given, 20)
    total = (truth(20) / given.scales.numpy()).sum(1)
    np.testing.assert_allclose([objective.weights_at(step)[0] for step in range(20)], total, rtol=1e-5)


# Scalars


def moving():
    """A schedule over kd with its temperature and the task's weight."""
    scalars = {"task": torch.tensor([1.0, 0.5, 0.0]), "kd.temperature": torch.tensor([1.0, 5.0, 9.0])}
    return replace(schedule([[0.5], [1.0], [1.5]], ["kd"]), scalars=scalars)


def kd_objective(key="kd", **options):
    kd = distpro.build_loss("kd", [(4,)], [(4,)], temperature=4.0)
    return Objective(network(0), network(1), [Term(kd, key)], **options)


@pytest.mark.parametrize("options", [{}, {"task_weight": 0}, {"task_weight": 7.0}, {"task_weight": lambda step: 7.0}])
def test_scalars_move_the_task_weight_and_the_temperature(options):
    """Against the losses computed by hand at the step's numbers, also where the task was not computed before."""
    objective = kd_objective(**options).eval()
    objective.follow(moving(), total_steps=5)
    x, y = batch()
    student, teacher = (model(x) for model in (objective.student.model, objective.teacher.model))
    task = F.cross_entropy(student, y).item()
    for step, own, w, temperature in ((0, 1.0, 0.5, 1.0), (1, 0.75, 0.75, 3.0), (4, 0.0, 1.5, 9.0), (9, 0.0, 1.5, 9.0)):
        plain = distpro.build_loss("kd", [(4,)], [(4,)], temperature=temperature)(student, teacher).item()
        loss, parts = objective(x, y, step=step)
        assert parts["kd"].item() == pytest.approx(plain, rel=1e-6)
        assert loss.item() == pytest.approx(own * task + w * plain, rel=1e-5)


def test_another_schedule_takes_the_scalars_back():
    objective = kd_objective()
    objective.follow(moving(), total_steps=3)
    objective.at(2)
    assert objective.terms[0].loss.temperature == 9.0 and objective.task_weight_at(2) == 0.0
    objective.follow(replace(moving(), scalars={}), total_steps=3)
    assert objective.terms[0].loss.temperature == 4.0 and objective.task_weight_at(2) == 1.0
    objective.follow(moving(), total_steps=3)
    objective.at(2)
    objective.follow_equal()
    assert objective.terms[0].loss.temperature == 4.0 and objective.task_weight_at(2) == 1.0


def test_a_copy_moves_its_own_temperature():
    objective = kd_objective()
    objective.follow(moving(), total_steps=3)
    other = copy.deepcopy(objective)
    other.at(2)
    assert (objective.terms[0].loss.temperature, other.terms[0].loss.temperature) == (4.0, 9.0)


def test_a_mapping_joins_the_scalars_too():
    objective = kd_objective("mine")
    objective.follow(moving(), total_steps=3, mapping={"mine": "kd"})
    objective.at(1)
    assert objective.terms[0].loss.temperature == 5.0


def test_an_item_of_a_list_moves_with_the_schedule():
    hcl = distpro.build_loss("hcl", [(8, 4, 4)], [(8, 4, 4)], level_weights=[1.0, 1.0, 1.0, 1.0])
    objective = Objective(network(0), network(1), [Term(hcl, "hcl", ["5"], ["5"], weight=1.0), *free(["a"])])
    given = schedule([[0.5], [1.0]], ["a"])
    objective.follow(replace(given, scalars={"hcl.level_weights.1": torch.tensor([2.0, 3.0])}), total_steps=2)
    objective.at(1)
    assert list(hcl.level_weights) == [1.0, 3.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "name, values, message",
    [
        ("kdd.temperature", [1.0], "scalar 'kdd.temperature' is of no term; did you mean 'kd'"),
        ("temperature", [1.0], "scalar 'temperature' is of no term"),
        ("kd.temprature", [1.0], "'temprature' of term 'kd' cannot move .allowed: temperature, ce_weight"),
        ("kd.temperature.1", [1.0], "scalar 'kd.temperature.1': there is no such item"),
        ("kd.temperature", [0.0], "temperature must be .*above 0, got 0"),
    ],
)
def test_scalars_that_nothing_has_are_refused_before_the_first_step(name, values, message):
    objective = kd_objective()
    with pytest.raises(UserError, match=message):
        objective.follow(replace(schedule([[0.5]], ["kd"]), scalars={name: torch.tensor(values)}), total_steps=3)
    assert objective.terms[0].loss.temperature == 4.0


# Steps that are counted


def steps_of(objective, calls):
    """The steps that forward passes take themselves to be."""
    x, y = batch()
    found = []
    for mode, step in calls:
        objective.train(mode == "train")
        objective(x, y, **({} if step is None else {"step": step}))
        found.append(objective._step)
    return found


def test_without_a_step_the_calls_in_training_mode_are_counted():
    objective = Objective(network(0), network(1), free(["a"]))
    calls = [
        ("train", None),
        ("train", None),
        ("eval", None),
        ("eval", 0),
        ("train", None),
        ("train", 7),
        ("train", None),
    ]
    assert steps_of(objective, calls) == [0, 1, 2, 0, 2, 7, 8]
    objective.follow(schedule([[0.5], [1.0]], ["a"]), total_steps=2)
    assert steps_of(objective, [("train", None), ("train", None)]) == [0, 1]  # of this training
    objective.at(500)  # resumed
    assert steps_of(objective, [("eval", None), ("train", None), ("train", None)]) == [500, 500, 501]


def test_the_weights_of_the_counted_step_are_the_ones_in_the_loss():
    x, y = batch()
    objective = Objective(network(0), network(1), free(["a"]))
    objective.follow(schedule([[0.0], [1.0]], ["a"]), total_steps=3)
    for step in range(3):
        loss, parts = objective(x, y)
        assert (loss - parts["task"]).item() == pytest.approx(step / 2 * parts["a"].item(), rel=1e-4, abs=1e-6)


def test_accumulated_gradients_name_their_step():
    """Two batches a step: their weights are the step's, and the count goes on after it."""
    x, y = batch()
    objective = Objective(network(0), network(1), free(["a"]))
    objective.follow(schedule([[0.0], [1.0]], ["a"]), total_steps=2)
    for step in range(2):
        for _ in range(2):
            loss, parts = objective(x, y, step=step)
            assert (loss - parts["task"]).item() == pytest.approx(step * parts["a"].item(), rel=1e-4, abs=1e-6)
    assert objective._next_step == 2
