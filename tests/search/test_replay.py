"""A window whose steps are done again between those that are kept, against one that keeps them all."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from distpro.search.estimators import ESTIMATORS, Room
from pathways.registry import UserError
from tests.search.test_sweep import Horizon


def sweep(case, stretch):
    """The sweep of a training, and the state of all of it afterwards."""
    case.restore()
    torch.manual_seed(7)
    estimator = ESTIMATORS.build(
        "sweep", case.objective, case.optimizer, case.max_norm, case.clip_by, steps=len(case.batches), stretch=stretch
    )
    for number, batch in enumerate(case.batches):
        step = case.step(batch, case.weights * (1 + number), estimator)
        step.number = number
    after = copy.deepcopy((case.objective.state_dict(), case.optimizer.state_dict(), [p.grad for p in case.params]))
    h = estimator(step, [case.validation])
    now = case.objective.state_dict(), case.optimizer.state_dict(), [p.grad for p in case.params]
    same = [torch.equal(x, y) for x, y in zip(tensors(after), tensors(now), strict=True)]
    assert all(same) and len(same) > 20
    return h, estimator.per_step, torch.get_rng_state()


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else []
    return [x for part in parts for x in tensors(part)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nesterov", "nesterov, clipped by module", "adamw"])
def test_stretches_give_the_same_bits(name):
    case = Horizon(name, dropout=0.5, dtype=torch.float32)
    case.batches = case.batches[:5]
    kept = sweep(case, 1)
    for stretch in (2, 3, 5, 9):
        for found, wanted in zip(sweep(case, stretch), kept, strict=True):
            assert torch.equal(found, wanted)


def test_a_training_that_does_not_repeat_is_refused():
    class Forgetful(nn.Tanh):
        factor = torch.ones(())

        def forward(self, x):
            type(self).factor = self.factor * 0.9  # no buffer
            return super().forward(x) * self.factor

    case = Horizon("nesterov", activation=Forgetful)
    case.batches = case.batches[:4]
    with pytest.raises(UserError, match="keeps something outside of its buffers"):
        sweep(case, 2)


def test_what_fits_is_the_longest_window_in_the_shortest_stretches():
    for state, batch, taught, steps in itertools.product((1, 9, 40), (0, 1, 5), (0, 2, 30), (1, 2, 7, 30)):
        room = Room(state, batch, taught)
        for limit in (1, 20, 77, 150, 400, 2000):
            fits = [(n, -k) for n in range(1, steps + 1) for k in range(1, n + 1) if room.takes(n, k) <= limit]
            wanted = max(fits, default=(1, -1))
            assert room.fit(steps, limit) == (wanted[0], -wanted[1]), (room, steps, limit)


def test_a_stretch_is_at_least_one_step():
    case = Horizon("sgd")
    with pytest.raises(UserError, match="sweep: stretch must be at least 1, got 0"):
        ESTIMATORS.build("sweep", case.objective, case.optimizer, steps=2, stretch=0)
