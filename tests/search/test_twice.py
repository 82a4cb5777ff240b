"""Second derivatives in float64 of what a search is made of: distances, transforms, and train-mode BatchNorm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distpro.search.estimators.swap import swapped
from distpro.search.estimators.tangents import forward_mode
from pathways import DISTANCES, TRANSFORMS
from tests.twice import by_differences, by_double_backward, by_forward_over_reverse, relative

WAYS = [by_double_backward, by_forward_over_reverse]


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def along(at):
    torch.manual_seed(3)
    return [torch.randn_like(x) for x in at]


@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (3, 4, 6, 6), (3, 9, 4)], ids=["even", "uneven", "tokens"])
@pytest.mark.parametrize("name", [*DISTANCES, "hcl max"])
def test_distances(name, shape):
    torch.manual_seed(0)
    name, _, pooling = name.partition(" ")
    distance, x, target = (
        DISTANCES.build(name, **({"pooling": pooling} if pooling else {})),
        randn(*shape),
        randn(*shape),
    )
    # Squared, so that the second derivative of |x| is not nothing.
    value = lambda at: distance(at[0], target).square()  # noqa: E731
    at = [x]
    expected = by_differences(value, at, along(at))
    for way in WAYS:
        assert relative(way(value, at, along(at)), expected) < 1e-7


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name):
    """By the student's features and the transform's parameters, in training."""
    torch.manual_seed(0)
    shapes = {"tokens": ((10, 4), (10, 6)), "identity": ((4, 6, 6),) * 2}.get(name, ((4, 6, 6), (6, 3, 3)))
    transform = TRANSFORMS.build(name, *shapes).double().train()
    x, target = randn(3, *shapes[0]), randn(3, *shapes[1])
    own = list(transform.parameters())

    def value(at):
        with swapped(transform, dict(zip(own, at[1:], strict=True))):
            return DISTANCES.build("l2")(transform(at[0]), target)

    at = [x, *(p.detach() for p in own)]
    expected = by_differences(value, at, along(at))
    for way in WAYS:
        assert relative(way(value, at, along(at)), expected) < 1e-6


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("moving", ["all", "inputs", "parameters", "after", "before"])
def test_batch_norm_forward_over_reverse_is_double_backward(dimensions, affine, statistics, moving):
    """A BN-ReLU-convolution net; what moves are its inputs, its parameters, or those behind or before BatchNorm alone."""
    torch.manual_seed(0)
    norm = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][dimensions - 1]
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dimensions - 1]
    net = nn.Sequential(
        conv(3, 4, 3),
        norm(4, affine=affine, track_running_stats=statistics),
        nn.ReLU(),
        conv(4, 5, 2),
        norm(5, affine=affine, track_running_stats=statistics),
        nn.Flatten(),
        nn.LazyLinear(3),
    ).double()
    x, y = randn(6, 3, *[5] * dimensions), torch.arange(6) % 3
    net(x)
    for p in net.parameters():
        nn.init.normal_(p)
    own = list(net.parameters())

    def value(at):
        with swapped(net, dict(zip(own, at[1:], strict=True))):
            return F.cross_entropy(net(at[0]), y)

    at = [x, *(p.detach() for p in own)]
    moves = {
        "all": lambda n: True,
        "inputs": lambda n: n == 0,
        "parameters": lambda n: n > 0,
        "after": lambda n: n > len(at) - 3,
        "before": lambda n: n == 1,
    }[moving]
    direction = [d if moves(n) else torch.zeros_like(d) for n, d in enumerate(along(at))]
    expected = by_double_backward(value, at, direction)
    assert relative(by_forward_over_reverse(value, at, direction), expected) < 1e-10
    assert relative(by_differences(value, at, direction), expected) < 1e-5


def test_batch_norm_over_rows_and_its_affine_part_alone():
    """Without a tangent of its inputs; and a weight of zero."""
    torch.manual_seed(0)
    norm, x, c = nn.BatchNorm1d(3).double(), randn(7, 3), randn(7, 3)
    value = lambda at: (F.batch_norm(x, None, None, at[0], at[1], True) * c).pow(3).sum()  # noqa: E731
    for weight in (randn(3), torch.zeros(3, dtype=torch.float64)):
        at = [weight, randn(3)]
        expected = by_double_backward(value, at, along(at))
        assert relative(by_forward_over_reverse(value, at, along(at)), expected) < 1e-12
    assert norm.num_batches_tracked == 0


def test_a_distance_inside_a_student_has_a_tangent():
    """HCL's own rule, against its gradient."""

    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.hcl = DISTANCES.build("hcl")

        def forward(self, x):
            return self.hcl(self.conv(x), torch.zeros(2, 4, 8, 8, dtype=x.dtype))

    torch.manual_seed(0)
    student, x = Student().double(), randn(2, 3, 8, 8)
    parameters = dict(student.named_parameters())
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}
    found = forward_mode(student, parameters, direction, x)
    gradients = torch.autograd.grad(student(x), list(parameters.values()))
    torch.testing.assert_close(found, sum((g * direction[n]).sum() for n, g in zip(parameters, gradients, strict=True)))
