"""Formulas in the place of operators: the same values and derivatives, and second ones that PyTorch's own have not."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import nn

from distpro.search.estimators.formulas import Formulas

WAYS = {
    "function": lambda f: getattr(F, f),
    "module": lambda f: {"hardsigmoid": nn.Hardsigmoid(), "silu": nn.SiLU()}[f],
    "in place": lambda f: lambda x: getattr(F, f)(x * 1.0, inplace=True),
    "in a traced module": lambda f: torch.fx.symbolic_trace(
        nn.Sequential({"hardsigmoid": nn.Hardsigmoid(), "silu": nn.SiLU()}[f])
    ),
}
x = torch.tensor([-7.0, -2.9, -1.0, 0.2, 1.7, 2.9, 5.0], dtype=torch.float64)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["hardsigmoid", "silu"])
def test_values_and_both_derivatives(name, way):
    function, leaf = WAYS[way](name), x.clone().requires_grad_()
    with Formulas():
        value = function(leaf)
        (first,) = torch.autograd.grad(value.square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), leaf)
    own = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(getattr(F, name)(own).square().sum(), own)
    assert torch.allclose(value, getattr(F, name)(x)) and torch.allclose(first, expected)

    def slope(at):
        at = at.clone().requires_grad_()
        return torch.autograd.grad(getattr(F, name)(at).square().sum(), at)[0]

    assert torch.allclose(second, (slope(x + 1e-6) - slope(x - 1e-6)) / 2e-6, atol=1e-6)
    with Formulas(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), torch.ones_like(x))
        (gradient,) = torch.autograd.grad(function(dual).square().sum(), dual)
        assert torch.allclose(forward_ad.unpack_dual(gradient).tangent, second)


def test_in_place_changes_what_it_is_given():
    for name in ("hardsigmoid", "silu"):
        given = x.clone()
        with Formulas():
            result = getattr(F, name)(given, inplace=True)
        assert result is given and torch.allclose(given, getattr(F, name)(x))
        assert torch.equal(getattr(F, name)(x), getattr(F, name)(x))


NORMS = {
    "norm": lambda f: f.norm(dim=1),
    "norm of all": lambda f: f.norm(),
    "torch.norm": lambda f: torch.norm(f, p=2, dim=1, keepdim=True),
    "vector_norm": lambda f: torch.linalg.vector_norm(f, dim=(0, 1)),
    "normalize": lambda f: F.normalize(f, dim=1),
    "cosine_similarity": lambda f: F.cosine_similarity(f, f.roll(1, 1) + 1, dim=1),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_have_derivatives_at_zero(name):
    """Away from zero those of PyTorch; at it none is nan."""
    norm, draw = NORMS[name], torch.Generator().manual_seed(0)
    f = torch.randn(3, 4, generator=draw, dtype=torch.float64)

    def derivatives(f, formulas):
        leaf = f.clone().requires_grad_()
        with Formulas() if formulas else torch.enable_grad():
            value = norm(leaf)
            (first,) = torch.autograd.grad((value**3).sum() + value.sum(), leaf, create_graph=True)
            (second,) = torch.autograd.grad((first * f.cos()).sum(), leaf)
        return value, first, second

    for ours, theirs in zip(derivatives(f, True), derivatives(f, False), strict=True):
        torch.testing.assert_close(ours, theirs)
    for zeros in (f * torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64), torch.zeros_like(f)):
        ours, theirs = derivatives(zeros, True), derivatives(zeros, False)
        assert ours[2].isfinite().all()
        torch.testing.assert_close(ours[:2], theirs[:2])


def test_other_norms_are_pytorchs():
    f = torch.randn(3, 4)
    with Formulas():
        assert torch.equal(f.norm(p=1, dim=1), f.abs().sum(1))
        assert torch.equal(torch.linalg.vector_norm(f, ord=float("inf")), f.abs().max())
        assert torch.equal(F.normalize(f, p=1, dim=1), f / f.abs().sum(1, keepdim=True))
        assert torch.norm(f, keepdim=True).shape == (1, 1)
