"""What a user's own loop does to an objective's parts, from outside."""

import pytest
import torch
from torch import nn

from distpro.losses import build_loss
from distpro.objective import Objective, Term
from pathways.registry import UserError


def net(seed, width=6):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, 3))


X, Y = torch.randn(8, 5, generator=torch.Generator().manual_seed(3)), torch.arange(8) % 3


class Tied(nn.Module):
    """A loss of one's own with the student's head as its regressor."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, student, teacher, **_):
        return (self.head(student) - teacher.mean(1, keepdim=True)).pow(2).mean()


def test_a_term_that_holds_a_module_of_the_student_trains_it_once():
    teacher, student = net(0), net(1)
    objective = Objective(teacher, student, [Term(Tied(student[4]), "tied", ["2"], ["2"], 1.0)], X)
    trained = objective.trainable_parameters()
    assert [id(p) for p in trained] == [id(p) for p in student.parameters()]
    assert [len(group) for group in objective.clip_groups("module")] == [len(trained)]


def test_a_regressor_of_two_terms_is_clipped_once():
    head, student = nn.Linear(6, 1), net(1)
    terms = [Term(Tied(head), name, ["2"], ["2"], 1.0) for name in ("one", "two")]
    groups = Objective(net(0), student, terms, X).clip_groups("module")
    assert [len(group) for group in groups] == [len([*student.parameters()]), 2]


def kd(teacher, student, **more):
    return Objective(teacher, student, [Term(build_loss("kd", [(3,)], [(3,)]), "kd", weight=1.0)], X, **more)


def test_the_teacher_answers_in_evaluation_mode_whoever_has_trained_it():
    teacher = net(0)
    parent = nn.Module()
    parent.objective = kd(teacher, net(1))
    parent.teacher = teacher  # registered behind the objective, so that it is put into training mode last

    def loss():
        torch.manual_seed(0)  # of the student's dropout
        return parent.objective(X, Y)[1]["kd"]

    right, mean = loss(), teacher[1].running_mean.clone()
    for hand in (parent, teacher, teacher[1]):
        hand.train()
        assert any(m.training for m in teacher.modules())
        assert torch.equal(loss(), right)
        assert torch.equal(teacher[1].running_mean, mean)


def test_steps_are_counted_where_the_student_alone_was_put_back_into_training():
    student = net(1)
    kd_of_step = Term(build_loss("kd", [(3,)], [(3,)]), "kd", weight=lambda step: step + 1.0)
    objective = Objective(net(0), student, [kd_of_step], X)
    seen = []
    for _ in range(3):
        objective.eval()
        objective(X, Y)
        student.train()
        loss, parts = objective(X, Y)
        seen.append(((loss - parts["task"]) / parts["kd"]).item())
    assert seen == pytest.approx([1, 2, 3])


def test_a_task_that_is_weighted_later_is_computed():
    class Features(nn.Module):
        def forward(self, student, teacher, **_):
            return (student - teacher).pow(2).mean()

    student = net(1)
    objective = Objective(net(0), student, [Term(Features(), "features", ["2"], ["2"], 1.0)], X, task_weight=0.0)
    assert objective(X, Y)[1]["task"] == 0
    objective.task_weight = 1.0
    loss, parts = objective(X, Y)
    assert parts["task"] > 0.1
    loss.backward()
    assert student[4].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("way", ["assign", "data"])
def test_a_teacher_in_the_student_s_memory_is_refused(way):
    teacher, student = net(0), net(1)
    if way == "assign":
        student.load_state_dict(teacher.state_dict(), assign=True)
        student.requires_grad_(True)
    else:
        student[4].weight.data = teacher[4].weight.data
    with pytest.raises(UserError, match="share"):
        kd(teacher, student)


def test_terms_are_not_taken_out_from_under_trained_weights():
    objective = Objective(net(0), net(1), [Term(build_loss("kd", [(3,)], [(3,)]), "kd")], X)
    objective.follow_uncertainty()
    with pytest.raises(UserError, match="keep terms before"):
        objective.keep([])
