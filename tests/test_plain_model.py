"""What an objective's models give is what they give by themselves, bit for bit: traced, fused, or read by hooks."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, ResNet

from distpro import Objective
from distpro.batch import batch_of
from distpro.models import build_model
from pathways import Tapped, tap

WIDTH = 6


def seed(number):
    torch.manual_seed(number), random.seed(number), np.random.seed(number)


# Parts of networks, (N, WIDTH, 4, 4) in and out


class Own(nn.Module):
    """Somebody's own layer, of one of many kinds."""

    KINDS = {
        "branches": lambda self, x: self.a(x) + self.b(x).mul_(0.5),
        "in place": lambda self, x: F.relu_(self.a(x).add_(0.1)),
        "writes to its input": lambda self, x: (x.add_(0.1), self.a(x))[1],
        "gives its input": lambda self, x: x,
        "scaled": lambda self, x: self.a(x) * self.scale,
        "stores": lambda self, x: self._store(self.a(x)),
        "python random": lambda self, x: self.a(x) if random.random() < 0.5 else self.b(x),
        "numpy random": lambda self, x: self.a(x) * float(np.random.uniform()),
        "torch random": lambda self, x: self.a(x) if torch.rand(()).item() < 0.5 else self.b(x),
        "repeats": lambda self, x: [x := self.a(x) for _ in range(self.times)][-1],
        "checkpointed": lambda self, x: checkpoint(self.b, self.a(x), use_reentrant=False),
        "dict": lambda self, x: self._of({"x": self.a(x), "y": self.b(x)}),
        "tuple": lambda self, x: sum((self.a(x), self.b(x))),
        "switched": lambda self, x: self.a(x).round() if self.on["now"] else self.a(x),
        "detached": lambda self, x: self._without_gradients(x),
    }

    def __init__(self, kind):
        super().__init__()
        self.kind, self.scale, self.times, self.on, self.kept = kind, 0.7, 1, {"now": False}, []
        self.a, self.b = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)

    def forward(self, x):
        return self.KINDS[self.kind](self, x)

    def _store(self, y):
        self.kept.append(y.mean())
        return y + len(self.kept)

    def _of(self, values):
        return values["x"] - values["y"]

    def _without_gradients(self, x):
        with torch.no_grad():
            y = self.b(x)
        return self.a(x) + y


LAYERS = {
    "conv": lambda: nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
    "norm": lambda: nn.BatchNorm2d(WIDTH),
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "dropout": lambda: nn.Dropout(0.3),
    "identity": nn.Identity,
    "block": lambda: BasicBlock(WIDTH, WIDTH),
    "sequence": lambda: nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1), nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True)),
}
PARTS = [*LAYERS, *(f"own {kind}" for kind in Own.KINDS), "again"]


def part(name, before):
    if name == "again" and before:  # one module in two places
        return before[0]
    return Own(name.removeprefix("own ")) if name.startswith("own ") else LAYERS.get(name, nn.Identity)()


def network(parts):
    made = []
    for name in parts:
        made.append(part(name, made))
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 3)]
    return nn.Sequential(nn.Conv2d(3, WIDTH, 1), *made, *head)


def skeleton(kind, parts):
    """A network of torchvision or of the zoo with such parts in it."""
    if kind == "plain":
        return network(parts)
    if kind == "torchvision":
        model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)
        place = model.layer1
        convolution = nn.Conv2d(64, WIDTH, 1), nn.Conv2d(WIDTH, 64, 1)
    else:
        model = build_model("resnet8", num_classes=3)
        place = model.layer1
        convolution = nn.Conv2d(16, WIDTH, 1), nn.Conv2d(WIDTH, 16, 1)
    made = []
    for name in parts:
        made.append(part(name, made))
    place.append(nn.Sequential(convolution[0], *made, convolution[1]))
    return model


# What somebody does to a model after the objective was made


def _scale_output(module, _args, output):
    return output * 1.5 if isinstance(output, torch.Tensor) else output


def _scale_forward(module):
    forward = module.forward
    module.forward = lambda x: forward(x) * 1.5


