"""Multi-label classification and regression, against PyTorch's losses and scikit-learn's metrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import distpro
from distpro.batch import batch_of
from distpro.tasks import MultiLabel, Regression

sklearn = pytest.importorskip("sklearn.metrics")


def scores(ties=False):
    """Response and targets (40, 5); the last class does not occur."""
    generator = torch.Generator().manual_seed(0)
    response = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    target = (torch.rand(40, 5, generator=generator) < torch.tensor([0.5, 0.1, 0.3, 0.9, 0.0])).long()
    return (response.mul(2).round() / 2 if ties else response), target


def evaluated(metrics, response, target, parts=3):
    """In batches, of which some are another process's."""
    ours, theirs = metrics(), metrics()
    for n, (r, t) in enumerate(zip(response.chunk(parts), target.chunk(parts), strict=True)):
        (theirs if n == 1 else ours).update(r, batch_of(r, t))
    ours.merge([ours.state(), theirs.state()])
    return ours.compute()


@pytest.mark.parametrize("ties", [False, True])
def test_the_metrics_are_scikit_learns(ties):
    response, target = scores(ties)
    found = evaluated(MultiLabel().metrics, response, target)
    said, true = (response > 0).numpy(), target.numpy()
    assert found["map"] == pytest.approx(100 * sklearn.average_precision_score(true[:, :4], response.numpy()[:, :4]))
    assert found["f1"] == pytest.approx(100 * sklearn.f1_score(true, said, average="macro", zero_division=0))
    assert found["f1_micro"] == pytest.approx(100 * sklearn.f1_score(true, said, average="micro"))
    assert found["loss"] == pytest.approx(nn.BCEWithLogitsLoss()(response, target.double()).item())


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 0.0, 3.0]])
def test_the_loss_is_pytorchs(weights):
    response, target = scores()
    truth = nn.BCEWithLogitsLoss(pos_weight=None if weights is None else torch.tensor(weights).double())
    assert MultiLabel(weights).loss(response, batch_of(response, target)).item() == pytest.approx(
        truth(response, target.double()).item(), abs=1e-12
    )


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize(("loss", "truth"), [("mse", nn.MSELoss()), ("huber", nn.HuberLoss()), ("l1", nn.L1Loss())])
def test_regression(outputs, loss, truth):
    generator = torch.Generator().manual_seed(0)
    response = torch.randn(40, outputs, generator=generator, dtype=torch.float64)
    target = response + 0.5 * torch.randn(40, outputs, generator=generator, dtype=torch.float64) + 100
    task = Regression(loss, outputs)
    assert task.loss(response, batch_of(response, target)).item() == pytest.approx(truth(response, target).item())
    found = evaluated(task.metrics, response, target)
    arrays = target.numpy(), response.numpy()
    assert found["mae"] == pytest.approx(sklearn.mean_absolute_error(*arrays))
    assert found["rmse"] == pytest.approx(np.sqrt(sklearn.mean_squared_error(*arrays)))
    assert found["r2"] == pytest.approx(sklearn.r2_score(*arrays))
    assert found["loss"] == pytest.approx(truth(response, target).item())
    if outputs == 1:  # (N,) is (N, 1)
        assert task.loss(response[:, 0], batch_of(response, target)) == task.loss(
            response, batch_of(response, target[:, 0])
        )


@pytest.mark.parametrize(("response", "r2"), [([2.0, 2.0], 1.0), ([2.0, 3.0], 0.0)])
def test_r2_of_a_constant_is_scikit_learns(response, r2):
    target, response = torch.tensor([2.0, 2.0]), torch.tensor(response)
    assert evaluated(Regression().metrics, response, target, parts=2)["r2"] == r2
    assert sklearn.r2_score(target.numpy(), response.numpy()) == r2


@pytest.mark.parametrize(
    ("task", "response", "target", "message"),
    [
        (MultiLabel(), torch.zeros(2, 3), torch.zeros(2).long(), r"response \(2, 3\) and targets \(2,\)"),
        (MultiLabel(), torch.zeros(2, 3), torch.full((2, 3), 2), "targets are 0 or 1, or probabilities"),
        (MultiLabel([1, 1]), torch.zeros(2, 3), torch.zeros(2, 3), "2 pos_weight for a response of 3 classes"),
        (Regression(), torch.zeros(2, 1), torch.zeros(2).long(), "floating-point numbers, got int64"),
        (Regression(), torch.zeros(2, 3), torch.zeros(2), r"response \(2, 3\) for targets \(2, 1\)"),
        (Regression(), torch.zeros(2, 1), torch.tensor([1.0, float("nan")]), "no finite number"),
    ],
)
def test_what_does_not_fit_is_said(task, response, target, message):
    for look in [task.loss] if "pos_weight" in message else [task.loss, task.metrics().update]:
        with pytest.raises(distpro.UserError, match=message):
            look(response, batch_of(response, target))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Regression("msee"), "loss 'msee'; did you mean 'mse'"),
        (lambda: Regression(headline="accuracy"), "headline 'accuracy' .allowed: rmse, mae, r2"),
        (lambda: Regression(outputs=0), "outputs must be at least 1"),
        (lambda: MultiLabel("balanced"), "pos_weight is a number of at least 0 per class"),
    ],
)
def test_wrong_options_are_said(make, message):
    with pytest.raises(distpro.UserError, match=message):
        make()


# Whole runs, of somebody's own data


def model(outputs):
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, outputs))


def parts(task):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 8, 8, generator=generator)
    means = x.mean((2, 3))
    y = (means > 0).float() if task == "multi_label" else means[:, 0]
    return TensorDataset(x, y), TensorDataset(x[:32], y[:32])


def run(task, terms, tmp_path=None):
    outputs = 3 if task == "multi_label" else 1
    config = {
        "task": task,
        "precision": "float32",
        "student": {"model": "object"},
        "terms": terms,
        "task_weight": 1,
        "retrain": {"weights": "constant"},
        "training": {"epochs": 4, "batch_size": 16, "optimizer": {"name": "adam", "lr": 0.02}},
        "tracking": {"tensorboard": False},
    }
    teacher = model(outputs) if terms else None
    return distpro.retrain(config, data=parts(task), teacher=teacher, student=model(outputs)).metrics


@pytest.mark.parametrize("task", ["multi_label", "regression"])
def test_a_student_learns(task):
    metrics = run(task, [{"loss": "l1", "weight": 0.01}])
    assert metrics["map"] > 60 if task == "multi_label" else metrics["rmse"] < 0.3


@pytest.mark.parametrize("task", ["multi_label", "regression"])
@pytest.mark.parametrize("loss", ["kd", "dkd", "dist", "kd_logits", "dist_plus", "srd", "tf_kd"])
def test_losses_that_compare_classes_are_refused(task, loss):
    with pytest.raises(
        distpro.UserError, match=rf"terms.0 \({loss}\): compares probabilities of classes of which one is"
    ):
        run(task, [{"loss": loss, "weight": 1}])
