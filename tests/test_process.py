"""Weights and scalars that move in time by a written rule."""

from __future__ import annotations

import math

import pytest
import torch

from distpro.losses import build_loss
from distpro.objective import Objective, Term
from distpro.process import PROCESSES, Clock, is_process, parse_process
from pathways import UserError
from tests.pairs import Distance, batch, network, schedule

CLOCK = Clock(total_steps=101, steps_per_epoch=10)
HALF = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        (0.3, {0: 0.3, 100: 0.3}),
        ({"constant": {"value": 2}}, {0: 2, 57: 2}),
        ({"linear": {"initial": 1, "final": 0}}, {0: 1, 25: 0.75, 100: 0}),
        (
            {"linear": {"initial": 0, "final": 4, "start": 2, "end": 4, "by": "epoch"}},
            {0: 0, 20: 0, 25: 1, 40: 4, 99: 4},
        ),
        ({"linear": {"initial": 0, "final": 1, "start": 50, "end": 50, "by": "step"}}, {49: 0, 50: 1}),
        ({"cosine": {"initial": 1, "final": 0}}, {0: 1, 25: (1 + HALF) / 2, 50: 0.5, 75: (1 - HALF) / 2, 100: 0}),
        ({"cosine": {"initial": 2, "final": 6, "start": 10, "by": "step"}}, {10: 2, 55: 4, 100: 6}),
        ({"warmup": {"value": 0.6, "end": 2}}, {0: 0, 10: 0.3, 20: 0.6, 90: 0.6}),
        ({"warmup": {"value": 0.6, "end": 0}}, {0: 0.6}),
        ({"step": {"value": 1, "milestones": [0.5, 0.75]}}, {49: 1, 50: 0.1, 74: 0.1, 75: 0.01}),
        ({"name": "step", "value": 1, "gamma": 2, "milestones": [3], "by": "epoch"}, {29: 1, 30: 2}),
        ({"cyclic": {"low": 1, "high": 3, "period": 0.5}}, {0: 1, 25: 3, 50: 1, 75: 3}),
        ({"cyclic": {"low": 0, "high": 1, "period": 40, "by": "step"}}, {10: 0.5, 20: 1, 30: 0.5, 40: 0}),
        (
            {"cyclic": {"low": 0, "high": 1, "period": 4, "by": "epoch", "shape": "cosine"}},
            {10: 0.5, 20: 1, 5: (1 - HALF) / 2},
        ),
    ],
)
def test_values(spec, values):
    bound = parse_process(spec).bind(CLOCK)
    assert {step: bound(step) for step in values} == pytest.approx(values)


def test_every_process_is_tested_here():
    marks = test_values.pytestmark[0].args[1]
    named = {spec.get("name", next(iter(spec))) for spec, _ in marks if isinstance(spec, dict)}
    assert named | {"schedule"} == set(PROCESSES)


def test_a_training_of_one_step_is_its_first():
    assert parse_process({"linear": {"initial": 1, "final": 0}}).at(0, Clock(1)) == 0  # first and last step in one
    assert parse_process({"cosine": {"initial": 1, "final": 0, "end": 5, "by": "step"}}).at(0, Clock(1)) == 1


@pytest.fixture
def alpha(tmp_path):
    given = schedule([[0.1, 0.3], [0.5, 0.7]], ["kd", "at"], [[1, 1, 0], [2, 1, 0]])
    given.save(tmp_path / "alpha.pt")
    return str(tmp_path / "alpha.pt")


