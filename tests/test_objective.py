"""The objective computes what it says, computes nothing else, and trains nothing but student and terms."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import distpro
from distpro.batch import batch_of
from distpro.losses import build_loss
from distpro.objective import Objective, Term
from pathways import UserError, build_pathways
from tests.pairs import Distance, Levels, batch, free, network, pooled, schedule


class Counting(nn.Module):
    """Counts its forward passes."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.inner(*args, **kwargs)


def kd_by_hand(student, teacher, temperature=4.0):
    p = torch.softmax(teacher / temperature, 1)
    difference = torch.log_softmax(teacher / temperature, 1) - torch.log_softmax(student / temperature, 1)
    return temperature**2 * (p * difference).sum(1).mean()


# The loss


def two_terms(dtype=torch.float64, **options):
    teacher, student = network(0).to(dtype), network(1).to(dtype)
    feature = Term(Distance().to(dtype), "feature", ["2"], ["2"], weight=0.3)
    return Objective(teacher, student, [feature, Term(distpro.build_loss("kd"), "kd", weight=2.0)], **options)


def test_loss_is_task_plus_weighted_terms():
    x, y = batch(torch.float64)
    objective = two_terms()
    student, teacher = (copy.deepcopy(t.model) for t in (objective.student, objective.teacher))
    loss, parts = objective(x, y)

    teacher.eval()
    ours, theirs = student[:3](x), teacher[:3](x)
    task = F.cross_entropy(student[3:](ours), y)
    feature = (0.5 * ours - theirs).square().mean()
    kd = kd_by_hand(student[3:](ours), teacher(x))
    assert torch.allclose(loss, task + 0.3 * feature + 2.0 * kd, rtol=1e-12)
    assert list(parts) == ["loss", "task", "feature", "kd"]
    assert not any(part.requires_grad for part in parts.values())
    for name, truth in {"loss": loss, "task": task, "feature": feature, "kd": kd}.items():
        assert parts[name].item() == pytest.approx(truth.item(), rel=1e-6), name  # terms are kept in float32


def test_gradients_are_those_of_the_loss_and_the_teacher_has_none():
    x, y = batch(torch.float64)
    objective = two_terms()
    student, teacher = (copy.deepcopy(t.model) for t in (objective.student, objective.teacher))
    objective(x, y)[0].backward()

    teacher.eval()
    factor = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    ours, theirs = student[:3](x), teacher[:3](x)
    output = student[3:](ours)
    loss = F.cross_entropy(output, y) + 0.3 * (factor * ours - theirs).square().mean()
    (loss + 2.0 * kd_by_hand(output, teacher(x))).backward()
    for found, truth in zip(objective.student.parameters(), student.parameters(), strict=True):
        assert torch.allclose(found.grad, truth.grad, rtol=1e-10, atol=1e-14)
    assert torch.allclose(objective.terms[0].loss.factor.grad, factor.grad, rtol=1e-10)
    assert all(p.grad is None and not p.requires_grad for p in objective.teacher.parameters())
    trained = {id(p) for p in objective.trainable_parameters()}
    assert trained == {id(p) for p in [*objective.student.parameters(), objective.terms[0].loss.factor]}


