"""A schedule drives the terms of an objective: by key, by level, by mapping, or summed up."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import distpro
from distpro.objective import Objective, Term
from distpro.weights import replay
from pathways import UserError, build_pathways
from tests.pairs import Distance, Levels, batch, free, network, pooled, schedule


def weights_by_key(objective, step):
    return dict(zip(objective.keys, objective.weights_at(step), strict=True))


def test_follow_by_key_interpolates_and_leaves_constants_alone():
    terms = [*free(["a"]), Term(Distance(), "constant", ["5"], ["5"], weight=0.7), *free(["b"])]
    objective = Objective(network(0), network(1), terms)
    given = schedule([[0.4, 0.0], [0.2, 0.6]], ["b", "a"])  # in another order than the terms
    objective.follow(given, total_steps=5, scale=2.0)
    for step in range(5):
        part = step / 4
        expected = [2 * 0.6 * part, 0.7, 2 * (0.4 - 0.2 * part)]
        assert objective.weights_at(step) == pytest.approx(expected, abs=1e-6)
    assert objective.weights_at(17) == objective.weights_at(4)  # training goes on: the last weights stay


def test_scale_may_depend_on_the_step():
    objective = Objective(network(0), network(1), free(["a"]))
    objective.follow(schedule([[0.5]], ["a"]), total_steps=4, scale=lambda step: 0.25 * (step + 1))
    assert [objective.weights_at(step)[0] for step in range(4)] == pytest.approx([0.125, 0.25, 0.375, 0.5])


@pytest.mark.parametrize(
    "how, expected",
    [
        ("searched", lambda w: [w[2], (w[2] + w[3]) / 2, w[3]]),
        ("final", lambda w: [w[3]] * 3),
        ("mean", lambda w: [(w[2] + w[3]) / 2] * 3),
        ("permuted", lambda w: [w[2].flip(0), (w[2] + w[3]).flip(0) / 2, w[3].flip(0)]),
        ("shuffled", lambda w: [w[3], (w[2] + w[3]) / 2, w[2]]),
    ],
)
def test_a_replay_may_leave_out_the_beginning(how, expected):
    """Of four steps the first two; every control works on what is left."""
    weights = torch.tensor([[0.9, 0.9], [0.8, 0.8], [0.1, 0.2], [0.4, 0.3]])
    given = schedule(weights.tolist(), ["a", "b"])
    seed = next(
        s for s in range(99) if torch.randperm(2, generator=torch.Generator().manual_seed(s)).tolist() == [1, 0]
    )
    objective = Objective(network(0), network(1), free(["a", "b"]))
    replay(objective, how, 3, given, start=0.5, seed=seed)
    for step, row in enumerate(expected(weights)):
        assert objective.weights_at(step) == pytest.approx(row.tolist(), abs=1e-6)


def test_the_threshold_drops_a_process_while_its_alpha_is_low():
    objective = Objective(network(0), network(1), free(["a", "b"]))
    alpha_tilde = [[1.0, 1.0], [0.5, 1.0], [0.6, 1.0]]  # at or below τ is dropped
    given = schedule([[0.2, 0.3]] * 3, ["a", "b"], alpha_tilde=alpha_tilde)
    objective.follow(given, total_steps=3, threshold=0.5)
    assert [objective.weights_at(step)[0] for step in range(3)] == pytest.approx([0.2, 0.0, 0.2])
    assert [objective.weights_at(step)[1] for step in range(3)] == pytest.approx([0.3] * 3)
    objective.follow(given, total_steps=3, threshold=None)
    assert objective.weights_at(1) == pytest.approx([0.2, 0.3])


def test_follow_by_level_on_another_pair():
    """Module names differ, levels and transforms agree."""
    keys = ["layer1<-stage1@conv1x1", "layer2<-stage1@conv1x1", "layer1<-stage1@conv3x3", "layer2<-stage1@conv3x3"]
    given = schedule(
        [[0.1, 0.2, 0.3, 0.4]],
        keys,
        [[1, 1, 1], [2, 1, 1], [1, 1, 2], [2, 1, 2]],
        ["conv1x1", "conv1x1"] + ["conv3x3"] * 2,
    )
    teacher, student = network(0), network(1)
    space = build_pathways(teacher, student, batch()[0], ["2", "5"], ["5"], transforms=["conv3x3", "conv1x1"])
    objective = Objective(teacher, student, space)
    objective.follow(given, total_steps=2)
    expected = {"2<-5@conv1x1": 0.1, "5<-5@conv1x1": 0.2, "2<-5@conv3x3": 0.3, "5<-5@conv3x3": 0.4}
    assert weights_by_key(objective, 1) == pytest.approx(expected)


def test_follow_with_a_mapping():
    objective = Objective(network(0), network(1), free(["mine", "other"]))
    given = schedule([[0.1, 0.2]], ["a", "b"])
    with pytest.raises(UserError, match="no column for term 'mine'"):
        objective.follow(given, total_steps=1)
    objective.follow(given, total_steps=1, mapping={"mine": "b", "other": "a"})
    assert objective.weights_at(0) == pytest.approx([0.2, 0.1])


def test_one_loss_follows_the_total():
    """KD, and a second response loss, driven by the sum of all pathways' weights."""
    terms = [
        Term(distpro.build_loss("kd"), "kd", reduction="total"),
        Term(distpro.build_loss("dist"), "dist", reduction="total"),
    ]
    objective = Objective(network(0), network(1), terms)
    objective.follow(pooled(), total_steps=1, scale=3.0)
    assert weights_by_key(objective, 0) == pytest.approx({"kd": 3 * 0.36, "dist": 3 * 0.36})


