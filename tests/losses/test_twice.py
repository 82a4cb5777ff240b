"""The gradient of every loss differentiated once more, as hypergradients over several steps need it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from distpro.losses import LOSSES, available_losses
from distpro.search.estimators.swap import swapped
from tests.losses.test_conformance import Sample
from tests.twice import by_differences, by_double_backward, by_forward_over_reverse, gradients, relative


class Loss:
    """A loss of an example as a function of the student's tensors and of its own parameters that it trains."""

    def __init__(self, name: str):
        self.sample = Sample(name, dtype=torch.float64)
        self.sample()  # sets what is fixed by the first call
        self.loss, self.count = self.sample.loss, len(self.sample.student)
        self.names = [n for n, _ in self.loss.named_parameters()]
        at = [*self.sample.student, *(p.detach().clone() for p in self.loss.parameters())]
        moves = [g.any() for g in gradients(self, [x.requires_grad_() for x in at])]
        self.names = [n for n, moved in zip(self.names, moves[self.count :], strict=True) if moved]
        self.at = [x.detach() for x, moved in zip(at, moves, strict=True) if moved]
        torch.manual_seed(2)
        self.along = [torch.randn_like(x) for x in self.at]

    def __call__(self, at):
        self.sample.loss = copy.deepcopy(self.loss)  # random draws and state are those of the first call, each time
        torch.manual_seed(1)
        own: dict[str, nn.Parameter] = dict(self.sample.loss.named_parameters())
        with swapped(self.sample.loss, {own[n]: x for n, x in zip(self.names, at[self.count :], strict=True)}):
            return self.sample(list(at[: self.count]))


@pytest.mark.parametrize("name", available_losses())
def test_double_backward_and_forward_over_reverse_equal_differences_of_the_gradient(name):
    loss = Loss(name)
    expected = by_differences(loss, loss.at, loss.along)
    found = [way(loss, loss.at, loss.along) for way in (by_double_backward, by_forward_over_reverse)]
    if name == "l1":  # straight between its kinks
        assert not expected.any() and not any(x.any() for x in found)
        return
    assert expected.norm() > 1e-3
    errors = [relative(x, expected) for x in found]
    if LOSSES[name].once_only:  # and so it has to say
        assert min(errors) > 1e-4
    else:
        assert max(errors) < 1e-7
