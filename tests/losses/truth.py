"""What the tests of the losses compute by hand, in float64."""

from __future__ import annotations

import math

import torch

from distpro.losses import build_loss


def randn(*shape, **kwargs):
    return torch.randn(*shape, dtype=torch.float64, **kwargs)


def build(name, student=(), teacher=(), **params):
    return build_loss(name, student, teacher, **params).double()


def kl(p, q):
    """KL(p || q) of two distributions as lists."""
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def softmax(logits, temperature=1.0):
    weights = [math.exp(x / temperature) for x in logits]
    return [w / sum(weights) for w in weights]


def mean_kl(student, teacher, temperature):
    rows = zip(teacher.tolist(), student.tolist(), strict=True)
    return sum(kl(softmax(t, temperature), softmax(s, temperature)) for t, s in rows) / len(student)


def close(value, expected, **kwargs):
    torch.testing.assert_close(value.detach(), torch.as_tensor(expected, dtype=value.dtype).detach(), **kwargs)