def test_a_loss_per_connection_follows_its_connection():
    terms = [
        Term(distpro.build_loss("at"), f"at{i}{j}", [s], [t], level=(i, j, 0), reduction="connection")
        for i, t in ((1, "2"), (2, "5"))
        for j, s in ((1, "2"), (2, "5"))
    ]
    objective = Objective(network(0), network(1), terms)
    objective.follow(pooled(), total_steps=1)
    expected = {"at11": 0.01 + 0.05, "at12": 0.02 + 0.06, "at21": 0.03 + 0.07, "at22": 0.04 + 0.08}
    assert weights_by_key(objective, 0) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("teacher_level", {"at11": 0.14, "at12": 0.14, "at21": 0.22, "at22": 0.22}),
        ("student_level", {"at11": 0.16, "at12": 0.20, "at21": 0.16, "at22": 0.20}),
    ],
)
def test_losses_per_connection_may_follow_the_levels_of_one_side(reduction, expected):
    terms = [
        Term(distpro.build_loss("at"), f"at{i}{j}", [s], [t], level=(i, j, 0), reduction=reduction)
        for i, t in ((1, "2"), (2, "5"))
        for j, s in ((1, "2"), (2, "5"))
    ]
    objective = Objective(network(0), network(1), terms)
    objective.follow(pooled(), total_steps=1)
    assert weights_by_key(objective, 0) == pytest.approx(expected)


def test_the_levels_of_one_loss_follow_the_teacher_levels():
    """ReviewKD: one module, one weight per teacher level."""
    x, y = batch()
    taps, shapes = ["2", "5"], [(6, 8, 8), (8, 4, 4)]
    review = distpro.build_loss("review", student_shapes=shapes, teacher_shapes=shapes)
    term = Term(review, "review", taps, taps, per_level=True, reduction="teacher_level")
    objective = Objective(network(0), network(1), [term])
    student, teacher, again = copy.deepcopy((objective.student.model, objective.teacher.model, review))
    objective.follow(pooled(), total_steps=1)
    loss, parts = objective(x, y)

    weights = [0.01 + 0.02 + 0.05 + 0.06, 0.03 + 0.04 + 0.07 + 0.08]
    assert weights_by_key(objective, 0) == pytest.approx({"review.1": weights[0], "review.2": weights[1]})
    teacher.eval()
    levels = again.levels([student[:3](x), student[:6](x)], [teacher[:3](x), teacher[:6](x)])
    assert [parts[f"review.{i}"].item() for i in (1, 2)] == pytest.approx(levels.tolist(), rel=1e-5)
    expected = F.cross_entropy(student(x), y) + weights[0] * levels[0] + weights[1] * levels[1]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_reductions_and_columns_of_their_own_side_by_side():
    terms = [*free([f"p{n}" for n in range(8)]), Term(distpro.build_loss("kd"), "kd", reduction="total")]
    objective = Objective(network(0), network(1), terms)
    objective.follow(pooled(), total_steps=1)
    expected = {f"p{n}": 0.01 * (n + 1) for n in range(8)} | {"kd": 0.36}
    assert weights_by_key(objective, 0) == pytest.approx(expected)


def test_follow_equal_shares_one_among_the_terms_without_a_weight():
    terms = [*free(["a", "b"]), Term(Levels(), "c", ["2", "5"], ["2", "5"], per_level=True)]
    objective = Objective(network(0), network(1), [*terms, Term(distpro.build_loss("kd"), "kd", weight=0.9)])
    objective.follow_equal(scale=lambda step: step + 1)
    assert objective.weights_at(1) == pytest.approx([0.5, 0.5, 0.5, 0.5, 0.9])