def test_target_and_index_reach_the_terms():
    class Reads(nn.Module):
        def forward(self, student, teacher, target=None, index=None):
            return (student[torch.arange(len(target)), target] * index).sum()

    x, y = batch()
    objective = Objective(network(0), network(1), [Term(Reads(), "reads", weight=1.0)])
    index = torch.tensor([9, 4, 7, 0, 2])
    output = copy.deepcopy(objective.student.model)(x)
    expected = sum(output[n, y[n]] * index[n] for n in range(len(y)))
    assert objective(x, y, index)[1]["reads"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("task_loss", [F.cross_entropy, lambda output, y: output.square().mean()])
def test_bfloat16_is_autocast_of_models_and_terms_with_the_task_loss_in_full(task_loss):
    x, y = batch()
    objective = two_terms(torch.float32, precision=torch.bfloat16, task_loss=task_loss)
    student, teacher = (copy.deepcopy(t.model) for t in (objective.student, objective.teacher))
    done = objective.training_pass(batch_of(x, y), weights=objective.weights_at(0))
    done.loss.backward()

    with torch.autocast("cpu", torch.bfloat16):
        output = student(x)
        kd = distpro.build_loss("kd")(output, teacher.eval()(x))
    assert done.output.dtype is output.dtype is torch.bfloat16
    assert done.loss.dtype is torch.float32
    assert torch.equal(done.task, task_loss(output.float(), y))
    assert torch.equal(done.terms[1], kd.float())
    assert all(p.grad.dtype is torch.float32 for p in objective.trainable_parameters())


# Modes and statistics


@pytest.mark.parametrize("teacher_training", [False, True])
def test_modes_of_student_and_teacher(teacher_training):
    objective = two_terms(teacher_training=teacher_training)
    for mode in (True, False, True):
        assert objective.train(mode) is objective
        assert all(m.training is mode for m in objective.student.model.modules())
        assert all(m.training is mode for m in objective.terms.modules())
        assert all(m.training is (mode and teacher_training) for m in objective.teacher.model.modules())
    teacher = copy.deepcopy(objective.teacher.model)
    x, y = batch(torch.float64)
    objective(x, y)
    means = [m[1].running_mean for m in (objective.teacher.model, teacher)]
    assert torch.equal(*means) is not teacher_training


def test_follow_keeps_the_modes():
    objective = two_terms()
    objective.terms[0].weight = None
    objective.follow(schedule([[0.0]], ["feature"]), 3)
    assert objective.student.model.training and not objective.teacher.model.training


class Branching(nn.Sequential):
    """Cannot be traced, so its taps are read by hooks."""

    def forward(self, x):
        return super().forward(x if x.sum() < 1e9 else -x)


@pytest.mark.parametrize("kind", [nn.Sequential, Branching])
@pytest.mark.parametrize("capture", [False, True])
def test_batchnorm_statistics_are_updated_once_a_step(kind, capture):
    x, y = batch()
    student = kind(*network(1))
    plain = copy.deepcopy(student)
    objective = Objective(network(0), student, build_pathways(network(0), student, x, ["2", "5"], ["2", "5"]))
    assert objective.student.traced is (kind is nn.Sequential)
    for _ in range(2):
        objective.training_pass(batch_of(x, y), weights=objective.weights_at(0), capture=capture).loss.backward()
        plain(x)
    for (name, found), truth in zip(student.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(found, truth), name
    for term in objective.terms:
        assert {b.item() for n, b in term.named_buffers() if n.endswith("num_batches_tracked")} == {2}


# What is not needed is not computed


def counted(weights, dtype=torch.float32):
    """An objective whose teacher and terms count their passes."""
    teacher = Counting(network(0))
    losses = [Counting(Distance()) for _ in weights]
    terms = [
        Term(loss, f"t{n}", ["5"], ["inner.5"], w) for n, (loss, w) in enumerate(zip(losses, weights, strict=True))
    ]
    objective = Objective(teacher, network(1), terms)
    teacher.calls = 0
    return objective, teacher, losses


@pytest.mark.parametrize(("weights", "calls"), [([0.0, 1.0, 0.5], [0, 1, 1]), ([0.0, 0.0, 2.0], [0, 0, 1])])
def test_terms_of_weight_zero_are_not_computed(weights, calls):
    objective, teacher, losses = counted(weights)
    loss, parts = objective(*batch())
    assert [spy.calls for spy in losses] == calls and teacher.calls == 1
    assert [parts[f"t{n}"].item() > 0 for n in range(3)] == [bool(c) for c in calls]
    active = sum(w * parts[f"t{n}"] for n, w in enumerate(weights))
    assert loss.item() == pytest.approx((parts["task"] + active).item(), rel=1e-6)


@pytest.mark.parametrize("weights", [[], [0.0], [0.0, 0.0]])
def test_the_teacher_does_not_run_without_an_active_term(weights):
    objective, teacher, losses = counted(weights)
    loss, parts = objective(*batch())
    assert teacher.calls == 0 and not any(spy.calls for spy in losses)
    assert loss == parts["task"]


def test_an_done_without_active_terms_still_has_views_for_each():
    objective, _, _ = counted([0.0, 0.0])
    assert objective.training_pass(batch_of(*batch()), weights=[0.0, 0.0], capture=True).views == [{}, {}]


def test_a_tap_that_needs_no_gradient_can_be_captured():
    """A frozen part of the student, or its input."""
    student = network(1)
    student[0].requires_grad_(False)
    terms = [Term(Distance(), "frozen", ["0:input"], ["0:input"], 1.0), Term(Distance(), "free", ["5"], ["5"], 1.0)]
    done = Objective(network(0), student, terms).training_pass(batch_of(*batch()), weights=[1.0, 1.0], capture=True)
    done.loss.backward()
    assert done.views[0]["0:input"].grad is None
    assert done.views[1]["5"].grad is not None


def test_terms_that_a_schedule_never_uses_are_taken_out():
    teacher, student = network(0), network(1)
    first, second = (Counting(Distance()) for _ in range(2))
    objective = Objective(teacher, student, [Term(first, "a", ["2"], ["2"]), Term(second, "b", ["5"], ["5"])])
    objective.follow(schedule([[0.0, 0.1], [0.0, 0.0]], ["a", "b"]), total_steps=2)
    assert objective.keys == ["b"]
    assert objective.student.names == objective.teacher.names == ["5"]
    trained = {id(p) for p in objective.trainable_parameters()}
    assert id(second.inner.factor) in trained and id(first.inner.factor) not in trained
    for step in (0, 1):
        _, parts = objective(*batch(), step=step)
        assert list(parts) == ["loss", "task", "b"]
    assert (first.calls, second.calls) == (0, 1)  # b has weight 0 at its second step


# In somebody's own loop


def test_own_training_loop():
    """The loop of the documentation ends where the same training written by hand ends."""
    batches = [batch(torch.float64, n) for n in (4, 6, 4, 6)]
    teacher, student = network(0).double(), network(1).double()
    theirs, ours = copy.deepcopy((teacher.eval(), student))

    objective = distpro.Objective(teacher, student, [Term(distpro.build_loss("kd"), "kd")], example_input=batches[0][0])
    objective.follow(schedule([[0.8], [0.0]], ["kd"]), total_steps=len(batches))
    optimizer = torch.optim.SGD(objective.trainable_parameters(), lr=0.1, momentum=0.9)
    for step, (x, y) in enumerate(batches):
        loss, parts = objective(x, y, step=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert parts["loss"] == parts["task"]

    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    for step, (x, y) in enumerate(batches):
        output = ours(x)
        loss = F.cross_entropy(output, y) + 0.8 * (1 - step / 3) * kd_by_hand(output, theirs(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for (name, found), truth in zip(student.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.allclose(found, truth, rtol=1e-6, atol=1e-8), name  # the schedule is in float32


# Wrong use


def test_a_loss_that_does_not_have_the_levels_it_is_weighted_by():
    terms = [Term(Levels(), "a", ["2", "5", "logits"], ["2", "5"], per_level=True, weight=1.0)]
    objective = Objective(network(0), network(1), terms)
    objective.terms[0].loss.levels = lambda student, teacher, target=None, index=None: torch.zeros(3)
    with pytest.raises(UserError, match="term 'a' gives 3 losses for 2 teacher taps"):
        objective(*batch())


@pytest.mark.parametrize("given", [None, 0.5, [torch.zeros(())]])
def test_what_a_loss_gives_is_a_tensor(given):
    term = Term(lambda student, teacher, target, index: given, "mine", weight=1.0)
    with pytest.raises(
        UserError, match=f"^term 'mine' gave {re.escape(repr(given))}, expected a tensor of one number$"
    ):
        Objective(network(0), network(1), [term])(*batch())


class Masked(nn.Module):
    masked = True

    def forward(self, student, teacher, target=None, index=None):
        return (student - teacher).square().mean()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda t, s: Objective(None, s, free(["a"])), "terms need a teacher"),
        (lambda t, s: Objective(t, s, free(["a", "a"])), "two terms have one key among a, a"),
        (lambda t, s: Objective(t, s, [Term(Distance(), "a", ["layer1"], ["5"])]), "no module 'layer1' to tap"),
        (lambda t, s: Objective(t, s, [Term(Distance(), "a", ["5"], ["5:out"])]), "did you mean 'output'"),
        (lambda t, s: Objective(t, s, free(["a"])).follow(pooled(), 1), "no column for term 'a'"),
        (
            lambda t, s: Term(nn.MSELoss(), "m"),
            r"term 'm': MSELoss.forward\(.*\) is called as forward\(student, teacher, target=",
        ),
        (lambda t, s: Term(Masked(), "m"), "unexpected keyword argument 'mask'"),
        (lambda t, s: Objective(t, s, free(["p0"])).follow(pooled(), 1), "7 of 8 columns fit no term"),
        (lambda t, s: Objective(t, s, free(["p0"])).follow(pooled(), 0), "interpolated to 0 steps"),
        (lambda t, s: Objective(t, s, free(["a"], reduction="totl")).follow(pooled(), 1), "did you mean 'total'"),
        (
            lambda t, s: Objective(t, s, free(["a"])).follow(schedule([[1.0]], ["kd"]), 1, mapping={"a": "kdd"}),
            "no column 'kdd'; did you mean 'kd'",
        ),
    ],
)
def test_wrong_use(build, message):
    with pytest.raises(UserError, match=message):
        build(network(0), network(1))


class Bilinear(nn.Bilinear):
    def forward(self, student, teacher, target=None, index=None):
        return super().forward(student, teacher).mean()


@pytest.mark.parametrize("term", [[], [Term(Bilinear(3, 3, 1), "b", weight=0.0)]])
def test_a_student_without_parameters(term):
    objective = Objective(nn.Linear(4, 3), nn.Softmax(-1), term)
    with pytest.raises(UserError, match="objective: the student has no parameters: there is nothing to train"):
        objective(*batch())


@pytest.mark.parametrize("weights", [[1.0], [1.0] * 3, torch.ones(1)])
def test_weights_of_another_number_than_the_terms_are_refused(weights):
    terms = [Term(build_loss("kd"), "one"), Term(build_loss("kd"), "two")]
    objective = Objective(nn.Linear(4, 3), nn.Linear(4, 3), terms)
    with pytest.raises(UserError, match="weights for 2 term losses"):
        objective.training_pass(batch_of(torch.randn(2, 4), torch.tensor([0, 1])), weights)


# The usual loop: student.train(), steps, student.eval(), validation


def small(width):
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, 3)
    )


def test_frozen_statistics_stay_whatever_mode_the_student_is_put_into():
    torch.manual_seed(0)
    student = small(4)
    x, y = torch.randn(6, 3, 6, 6) * 3 + 1, torch.arange(6) % 3
    objective = Objective(small(8), student, frozen=[student[1]])
    before = student[1].running_mean.clone()
    for _ in range(2):
        student.eval()
        student.train()
        objective(x, y)
    assert torch.equal(student[1].running_mean, before) and student[4].training


def test_validation_takes_no_step():
    torch.manual_seed(0)
    steps = []
    term = Term(build_loss("kd", [(3,)], [(3,)]), "kd", weight=lambda step: steps.append(step) or float(step))
    objective = Objective(small(8), small(4), [term])
    student = objective.student.model
    x, y = torch.randn(6, 3, 6, 6), torch.arange(6) % 3
    for _ in range(2):
        student.train()
        objective(x, y)
        student.eval()
        with torch.no_grad():
            for _ in range(3):
                objective(x, y)
    student.train()
    del steps[:]
    objective(x, y)
    assert set(steps) == {2}
