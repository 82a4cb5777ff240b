"""How many samples a batch has, and what says so where no tensor does."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distpro.batch import Batch, batch_of
from distpro.objective import Objective
from pathways import UserError


class Graph:
    """As graph libraries hand a batch over: one object with tensors as attributes."""

    def __init__(self, x):
        self.x = x


class OfGraph(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, graph):
        return self.head(graph.x)


class OfTemperature(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 3)

    def forward(self, temperature, x):
        return self.head(x) / temperature


X, Y = torch.linspace(-1, 1, 30).view(6, 5), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize(
    ("inputs", "samples"),
    [(X, 6), ((X[:4], X), 4), ({"x": {"ids": X[:2]}}, 2), ([X, X, X], 3), ({"images": [X, X]}, 2), ([], 0)],
)
def test_samples_are_the_rows_of_the_first_tensor_or_the_items_of_a_list(inputs, samples):
    assert batch_of(inputs).samples == samples


@pytest.mark.parametrize(
    ("model", "inputs", "found"),
    [
        (OfGraph, Graph(X), "no tensor in Graph"),
        (OfTemperature, {"temperature": torch.tensor(2.0), "x": X}, r"their first tensor is a number, shape \(\)"),
    ],
)
def test_inputs_that_do_not_tell_their_samples_are_taken_with_their_number(model, inputs, found):
    torch.manual_seed(0)
    model = model()
    twin = copy.deepcopy(model)
    objective = Objective(None, model)
    with pytest.raises(UserError, match=rf"{found}\); give distpro.batch.Batch\(inputs, target, samples=N\)"):
        objective(inputs, Y)
    loss, _ = objective(Batch(inputs, Y, samples=6))
    scores = X @ twin.head.weight.T + twin.head.bias
    truth = F.cross_entropy(scores / (2 if model.__class__ is OfTemperature else 1), Y)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-6)


def test_a_call_without_arguments_has_no_samples():
    with pytest.raises(UserError, match="no tensor in tuple"):
        batch_of(())


@pytest.mark.parametrize("inputs", [X[:0], [], Batch(X[:0], Y[:0], 0)])
def test_a_batch_without_samples_is_refused(inputs):
    """PyTorch's mean over nothing is nan."""
    assert F.cross_entropy(nn.Linear(5, 3)(X[:0]), Y[:0]).isnan()
    with pytest.raises(UserError, match="a batch without samples has no loss"):
        Objective(None, nn.Linear(5, 3))(inputs, Y[:0])
