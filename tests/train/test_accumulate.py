"""Steps of several batches: the gradient of one large batch, steps and epochs counted as steps, and resume."""

from __future__ import annotations

import math
import os
import signal

import pytest
import torch
from torch import nn

import distpro
from distpro.batch import batch_of
from distpro.build.runs import clock_of
from distpro.config.reading import read_config
from distpro.files import load_safely
from distpro.objective import Objective
from distpro.process import Clock
from distpro.tasks import Classification
from distpro.train.rates import LearningRate
from distpro.train.tracking import Tracker, read_metrics
from distpro.train.trainer import Interrupted, Trainer
from distpro.weights import Replay
from pathways import UserError
from tests.digits import settings
from tests.runs.test_resume import differences
from tests.train.test_trainer import terms


class Samples:
    """The same 48 samples an epoch, in one order, cut into batches of ``size``; ``left`` more at the end."""

    def __init__(self, size, dtype=torch.float64, left=0):
        draw = torch.Generator().manual_seed(3)
        count = 48 + left
        self.inputs = torch.randn(count, 3, 6, 6, generator=draw, dtype=dtype)
        self.target, self.size = torch.randint(4, (count,), generator=draw), size

    def __len__(self):
        return math.ceil(len(self.inputs) / self.size)

    def epoch(self, epoch, start=0):
        for n in range(start, len(self)):
            part = slice(n * self.size, (n + 1) * self.size)
            yield batch_of(self.inputs[part], self.target[part])


def network(seed):
    """Without BatchNorm, whose statistics are those of the batch."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.Identity(), nn.Tanh(), nn.Conv2d(6, 4, 4), nn.Flatten())


def trained(size, accumulate, dtype=torch.float64, left=0, **options):
    teacher, student = network(0).to(dtype), network(1).to(dtype)
    objective = Objective(teacher, student, [term.to(dtype) for term in terms()])
    optimizer = torch.optim.SGD(objective.trainable_parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
    loader = Samples(size, dtype, left)
    trainer = Trainer(
        objective,
        Classification(),
        optimizer,
        Replay(objective),
        loader,
        Samples(16, dtype),
        epochs=2,
        accumulate=accumulate,
        learning_rate=LearningRate("poly"),
        **options,
    )
    trainer.fit()
    return trainer


def far(one, other):
    """Largest difference of two students and their terms."""
    pairs = zip(one.objective.state_dict().values(), other.objective.state_dict().values(), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("clip_norm", [None, 0.05])
@pytest.mark.parametrize(("size", "accumulate"), [(8, 2), (4, 4), (1, 16)])
def test_batches_add_up_to_one(size, accumulate, clip_norm):
    one, parts = trained(16, 1, clip_norm=clip_norm), trained(size, accumulate, clip_norm=clip_norm)
    assert one.step == parts.step == 6
    assert far(one, parts) < 1e-12
    assert [row["step"] for row in parts.history] == [3, 6] and [row["epoch"] for row in parts.history] == [1, 2]


def test_in_single_precision():
    """Sums of 16 in another order: errors of a few units of 2⁻²⁴ of weights near 0.3, over six steps."""
    assert far(trained(16, 1, torch.float32), trained(8, 2, torch.float32)) < 1e-6


def test_it_is_the_mean_and_not_the_last_batch():
    assert far(trained(8, 1, max_steps=6), trained(8, 2, max_steps=6)) > 1e-3


def test_a_shorter_last_step_is_the_mean_of_what_there_is():
    """Seven batches of eight, two a step: three steps of 16 and one of 8, as one batch of that size would be."""
    one, parts = trained(16, 1, left=8), trained(8, 2, left=8)
    assert one.step == parts.step == 8
    assert far(one, parts) < 1e-12


def test_logged_losses_are_means_over_the_batches_of_a_step(tmp_path):
    rows = {}
    for size, accumulate in ((16, 1), (8, 2)):
        with Tracker(tmp_path / str(size), tensorboard=False) as tracker:
            trained(size, accumulate, tracker=tracker, log_every=1)
        rows[size] = [row for row in read_metrics(tmp_path / str(size)) if "lr" in row]
    assert len(rows[8]) == len(rows[16]) == 6
    for ours, theirs in zip(rows[8], rows[16], strict=True):
        for name in ("lr", "train/task_loss", "term/feature", "term/logits"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name


# In a run


def config(**training):
    changes = {"training": {"batch_size": 8, "accumulate": 3, "epochs": 2, **training}}
    return settings(changes=changes)


@pytest.mark.slow
def test_steps_and_epochs_are_counted_in_steps(tmp_path):
    """100 samples: 13 batches of 8, 5 steps of 3."""
    assert clock_of(read_config(config()), range(13)) == Clock(10, 5)
    result = distpro.train(config(), out=tmp_path)
    assert (result.metrics["step"], result.metrics["epoch"]) == (10, 2)
    rows = [row for row in read_metrics(tmp_path) if "lr" in row]
    assert [(row["step"], row["epoch"]) for row in rows] == [(3, 0.6), (5, 1.0), (6, 1.2), (9, 1.8), (10, 2.0)]


@pytest.mark.slow
@pytest.mark.parametrize("steps", [[1], [5], [2, 7]])
def test_resume_is_exact(steps, tmp_path, monkeypatch):
    distpro.train(config(), out=tmp_path / "whole")
    original, left = Trainer.train_step, list(steps)

    def train_step(self, *batches):
        original(self, *batches)
        if self.step in left:
            left.remove(self.step)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    for resume in [False, True, True][: len(steps)]:
        with pytest.raises(Interrupted):
            distpro.train(config(), out=tmp_path / "parts", resume=resume)
    distpro.train(config(), out=tmp_path / "parts", resume=True)
    states = [load_safely(tmp_path / run / "checkpoint.pt") for run in ("whole", "parts")]
    for state in states:
        del state["seconds"]
    assert differences(*states) == []
    weights = [load_safely(tmp_path / run / "student.pt") for run in ("whole", "parts")]
    assert differences(*weights) == []


# The learning rate of segmentation


@pytest.mark.parametrize("power", [0.5, 0.9, 1.0, 2.0])
def test_poly_is_its_formula(power):
    rate = LearningRate("poly", power=power)
    for step in range(0, 31):
        assert rate(step / 10, 3.0) == pytest.approx((1 - step / 30) ** power, abs=1e-12)
    assert rate(3.5, 3.0) == 0  # never a complex number
    warmed = LearningRate("poly", power=power, warmup_epochs=1)
    assert warmed(0.5, 3.0) == pytest.approx(0.5 * (1 - 0.5 / 3) ** power) and warmed(2.0, 3.0) == rate(2.0, 3.0)


@pytest.mark.slow
def test_poly_moves_every_step_of_a_run(tmp_path):
    changed = config(accumulate=1, batch_size=50, optimizer={"lr": 0.05}, learning_rate={"name": "poly", "power": 0.9})
    changed["tracking"]["log_every"] = 1
    distpro.train(changed, out=tmp_path)
    rates = [row["lr"] for row in read_metrics(tmp_path) if "lr" in row]
    assert rates == pytest.approx([0.05 * (1 - step / 4) ** 0.9 for step in range(4)])


def test_more_batches_than_an_epoch_has_are_refused():
    with pytest.raises(UserError, match="training.accumulate is 6, but an epoch has 5 batches"):
        distpro.train(settings(changes={"training": {"accumulate": 6}}))
    distpro.train(settings(changes={"training": {"accumulate": 5, "epochs": 1}}))
