"""Class weights and label smoothing, against PyTorch and scikit-learn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, Subset, TensorDataset

import distpro
from distpro import build
from distpro.batch import batch_of
from distpro.config.reading import read_config
from distpro.data import Split
from distpro.data.loading import labels_of
from distpro.tasks import Classification, TextClassification
from tests.digits import settings

WEIGHTS = [0.5, 2.0, 1.0, 0.0]


def case(soft=False):
    generator = torch.Generator().manual_seed(0)
    response = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    target = torch.randn(12, 4, generator=generator).double().softmax(1) if soft else torch.arange(12) % 3
    return response, target


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("task", [Classification, TextClassification])
def test_the_loss_is_pytorchs(smoothing, soft, task):
    response, target = case(soft)
    truth = torch.nn.CrossEntropyLoss(torch.tensor(WEIGHTS).double(), label_smoothing=smoothing)(response, target)
    found = task(label_smoothing=smoothing, class_weights=WEIGHTS).loss(response, batch_of(torch.zeros(12, 2), target))
    assert found.item() == pytest.approx(truth.item(), abs=1e-12)


def test_evaluation_is_without_them():
    response, target = case()
    metrics = Classification(0.1, WEIGHTS).metrics()
    metrics.update(response, batch_of(torch.zeros(12, 2), target))
    assert metrics.compute()["loss"] == pytest.approx(F.cross_entropy(response, target).item())


@pytest.mark.parametrize("labels", [[0, 0, 0, 1, 2, 2], [0, 3, 3, 3, 1]])
def test_balanced_is_scikit_learns(labels):
    weight = pytest.importorskip("sklearn.utils.class_weight")
    labels = torch.tensor(labels)
    task = Classification(class_weights="balanced")
    task.prepare(labels)
    classes = labels.unique()
    truth = weight.compute_class_weight("balanced", classes=classes.numpy(), y=labels.numpy())
    found = torch.tensor(task._numbers).double()
    assert torch.allclose(found[classes], torch.tensor(truth)) and len(found) == labels.max() + 1
    task.prepare(torch.tensor([0, 1]))  # another training
    assert task._numbers == [1.0, 1.0]


class Labelled(Dataset):
    targets = [0, 1, 1, 2]

    def __len__(self):
        return 4

    def __getitem__(self, n):
        return torch.zeros(3), self.targets[n]


def test_labels_are_known_without_reading_samples_or_not_at_all():
    part = Split.of(torch.zeros(3, 3, 2, 2, dtype=torch.uint8), torch.tensor([2, 0, 1]))
    assert labels_of(part).tolist() == [2, 0, 1]
    assert labels_of(Split.of(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.zeros(1, 2, 2))) is None
    assert labels_of(Subset(Labelled(), [3, 0])).tolist() == [2, 0]
    unknown = TensorDataset(torch.zeros(4, 3), torch.zeros(4).long())
    assert labels_of(unknown) is None
    with pytest.raises(distpro.UserError, match="class_weights: balanced counts the training labels, which these data"):
        Classification(class_weights="balanced").prepare(None)


@pytest.mark.parametrize("weights", ["even", [1, -1], [0, 0], [1, float("nan")], [1, "two"], 3, [True, 1]])
def test_wrong_weights_are_said(weights):
    with pytest.raises(
        distpro.UserError, match="class_weights are 'balanced' or a number of at least 0 per class, got"
    ):
        Classification(class_weights=weights)


def test_weights_must_fit_the_classes():
    response, target = case()
    with pytest.raises(distpro.UserError, match="3 class_weights for a response of 4 classes"):
        Classification(class_weights=[1, 2, 3]).loss(response, batch_of(torch.zeros(12, 2), target))


def test_a_run_counts_the_samples_that_it_trains_on():
    """And not those that it holds out; a class without any has the weight 1."""
    task = {"classification": {"class_weights": "balanced"}}
    changes = {
        "retrain": {"weights": "none"},
        "task": task,
        "training": {"validation_fraction": 0.4, "keep": "best"},
        "data": {"samples": 20},
    }
    config = read_config(settings(changes=changes))
    trainer = build.build_retrain(config, build.build_data(config), None)
    counts = torch.bincount(trainer.train_loader._labels)
    assert counts.sum() == 12
    assert [n * w for n, w in zip(counts.tolist(), trainer.task._numbers, strict=True) if n] == pytest.approx(
        [12 / int((counts > 0).sum())] * int((counts > 0).sum())
    )
    task = Classification(class_weights="balanced")
    task.prepare(torch.tensor([0, 0, 1, 1, 1, 1]))
    response, _ = case()
    target = torch.tensor([0, 1] * 6)
    truth = F.cross_entropy(response, target, torch.tensor([1.5, 0.75, 1, 1]).double())
    assert task.loss(response, batch_of(response, target)).item() == pytest.approx(truth.item())