@pytest.mark.parametrize(
    ("changes", "first", "middle", "last"),
    [
        ({"key": "at"}, 0.3, 0.5, 0.7),
        ({"key": "kd", "scale": 10}, 1, 3, 5),
        ({"reduction": "total"}, 0.4, 0.8, 1.2),
        ({"reduction": "teacher_level", "key": "teacher_level.1"}, 0.1, 0.3, 0.5),
    ],
)
def test_a_column_of_a_schedule_file(alpha, changes, first, middle, last):
    bound = parse_process({"schedule": {"file": alpha, **changes}}).bind(CLOCK)
    assert [bound(0), bound(50), bound(100), bound(500)] == pytest.approx([first, middle, last, last], rel=1e-6)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"schedule": {"key": "kdd"}}, "no column 'kdd'; did you mean 'kd'"),
        ({"schedule": {}}, "key is missing .it has: kd, at"),
        ({"schedule": {"key": "kd", "reduction": "totl"}}, "unknown reduction 'totl'; did you mean 'total'"),
    ],
)
def test_a_schedule_without_that_column(alpha, spec, message):
    spec["schedule"]["file"] = alpha
    with pytest.raises(UserError, match=message):
        parse_process(spec).bind(CLOCK)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"lineer": {"initial": 1, "final": 0}}, "unknown process 'lineer'; did you mean 'linear'"),
        ({"linear": {"initial": 1}}, "missing a required argument: 'final'"),
        ({"linear": {"initial": 1, "fianl": 0}}, "no parameter 'fianl'; did you mean 'final'"),
        ({"linear": {"initial": "one", "final": 0}}, "'initial' is 'one', expected float"),
        ({"linear": {"initial": 1, "final": 0, "by": "fractoin"}}, "'fractoin'; did you mean 'fraction'"),
        ({"cyclic": {"low": 0, "high": 1, "period": 0}}, "period is 0"),
        ({"cyclic": {"low": 0, "high": 1, "period": 1, "shape": "saw"}}, "shape is 'saw'"),
        ({"cosine": 3}, "needs its parameters as a mapping"),
        ({"schedule": "totl"}, "unknown reduction 'totl'"),
        ({"linear": {}, "cosine": {}}, "is not a process"),
        ("fast", "is not a process"),
        (True, "is not a process"),
    ],
)
def test_what_is_no_process(spec, message):
    with pytest.raises(UserError, match=message):
        parse_process(spec)


def test_a_mapping_of_options_is_no_process():
    assert is_process({"linear": {"initial": 1, "final": 0}}) and is_process({"name": "step"})
    assert not any(map(is_process, ({"name": "hcl"}, {"decay": 1}, {"linear": 1, "cosine": 2}, 3, "linear")))


def test_a_weight_a_temperature_and_the_task_weight_move_in_an_objective():
    """Against the losses computed by hand at the step's numbers."""
    torch.manual_seed(0)
    kd = build_loss("kd", [(4,)], [(4,)])
    weight = parse_process({"linear": {"initial": 0.5, "final": 2.5}}).bind(CLOCK)
    temperature = parse_process({"linear": {"initial": 1, "final": 9}}).bind(CLOCK)
    task = parse_process({"linear": {"initial": 1, "final": 0}}).bind(CLOCK)
    term = Term(kd, "kd", weight=weight, scalars={"temperature": temperature})
    objective = Objective(network(0), network(1), [term], task_weight=task).eval()
    x, y = batch()
    student, teacher = (model(x) for model in (objective.student.model, objective.teacher.model))
    for step, w, t, own in ((0, 0.5, 1.0, 1.0), (50, 1.5, 5.0, 0.5), (100, 2.5, 9.0, 0.0)):
        loss, parts = objective(x, y, step=step)
        plain = build_loss("kd", [(4,)], [(4,)], temperature=t)(student, teacher)
        assert parts["kd"].item() == pytest.approx(plain.item(), rel=1e-6)
        assert loss.item() == pytest.approx(own * parts["task"].item() + w * plain.item(), rel=1e-6)


def test_an_item_of_a_list_moves():
    hcl = build_loss("hcl", [(2, 8, 8)], [(2, 8, 8)], level_weights=[1.0, 1.0, 1.0, 1.0])
    term = Term(hcl, "hcl", ["5"], ["5"], scalars={"level_weights.1": lambda step: 0.5 * step})
    student, teacher = torch.randn(2, 2, 2, 8, 8).unbind()
    term.at(4)
    expected = build_loss("hcl", [(2, 8, 8)], [(2, 8, 8)], level_weights=[1.0, 2.0, 1.0, 1.0])(student, teacher)
    assert torch.equal(term(student, teacher), expected)


def test_constant_processes_stand_beside_a_schedule():
    moving = Term(Distance(), "moving", ["5"], ["5"], weight=lambda step: 0.1 * step)
    objective = Objective(network(0), network(1), [moving, Term(Distance(), "a", ["5"], ["5"])])
    objective.follow(schedule([[0.2], [0.4]], ["a"]), total_steps=3)
    assert [objective.weights_at(step) for step in range(3)] == [
        pytest.approx(row) for row in ([0.0, 0.2], [0.1, 0.3], [0.2, 0.4])
    ]
    objective.follow_equal(scale=2.0)
    assert objective.weights_at(2) == pytest.approx([0.2, 2.0])