CHANGES = {
    "attribute of a layer": lambda m: [setattr(x, "p", 0.6) for x in m.modules() if isinstance(x, nn.Dropout)],
    "own attribute": lambda m: [setattr(x, "scale", -1.3) for x in m.modules() if isinstance(x, Own)],
    "repeats": lambda m: [setattr(x, "times", 3) for x in m.modules() if isinstance(x, Own)],
    "own dict": lambda m: [x.on.update(now=True) for x in m.modules() if isinstance(x, Own)],
    "eps": lambda m: [setattr(x, "eps", 0.5) for x in m.modules() if isinstance(x, nn.BatchNorm2d)],
    "hook on the model": lambda m: m.register_forward_hook(_scale_output),
    "hook on a part": lambda m: next(m.children()).register_forward_hook(_scale_output),
    "hooks on all": lambda m: [x.register_forward_hook(_scale_output) for x in m.modules()],
    "hook before": lambda m: m.register_forward_pre_hook(lambda _, args: (args[0] + 1,)),
    "backward hook": lambda m: m.register_full_backward_pre_hook(lambda _, gradients: (gradients[0] * 2,)),
    "forward of the model": _scale_forward,
    "convolution replaced": lambda m: [
        setattr(x, n, nn.Conv2d(c.in_channels, c.out_channels, c.kernel_size, c.stride, c.padding))
        for x in list(m.modules())
        for n, c in list(x.named_children())
        if type(c) is nn.Conv2d
    ],
    "relu replaced": lambda m: [
        setattr(x, n, nn.Tanh()) for x in list(m.modules()) for n, c in list(x.named_children()) if type(c) is nn.ReLU
    ],
    "a layer of a sequence replaced by another of it": lambda m: [
        x._modules.update({list(x._modules)[-1]: x[0]})
        for x in m.modules()
        if type(x) is nn.Sequential and len(x) == 3 and type(x[0]) is type(x[2])
    ],
    "parameters replaced": lambda m: [
        setattr(x, n, nn.Parameter(torch.randn_like(p)))
        for x in m.modules()
        for n, p in list(x._parameters.items())
        if p is not None
    ],
    "buffers written through data": lambda m: [b.data.mul_(1.7) for b in m.buffers() if b.is_floating_point()],
    "weight norm": lambda m: [
        nn.utils.parametrizations.weight_norm(x) for x in list(m.modules()) if type(x) is nn.Conv2d
    ],
    "some in evaluation mode": lambda m: [x.eval() for x in m.modules() if isinstance(x, nn.BatchNorm2d)],
}


def pass_of(run, model, x, names, number):
    """Output and taps of one pass, the gradients of each of them, random numbers and buffers afterwards.

    Each has gradients of its own: in a sum of several losses the order of the additions, and so the last bit, depends on
    how a tap is read.
    """
    seed(number)
    output, taps = run(x)
    values = {"output": output, **{n: taps[n] for n in names}}
    gradients, named = {}, dict(model.named_parameters())
    for of, value in values.items():
        seed(number)
        found = torch.autograd.grad(value.square().sum(), list(named.values()), retain_graph=True, allow_unused=True)
        gradients |= {f"{of}: {n}": g for n, g in zip(named, found, strict=True)}
    drawn = torch.rand(()).item(), random.random(), np.random.uniform()
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    return {n: v.detach() for n, v in values.items()}, gradients, buffers, drawn


def assert_equal(found, expected):
    *ours, drawn = found
    *theirs, expected_drawn = expected
    assert drawn == expected_drawn
    for values, expected_values in zip(ours, theirs, strict=True):
        assert values.keys() == expected_values.keys()
        for name, value in expected_values.items():
            assert value is values[name] is None or _same(values[name], value), name


def _same(a, b):
    return a is not None and b is not None and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def check(model, changes, names, training):
    """Objective and a twin that runs by itself, before the change, after it, and once more."""
    x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    twin = copy.deepcopy(model)
    objective = Objective(None, model, [], example_input=x)
    objective.student = Tapped(model, names, x)  # as terms that read these taps would have it
    objective.train(training)
    twin.train(training)

    def plain(x):
        with tap(twin, names) as taps:
            output = twin(x)
        return output, {n: taps[n] for n in names}

    def ours(x):
        return objective.run_student(batch_of(x))

    for step, change in enumerate([None, *changes, None]):
        if change is not None:
            for each in (model, twin):
                seed(100 + step)
                CHANGES[change](each)
        try:
            expected = pass_of(plain, twin, x, names, step)
        except RuntimeError:  # a write in place to what the backward pass needs
            reject()
        assert_equal(pass_of(ours, model, x, names, step), expected)
    return objective.student


PLAIN = [*LAYERS, "again"]


@pytest.mark.slow
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # shrinking takes minutes
    suppress_health_check=list(HealthCheck),
)
@given(
    kind=st.sampled_from(["plain", "plain", "torchvision", "zoo"]),
    parts=st.one_of(*(st.lists(st.sampled_from(p), min_size=1, max_size=4) for p in (PLAIN, PARTS))),
    changes=st.lists(st.sampled_from(list(CHANGES)), max_size=2, unique=True),
    data=st.data(),
    training=st.booleans(),
)
def test_an_objective_runs_the_model(kind, parts, changes, data, training):
    seed(0)
    model = skeleton(kind, parts)
    places = ["1", "0"] if kind == "plain" else ["layer1", "layer2", "relu"][: 3 if kind == "torchvision" else 2]
    names = data.draw(st.lists(st.sampled_from(places), max_size=2, unique=True))
    check(model, changes, names, training)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["plain", "torchvision", "zoo"])
def test_a_traced_model_is_changed(kind, change):
    seed(0)
    model = skeleton(kind, ["sequence", "norm", "relu", "dropout"])
    names = ["1"] if kind == "plain" else ["layer1"]
    assert check(model, [change], names, training=True).traced


@pytest.mark.parametrize("kind", Own.KINDS)
def test_somebodys_own_layer(kind):
    """In training, where it draws, stores and switches; and its class is not known, so that nothing is traced."""
    seed(0)
    model = network(["own " + kind, "relu in place"])
    assert not check(model, ["own attribute", "own dict", "repeats"], ["1"], training=True).traced
