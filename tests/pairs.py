"""A small pair of convolutional networks, terms that compare them, a batch, and schedules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from distpro.objective import Term
from distpro.schedule import Schedule


def network(seed: int, width: int = 6) -> nn.Sequential:
    """Two stages with BatchNorm: taps "2" (width, 8, 8) and "5" (8, 4, 4)."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 8, 3, padding=1, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


class Distance(nn.Module):
    """Mean squared difference after a learned factor."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, student, teacher, target=None, index=None):
        return F.mse_loss(self.factor * student, teacher)


class Levels(nn.Module):
    """Two losses, one per teacher level."""

    def levels(self, student, teacher, target=None, index=None):
        return torch.stack([F.mse_loss(s, t) for s, t in zip(student, teacher, strict=True)])


def batch(dtype=torch.float32, n=5):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 3, 8, 8, generator=generator)
    return x.to(dtype), torch.randint(4, (n,), generator=generator)


def schedule(weights, keys, levels=None, transforms=(), alpha_tilde=None):
    weights = torch.tensor(weights)
    levels = torch.zeros(len(keys), 3, dtype=torch.int64) if levels is None else torch.tensor(levels)
    alpha_tilde = torch.ones_like(weights) if alpha_tilde is None else torch.tensor(alpha_tilde)
    return Schedule(tuple(keys), levels, alpha_tilde, weights, tuple(transforms))


def free(keys, **options):
    """Terms without a weight of their own."""
    return [Term(Distance(), key, ["5"], ["5"], **options) for key in keys]


PLACES = [[1, 1, 1], [1, 2, 1], [2, 1, 1], [2, 2, 1], [1, 1, 2], [1, 2, 2], [2, 1, 2], [2, 2, 2]]


def pooled():
    """A schedule of 2 × 2 connections with 2 transforms."""
    keys = [f"p{n}" for n in range(8)]
    return schedule([[0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08]], keys, PLACES, ["x"] * 4 + ["y"] * 4)
