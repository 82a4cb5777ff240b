"""A last batch of one sample is tried before the first step, and leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from distpro.batch import batch_of
from distpro.losses import build_loss
from distpro.objective import Objective, Term
from distpro.train.checks import check_last_batch
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
