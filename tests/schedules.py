"""Schedules for the tests of schedules."""

from itertools import product

import torch

from distpro.schedule import Schedule

TRANSFORMS = ("conv1x1", "conv3x3")
PLACES = list(product((1, 2), (1, 2, 3), (1, 2)))  # 2 teacher levels, 3 student levels, 2 transforms


def schedule(steps=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Schedule(
        keys=tuple(f"t{i}<-s{j}@{TRANSFORMS[k - 1]}" for i, j, k in PLACES),
        levels=torch.tensor(PLACES),
        transforms=tuple(TRANSFORMS[k - 1] for *_, k in PLACES),
        alpha_tilde=torch.randn(steps, len(PLACES), generator=generator),
        weights=torch.rand(steps, len(PLACES), generator=generator),
        steps_per_epoch=3.5,
        meta={"weighting": "biased_softmax", "config": {"lr": [0.1, None, True], "taps": ["a", "b"]}},
    )


def two_terms(weights):
    weights = torch.as_tensor(weights, dtype=torch.float32)
    return Schedule(("a", "b"), torch.zeros(2, 3, dtype=torch.int64), weights.clone(), weights)


def same(a, b):
    """Whether two schedules are equal in every field."""
    tensors = ("levels", "alpha_tilde", "weights", "scales")
    values = ("keys", "transforms", "steps_per_epoch", "meta", "strength", "warmup", "reading", "threshold", "start")
    pairs = [(getattr(a, n), getattr(b, n)) for n in tensors]
    pairs += [(a.scalars[n], b.scalars.get(n, torch.empty(0))) for n in a.scalars]
    return (
        all(torch.equal(x, y) and x.dtype == y.dtype for x, y in pairs)
        and a.scalars.keys() == b.scalars.keys()
        and all(getattr(a, n) == getattr(b, n) for n in values)
    )
