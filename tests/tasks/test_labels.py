"""Labels that do not fit are said in a line, and none is taken for another."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

from distpro.batch import Batch, batch_of
from distpro.data.collating import check_targets
from distpro.losses import build_loss
from distpro.objective import Objective, Term
from distpro.tasks import Classification, Segmentation
from pathways import UserError

LOGITS = torch.tensor([[5.0, 0, 0], [0, 5.0, 0], [0, 0, 5.0], [5.0, 0, 0]])


def test_probabilities_count_by_their_largest():
    metrics = Classification().metrics()
    soft = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.4, 0.6, 0], [0.2, 0.7, 0.1]])
    metrics.update(LOGITS, batch_of(torch.zeros(4, 2), soft))
    found = metrics.compute()
    assert found["accuracy"] == 50 and found["top5"] == 100
    assert found["loss"] == pytest.approx(F.cross_entropy(LOGITS, soft).item())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_whole_numbers_of_any_kind_are_labels(dtype):
    target = torch.tensor([0, 1, 2, 0])
    batch = batch_of(torch.zeros(4, 2), target.to(dtype))
    assert Classification().loss(LOGITS, batch) == F.cross_entropy(LOGITS, target)
    assert Classification().labels(batch)[0].dtype is torch.int64
    maps = target.view(4, 1, 1).expand(4, 2, 2)
    dense = LOGITS.view(4, 3, 1, 1).expand(4, 3, 2, 2)
    found = Segmentation().loss(dense, batch_of(torch.zeros(4, 3, 2, 2), maps.to(dtype)))
    assert found.item() == pytest.approx(F.cross_entropy(dense, maps).item(), rel=1e-6)


@pytest.mark.parametrize(
    ("task", "target", "message"),
    [
        (Classification(), torch.tensor([0, 1, 2, 3]), "there is a label 3, but the model's classes are 0 to 2"),
        (Classification(), torch.tensor([0, 1, 2, -100]), "there is a label -100, but"),
        (Classification(), torch.tensor([0.0, 1, 2, 0]), "labels are class numbers, got float32"),
        (
            Classification(),
            torch.eye(3)[[0, 1, 2, 0]].long(),
            r"one-hot labels \(4, 3\) of int64: give class numbers, .*float",
        ),
        (Classification(), torch.eye(3)[[0, 1, 2, 0]].bool(), r"one-hot labels \(4, 3\) of bool"),
        (Classification(), torch.full((4, 3), 2), r"a response \(4, 3\) .* \(4, 3\)"),
        (Classification(), torch.ones(4, 1).long(), r"a response \(4, 3\) .* \(4, 1\)"),
        (Classification(), ["a", "b", "c", "a"], "labels are a tensor of class numbers, got list"),
        (
            Segmentation(),
            torch.full((4, 2, 2), 3),
            r"a label 3, but .* 0 to 2, and 255 where a position does not count",
        ),
        (Segmentation(), torch.full((4, 2, 2), -1), "there is a label -1"),
        (Segmentation(), torch.zeros(4, 1, 2, 2).long(), r"labels are maps \(N, H, W\), got \(4, 1, 2, 2\)"),
        (Segmentation(), torch.zeros(4).long(), r"labels are maps \(N, H, W\), got \(4,\)"),
        (Segmentation(), torch.zeros(4, 10, 30).long(), "a response of 30x10 does not fit label maps of 10x30"),
    ],
)
def test_what_does_not_fit_is_said(task, target, message):
    output = LOGITS
    if isinstance(task, Segmentation):
        size = (30, 10) if "30x10" in message else (2, 2)
        output = LOGITS.view(4, 3, 1, 1).expand(4, 3, *size)
    batch = Batch(torch.zeros(4, 3, 2, 2), target, 4)
    for use in (lambda: task.loss(output, batch), lambda: task.metrics().update(output, batch)):
        with pytest.raises(UserError, match=message):
            use()


@pytest.mark.parametrize("smoothing", [-1, 1, 2.0])
def test_label_smoothing_has_a_range(smoothing):
    for task in (Classification, Segmentation):
        with pytest.raises(UserError, match="label_smoothing must be at least 0 and below 1"):
            task(label_smoothing=smoothing)


def test_pictures_are_of_images_only():
    target = torch.zeros(2, 4, 4).long()
    dense = torch.zeros(2, 3, 4, 4)
    assert Segmentation().pictures(dense, batch_of({"x": torch.zeros(2, 3, 4, 4)}, target)) is None
    assert Segmentation().pictures(dense, batch_of(torch.zeros(2, 4, 4, 4), target)) is None
    assert Segmentation().pictures(dense, batch_of(torch.zeros(2, 1, 4, 4), target)).shape == (2, 3, 4, 12)


def test_targets_of_another_number_than_the_samples_are_refused():
    with pytest.raises(UserError, match="inputs has 1 rows, but there are 8 targets"):
        check_targets(1, torch.zeros(8))
    check_targets(8, torch.zeros(8))
    check_targets(8, [{}] * 8)


# The objective


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def test_a_tap_may_be_read_twice():
    """In pairs with others: the third pair counts too."""
    teacher, student = network(0), network(1)
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    shapes = [(4, 6, 6), (4, 4, 4), (4, 6, 6)]
    loss = build_loss("at", shapes, [shapes[0], shapes[1], shapes[1]])
    term = Term(loss, "at", ["1", "3", "1"], ["1", "3", "3"])
    done = Objective(teacher, student, [term], x).training_pass(batch_of(x, y), [1.0], capture=True)
    first, second, third, fourth = (net[:n](x) for net in (student, teacher) for n in (2, 4))
    expected = loss([first, second, first], [third, fourth, fourth])
    assert done.terms[0].item() == pytest.approx(expected.item(), rel=1e-6)
    assert set(done.views[0]) == {"1", "3"}


def test_parameters_that_teacher_and_student_share_are_refused():
    teacher, student = network(0), network(1)
    student[0] = teacher[0]
    with pytest.raises(UserError, match="teacher and student share parameters"):
        Objective(teacher, student, [Term(build_loss("kd"), "kd")])
    student[0].requires_grad_(False)  # frozen in both: nothing is lost
    Objective(teacher, student, [Term(build_loss("kd"), "kd")])


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


@pytest.mark.parametrize("shared", [nn.Dropout(0.5), nn.RReLU(), StochasticDepth(0.5, "row"), Noisy()])
def test_modules_with_modes_that_teacher_and_student_share_are_refused(shared):
    name = type(shared).__name__
    with pytest.raises(UserError, match=rf"share what works differently in training \({name}\); copy it"):
        Objective(network(0).append(shared), network(1).append(shared), [Term(build_loss("kd"), "kd")])


def test_statistics_that_teacher_and_student_share_are_refused():
    teacher, student = network(0).append(nn.BatchNorm1d(3)), network(1).append(nn.BatchNorm1d(3))
    teacher[-1].running_mean = student[-1].running_mean
    with pytest.raises(UserError, match=r"share what works differently in training \(BatchNorm1d\)"):
        Objective(teacher, student, [Term(build_loss("kd"), "kd")])


@pytest.mark.parametrize(
    "weight",
    [
        float("nan"),
        float("inf"),
        "yes",
        True,
        torch.tensor([1.0, 2.0]),
        torch.tensor(torch.nan),
        torch.tensor(True),
        1j,
    ],
)
def test_a_weight_is_a_finite_number(weight):
    with pytest.raises(UserError, match="term 'kd': weight: expected a finite number or step → number"):
        Term(build_loss("kd"), "kd", weight=weight)
    with pytest.raises(UserError, match="objective: task_weight: expected a finite number"):
        Objective(None, network(0), [], task_weight=weight)


def test_only_a_term_may_be_without_a_weight():
    assert Term(build_loss("kd"), "kd", weight=torch.tensor(2.0)).weight == 2
    with pytest.raises(UserError, match="objective: task_weight: expected a finite number .*, found None"):
        Objective(None, network(0), [], task_weight=None)


@pytest.mark.parametrize("given", [float("nan"), float("inf"), None, "1"])
def test_a_process_gives_finite_numbers(given):
    def process(step):
        return 1.0 if step < 2 else given

    x, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    for key, objective in {
        "term 'kd': weight": Objective(network(0), network(1), [Term(build_loss("kd"), "kd", weight=process)]),
        "objective: task_weight": Objective(None, network(1), [], task_weight=process),
    }.items():
        objective(x, y, step=1)
        with pytest.raises(UserError, match=f"{key}: expected a finite number, found {given!r} at step 2"):
            objective(x, y, step=2)


def test_steps_are_counted_from_0():
    objective = Objective(network(0), network(1), [Term(build_loss("kd"), "kd")])
    with pytest.raises(UserError, match="step is -1: the training steps are counted from 0"):
        objective(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]), step=-1)


def test_an_objective_is_not_pickled():
    objective = Objective(None, network(0), [], torch.randn(2, 3, 8, 8))
    with pytest.raises(UserError, match=r"a tapped Sequential .* cannot be pickled: save its state_dict\(\)"):
        pickle.dumps(objective)
    copy.deepcopy(objective)


def test_features_and_logits_need_no_name_where_no_term_reads_logits():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            return x, self.head(x)

    student, x, y = Both(), torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    objective = Objective(None, student, [], x, task_loss=lambda output, target: F.cross_entropy(output[1], target))
    assert objective(x, y)[0] == F.cross_entropy(student.head(x), y)


def test_a_task_loss_that_is_no_scalar_is_said():
    objective = Objective(None, nn.Linear(6, 3), task_loss=lambda output, target: output)
    with pytest.raises(UserError, match=r"loss must be a scalar tensor, got a tensor \(4, 3\)"):
        objective(torch.randn(4, 6), torch.zeros(4).long())
