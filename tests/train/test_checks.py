"""A last batch of one sample is tried before the first step, and leaves no trace."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distpro.batch import batch_of
from distpro.losses import build_loss
from distpro.objective import Objective, Term
from distpro.train.checks import check_last_batch, check_last_validation_batch
from distpro.train.trainer import Trainer
from distpro.weights import Replay
from pathways.registry import UserError


class Batches:
    """17 samples in batches of 4, and how many batches were read."""

    def __init__(self, samples=17, size=4):
        self.samples, self.size, self.read = samples, size, 0

    def __len__(self):
        return -(-self.samples // self.size)

    def epoch(self, epoch, start=0):
        for first in range(start * self.size, self.samples, self.size):
            self.read += 1
            n = min(self.size, self.samples - first)
            yield batch_of(torch.randn(n, 3, 6, 6), torch.randint(4, (n,)), torch.arange(first, first + n))


def network(pooled: bool) -> nn.Module:
    torch.manual_seed(0)
    pool = [nn.AdaptiveAvgPool2d(1)] if pooled else []
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), *pool, nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout()
    )


def trainer(pooled=False, loss=None, loader=None, weight=None, **options):
    student = network(pooled)
    terms = [] if loss is None else [Term(build_loss(loss), loss, weight=weight)]
    objective = Objective(network(False), student, terms, example_input=torch.randn(2, 3, 6, 6))
    objective.follow_equal()
    sgd = torch.optim.SGD(student.parameters(), 0.1)
    options = {"epochs": 2, **options}
    return Trainer(objective, objective.task, sgd, Replay(objective), loader or Batches(), Batches(4, 4), **options)


@pytest.mark.parametrize(
    ("options", "reason"), [({"pooled": True}, "more than 1 value per channel"), ({"loss": "rkd"}, "2 samples")]
)
def test_it_is_said_before_the_first_step(options, reason):
    run = trainer(**options)
    with pytest.raises(
        UserError, match=rf"17 samples in batches of 4 leave a last batch of one.*{reason}.*drop_last: true"
    ):
        check_last_batch(run, 17, 4, drop_last=False)
    assert run.train_loader.read == 1
    with pytest.raises(ValueError):  # and so it would have been
        run.fit()
    assert run.step == 4


def test_one_sample_that_works_passes_without_a_trace():
    run = trainer(loss="kd")
    run.objective.cache = cache = object()
    before, state = copy.deepcopy(run.objective.state_dict()), torch.get_rng_state()
    check_last_batch(run, 17, 4, drop_last=False)
    after = run.objective.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert run.objective.cache is cache and all(p.grad is None for p in run.objective.parameters())
    run.objective.cache = None
    check_last_batch(run, 17, 4, drop_last=False)
    run.train_loader.epoch = Batches().epoch
    torch.set_rng_state(state)
    run.fit()


@pytest.mark.parametrize(
    ("samples", "drop_last", "options"),
    [
        (17, True, {}),
        (16, False, {}),
        (18, False, {}),
        (None, False, {}),
        (17, False, {"max_steps": 4}),
    ],
)
def test_without_such_a_batch_nothing_is_read(samples, drop_last, options):
    run = trainer(pooled=True, **options)
    check_last_batch(run, samples, 4, drop_last)
    assert run.train_loader.read == 0


def test_a_term_of_weight_0_is_not_asked():
    check_last_batch(trainer(loss="rkd", weight=0.0), 17, 4, drop_last=False)


def test_batches_of_one_sample_and_a_part_of_one():
    """What is advised leads on: drop_last would leave nothing of one sample, and batches of one where they are."""
    with pytest.raises(
        UserError, match=r"batch_size: 1 makes batches of one sample, .*; set training.batch_size to 2 or more$"
    ):
        check_last_batch(trainer(pooled=True, loader=Batches(4, 1), max_steps=1), 4, 1, drop_last=True)
    with pytest.raises(UserError, match=r"there is one training sample, .*; that takes more training samples$"):
        check_last_batch(trainer(pooled=True, loader=Batches(1, 4)), 1, 4, drop_last=False)
    check_last_batch(trainer(loss="kd", loader=Batches(4, 1)), 4, 1, drop_last=False)


def search(loader, every=1, batches=1, **options):
    """A trainer of 10 steps that looks at ``batches`` of the loader after every ``every`` of them, as a search does."""
    run = trainer(**options)
    judge = run.objective.task_loss_of
    run.weights = SimpleNamespace(every=every, validation_batches=batches, estimator=SimpleNamespace(judge=judge))
    assert run.total_steps == 10
    return run


@pytest.mark.parametrize(
    ("samples", "size", "message"),
    [
        (
            9,
            4,
            r"search: 9 samples in batches of 4 leave a last batch of one, .*; set another search.validation_batch_size",
        ),
        (1, 4, r"search: there is one validation sample, .*; that takes a larger search.validation_fraction$"),
        (3, 1, r"search.validation_batch_size: 1 makes batches of one sample, .* to 2 or more$"),
    ],
)
def test_a_single_sample_of_the_validation_part(samples, size, message):
    loader = Batches(samples, size)
    with pytest.raises(UserError, match=message):
        check_last_validation_batch(search(loader, pooled=True), loader, samples, size, drop_last=False)
    assert loader.read == 1
    run = search(loader)
    before = copy.deepcopy(run.objective.state_dict())
    check_last_validation_batch(run, loader, samples, size, drop_last=False)  # maps larger than 1x1
    assert all(torch.equal(before[name], value) for name, value in run.objective.state_dict().items())


@pytest.mark.parametrize(
    ("samples", "drop_last", "every", "batches"),
    [(8, False, 1, 1), (9, True, 1, 1), (9, False, 5, 1), (None, False, 1, 1)],
)
def test_a_validation_batch_that_does_not_come_is_not_read(samples, drop_last, every, batches):
    loader = Batches(9, 4)
    run = search(loader, every, batches, pooled=True)
    check_last_validation_batch(run, loader, samples, 4, drop_last)
    assert loader.read == 0
    if every == 5:
        with pytest.raises(UserError):  # two updates of two batches reach it
            check_last_validation_batch(search(loader, 5, 2, pooled=True), loader, 9, 4, False)
