"""A copy of a student either answers by its own weights alone, or is refused."""

from __future__ import annotations

import weakref
from functools import partial

import pytest
import torch
from torch import nn

from distpro.build import Given
from pathways import UserError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.gate, self.fc = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.mixing = self.mix

    def mix(self, x):
        return torch.tanh(self.gate(x))

    def forward(self, x):
        return self.fc(self.mixing(self.body(x)))


class Gated(nn.Module):
    """A module of one's own that calls what it is given."""

    def __init__(self, function):
        super().__init__()
        self.options = {"mix": [function]}

    def forward(self, x):
        return self.options["mix"][0](x)


def gated(x, by):
    return torch.tanh(by(x))


def of_self(net):
    net.mixing = lambda x: torch.tanh(net.gate(x))


def of_layer(net):
    gate = net.gate
    net.mixing = lambda x: torch.tanh(gate(x))


def of_weight(net):
    weight, bias = net.gate.weight, net.gate.bias
    net.mixing = lambda x: torch.tanh(x @ weight.T + bias)


def by_default(net):
    net.mixing = lambda x, gate=net.gate: torch.tanh(gate(x))


def by_keyword(net):
    def mix(x, *, gate=net.gate):
        return torch.tanh(gate(x))

    net.mixing = mix


def through_another(net):
    def inner(x):
        return net.gate(x)

    net.mixing = partial(lambda f, x: torch.tanh(f(x)), inner)


def by_method_in_closure(net):
    gate = net.gate.forward
    net.mixing = lambda x: torch.tanh(gate(x))


def by_weak_reference(net):
    of = weakref.ref(net)
    net.mixing = Gated(lambda x: torch.tanh(of().gate(x)))


def by_global(net):
    space = {"net": net}
    exec("def helper(x):\n return net.gate(x)\ndef mix(x):\n return (lambda y: helper(y).tanh())(x)", space)
    net.mixing = space["mix"]


def in_container(net):
    net.mixing = Gated(lambda x: torch.tanh(net.gate(x)))


def by_hook(net):
    net.body.register_forward_hook(lambda module, args, output: output + net.gate(args[0]))


def by_pre_hook(net):
    net.register_forward_pre_hook(lambda module, args: (net.gate(args[0]),))


TIED = {
    of_self: "'mixing'",
    of_layer: "'mixing'",
    of_weight: "'mixing'",
    by_default: "'mixing'",
    by_keyword: "'mixing'",
    through_another: "'mixing'",
    by_method_in_closure: "'mixing'",
    by_weak_reference: r"'mixing\.options'",
    by_global: "'mixing'",
    in_container: r"'mixing\.options'",
    by_hook: "a forward hook of 'body'",
    by_pre_hook: "a forward pre hook of the whole model",
}


def partial_of_layer(net):
    net.mixing = partial(gated, by=net.gate)


def bound_method(net):
    net.mixing = Gated(net.mix)


def own_function(net):
    other = nn.Linear(5, 5).requires_grad_(False)  # no part of the student
    net.mixing = lambda x: torch.tanh(other(x))


def hook_on_its_module(net):
    net.body.register_forward_hook(lambda module, args, output: output + module.weight.sum())


def hook_with_a_layer(net):
    net.body.register_forward_hook(partial(lambda gate, module, args, output: gate(output), net.gate))


def same_name_as_a_global(net):
    space = {"gate": net.gate}
    exec("def mix(x, of):\n return of.gate(x)", space)  # an attribute, not the global
    net.mixing = partial(space["mix"], of=net)


def changed_by_its_gate(net):
    """Whether the answer depends on the gate that the model itself has."""
    x = torch.linspace(-1, 1, 10).view(2, 5)
    before = net(x)
    with torch.no_grad():
        net.gate.weight.add_(1)
    return not torch.equal(before, net(x))


@pytest.mark.parametrize("change", TIED, ids=lambda change: change.__name__)
def test_a_function_that_holds_the_original_is_refused(change):
    torch.manual_seed(0)
    net = Net()
    change(net)
    assert changed_by_its_gate(net)
    with pytest.raises(UserError, match=f"student: Net cannot be copied, .*: {TIED[change]} is a function that holds"):
        Given(student=net).copied()


@pytest.mark.parametrize(
    "change",
    [partial_of_layer, bound_method, hook_with_a_layer, hook_on_its_module, same_name_as_a_global, own_function],
)
def test_what_is_copied_with_the_student_is_taken(change):
    torch.manual_seed(0)
    net = Net()
    change(net)
    x = torch.linspace(-1, 1, 10).view(2, 5)
    answer = net(x)
    made = Given(student=net).copied().student
    assert torch.equal(made(x), answer)
    assert changed_by_its_gate(made) or change is own_function
    assert torch.equal(net(x), answer)


def test_no_student_is_none():
    assert Given().copied().student is None
