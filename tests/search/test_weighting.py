"""The five normalisations of Table 7 and the logarithm, their derivatives, and the threshold."""

import math

import pytest
import torch

from distpro.schedule import drop
from distpro.search.weighting import WEIGHTINGS
from pathways import UserError


def closed_form(name, a, g=1.0):
    exponentials = [math.exp(x) for x in a]
    norm = sum(abs(x) for x in a)
    return {
        "biased_softmax": [e / (sum(exponentials) + math.exp(g)) for e in exponentials],
        "softmax": [e / sum(exponentials) for e in exponentials],
        "biased_l1": [x / (norm + 1) for x in a],
        "l1": [x / norm for x in a],
        "sigmoid": [1 / (1 + math.exp(-x)) for x in a],
        "log": exponentials,
    }[name]


TABLE_7 = ["biased_softmax", "softmax", "biased_l1", "l1", "sigmoid"]
NAMES = [*TABLE_7, "log"]
ALPHA = [[1.0] * 27, [0.3, -1.2, 2.5, 0.7], [5.0], [-3.0, 4.0]]


def test_table_7_has_five_rows():
    assert set(WEIGHTINGS) == {*TABLE_7, "log"}


@pytest.mark.parametrize("name", NAMES)
def test_all_start_at_equal_weights(name):
    weights = WEIGHTINGS.build(name)(WEIGHTINGS.build(name).start(9))
    assert torch.allclose(weights, weights[0].expand(9))
    if name in ("biased_softmax", "log"):
        assert torch.allclose(weights, torch.full((9,), 0.1))


@pytest.mark.parametrize("alpha", ALPHA)
@pytest.mark.parametrize("name", NAMES)
def test_closed_forms(name, alpha):
    weights = WEIGHTINGS.build(name)(torch.tensor(alpha, dtype=torch.float64))
    torch.testing.assert_close(weights, torch.tensor(closed_form(name, alpha), dtype=torch.float64))


@pytest.mark.parametrize("g", [-1.0, 0.0, 3.0])
def test_the_bias_of_the_softmax(g):
    alpha = torch.tensor(ALPHA[1], dtype=torch.float64)
    weights = WEIGHTINGS.build("biased_softmax", g=g)(alpha)
    torch.testing.assert_close(weights, torch.tensor(closed_form("biased_softmax", ALPHA[1], g), dtype=torch.float64))
    assert weights.sum() < 1


def test_27_pathways_start_at_one_28th():
    torch.testing.assert_close(WEIGHTINGS.build("biased_softmax")(torch.ones(27)), torch.full((27,), 1 / 28))


@pytest.mark.parametrize("name", ["biased_softmax", "softmax", "sigmoid"])
def test_large_values_do_not_overflow(name):
    weights = WEIGHTINGS.build(name)(torch.tensor([1000.0, 0.0, -1000.0]))
    assert weights[0] == 1 and weights[2] == 0 and torch.isfinite(weights).all()


@pytest.mark.parametrize("alpha", ALPHA)
@pytest.mark.parametrize("name", NAMES)
def test_pull_back_is_the_transposed_jacobian_times_the_gradient(name, alpha):
    weighting, alpha = WEIGHTINGS.build(name), torch.tensor(alpha, dtype=torch.float64)
    gradient = torch.linspace(-1, 2, len(alpha), dtype=torch.float64)
    with torch.no_grad():
        pulled = weighting.pull_back(alpha, gradient)
        step = 1e-6 * torch.eye(len(alpha), dtype=torch.float64)
        columns = [(weighting(alpha + e) - weighting(alpha - e)) / 2e-6 for e in step]
    jacobian = torch.autograd.functional.jacobian(weighting, alpha)
    torch.testing.assert_close(pulled, jacobian.T @ gradient)
    torch.testing.assert_close(pulled, torch.stack(columns) @ gradient, rtol=1e-7, atol=1e-8)
    assert not pulled.requires_grad and not alpha.requires_grad


def test_errors():
    with pytest.raises(UserError, match="unknown weighting 'biasedsoftmax'; did you mean 'biased_softmax'"):
        WEIGHTINGS.build("biasedsoftmax")
    with pytest.raises(UserError, match="weighting 'softmax' has no parameter 'g'"):
        WEIGHTINGS.build("softmax", g=1.0)


def test_dropped_terms_keep_their_part_of_the_sum():
    """The weights of the others are those of the full softmax; τ itself is dropped."""
    alpha = torch.tensor([0.2, 0.5, 0.6, 1.4])
    weights = WEIGHTINGS.build("biased_softmax")(alpha)
    dropped = drop(weights, alpha, 0.5)
    assert dropped.tolist() == [0, 0, *weights[2:].tolist()]
    assert drop(weights, alpha, None) is weights
    assert torch.equal(drop(weights, alpha, -1.0), weights)


def test_drop_at_every_step():
    alpha, weights = torch.tensor([[0.4, 0.6], [0.6, 0.4]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert drop(weights, alpha, 0.5).tolist() == [[0, 2], [3, 0]]
