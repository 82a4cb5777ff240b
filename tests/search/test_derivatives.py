"""Which scalars of losses can be learned: those whose loss has the derivative, and no other without a word."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distpro.batch import batch_of
from distpro.losses import LOSSES, available_losses
from distpro.objective import Objective, Term
from distpro.search.derivatives import obstacles
from distpro.search.learned import LearnedScalars
from pathways.registry import UserError
from tests.losses.test_conformance import Sample


class Given(nn.Module):
    """A model whose taps are given tensors."""

    def __init__(self, tensors, trained):
        super().__init__()
        self.taps = nn.ModuleList(nn.Identity() for _ in tensors)
        self.held = nn.ParameterList(nn.Parameter(t, requires_grad=trained) for t in tensors)

    def forward(self, x):
        return [tap(t + 0) for tap, t in zip(self.taps, self.held, strict=True)][-1]


def learning(loss, path, student, teacher, target=None, index=None):
    """An objective of one term, its scalar as one that is learned, and the batch."""
    term = Term(loss, "term", *([f"taps.{n}" for n in range(len(side))] for side in (student, teacher)))
    term.by_position, term.rows = False, "all"
    objective = Objective(Given(teacher, False), Given(student, True), [term], prune=False)
    target = torch.zeros(len(student[0]), dtype=torch.int64) if target is None else target
    batch = batch_of(torch.zeros(len(target), 1), target, index)
    return objective, LearnedScalars(objective, [f"term.{path}"], 1), batch


BOUNDED = {
    ("crd", "nce_m"),
    ("ls", "smoothing"),
    ("mgd", "ratio"),
    ("sskd", "tf_ratio"),
    ("sskd", "ss_ratio"),
    ("tf_kd", "correct"),
}
START = {("kd", "ce_weight"): 0.3}
SCALARS = [
    (name, scalar)
    for name in available_losses()
    for scalar in LOSSES[name].scalars
    if (name, scalar) not in BOUNDED
    and (name, scalar) not in (("logit_std", "alpha"), ("logit_std", "beta"))  # of its DKD
]


@pytest.mark.parametrize(("name", "scalar"), SCALARS)
def test_every_loss_has_the_derivative_by_its_scalars(name, scalar):
    start = {scalar: START[name, scalar]} if (name, scalar) in START else {}
    value = getattr(Sample(name, **start).loss, scalar)
    for path in [f"{scalar}.{n}" for n in range(len(value))] if isinstance(value, (list, tuple)) else [scalar]:
        sample = Sample(name, **start)
        case = learning(sample.loss, path, sample.student, sample.teacher, sample.target, sample.index)
        buffers = {key: b.clone() for key, b in sample.loss.named_buffers()}
        assert obstacles(*case) == ([], True)
        assert all(torch.equal(b, buffers[key]) for key, b in sample.loss.named_buffers())
        found = getattr(sample.loss, scalar)
        assert (found if isinstance(value, float) else [*found]) == pytest.approx(value)  # numbers again


@pytest.mark.parametrize(("name", "scalar"), sorted(BOUNDED))
def test_a_scalar_of_a_range_is_refused(name, scalar):
    sample = Sample(name)
    with pytest.raises(UserError, match=f"'term.{scalar}' must be from 0 to 1; one that is learned may become any"):
        learning(sample.loss, scalar, sample.student, sample.teacher)


class Own(nn.Module):
    """A loss of somebody's own whose temperature goes a way of its own."""

    scalars = ("temperature",)

    def __init__(self, way, temperature=2.0):
        super().__init__()
        self.way, self.temperature = way, temperature

    def forward(self, student, teacher, target=None, index=None):
        return self.way((student - teacher).square(), self.temperature)


class Cut(torch.autograd.Function):
    """x / T without the derivative by T."""

    @staticmethod
    def forward(ctx, x, t):
        ctx.t = float(t)
        return x / ctx.t

    @staticmethod
    def backward(ctx, gradient):
        return gradient / ctx.t, None

    @staticmethod
    def jvp(ctx, tangent, _):
        return tangent / ctx.t


class NoTangent(torch.autograd.Function):
    """x / T, right, but without a forward-mode rule."""

    @staticmethod
    def forward(ctx, x, t):
        ctx.save_for_backward(x, torch.as_tensor(t))
        return x / t

    @staticmethod
    def backward(ctx, gradient):
        x, t = ctx.saved_tensors
        return gradient / t, -(gradient * x).sum() / t**2 if ctx.needs_input_grad[1] else None


def check(way):
    torch.manual_seed(0)
    return obstacles(*learning(Own(way), "temperature", [torch.randn(5, 4)], [torch.randn(5, 4)]))


@pytest.mark.parametrize(
    ("way", "message"),
    [
        (lambda x, t: (x / float(t)).mean(), "Own has no right derivative by it (0, and "),
        (lambda x, t: (x / t + x / float(t)).mean(), "Own has no right derivative by it ("),
        (lambda x, t: Cut.apply(x, t).mean(), "Own has no right derivative by it (0, and "),
        (
            lambda x, t: F.dropout(x, 1 / t if isinstance(t, float) else "half").mean(),
            "Own takes no tensor in its place (",
        ),
    ],
)
def test_a_loss_without_the_derivative_is_refused_by_name(way, message):
    (said,), _ = check(way)
    assert said.startswith("scalar 'term.temperature' cannot be learned: " + message)


def test_what_a_difference_cannot_see_either_is_allowed():
    """No effect; and a factor that cancels."""
    assert check(lambda x, t: x.mean()) == ([], True)
    assert check(lambda x, t: (x * t / t).mean()) == ([], True)


def test_a_loss_with_constants_in_float32():
    constant = torch.randn(4, 3)
    assert check(lambda x, t: (x / t @ constant).mean()) == ([], True)
    (said,), _ = check(lambda x, t: (x / float(t) @ constant).mean())
    assert "Own has no right derivative by it" in said


def test_where_only_double_backward_is_right():
    assert check(lambda x, t: NoTangent.apply(x, t).mean()) == ([], False)
