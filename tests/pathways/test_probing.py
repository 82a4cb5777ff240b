"""Probing a model leaves no trace, and finds its stages."""

import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from distpro.objective import Objective
from pathways import UserError, find_stages, probe_shapes
from pathways.probing import untouched
from tests.pathways.reference import Fails, hooks_on, images, resnet


class Restless(nn.Module):
    """Changes buffers in both modes, replaces one of them, and draws random numbers."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x):
        x = self.norm(self.conv(x))
        self.steps += 1
        self.mean = 0.5 * self.mean + x.detach().mean((0, 2, 3))
        return self.drop(x) + torch.rand(x.shape)


def train_once(model, x):
    with untouched(model):
        model.train()
        model(x)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("probe", [lambda m, x: probe_shapes(m, ["0.conv"], x), find_stages, train_once])
def test_probing_leaves_no_trace(probe, fails):
    torch.manual_seed(0)
    pool = nn.AvgPool2d(2)
    model = nn.Sequential(Restless(), pool, nn.BatchNorm2d(4), Fails() if fails else nn.Identity()).train()
    model[2].eval()
    buffers = {k: (b, b.clone()) for k, b in model.named_buffers()}
    modes, x = [m.training for m in model.modules()], torch.randn(2, 3, 8, 8)
    rng = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="as planned") if fails else nullcontext():
        probe(model, x)
    for k, b in model.named_buffers():
        assert b is buffers[k][0] and torch.equal(b, buffers[k][1]), k
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert hooks_on(model) == 0


class Keeps(nn.Module):
    """Collects in containers, draws of three generators, and has a child of its own in a list."""

    def __init__(self):
        super().__init__()
        self.fc, self.losses, self.by_name, self.seen = nn.Linear(3, 3), [], {"all": [1]}, {1}

    def forward(self, x):
        y = self.fc(x) * (random.random() + np.random.uniform() + torch.rand(()))
        self.losses.append(y.mean())
        self.by_name["last"] = y
        self.by_name["all"].append(2)
        self.seen |= {2}
        return y


@pytest.mark.parametrize("fails", [False, True])
def test_probing_empties_what_it_filled(fails):
    model = nn.Sequential(Keeps(), Fails() if fails else nn.Identity())
    kept = model[0].losses, model[0].by_name, model[0].seen
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with pytest.raises(RuntimeError, match="as planned") if fails else nullcontext():
        probe_shapes(model, ["0"], torch.zeros(2, 3))
    assert all(a is b for a, b in zip(kept, (model[0].losses, model[0].by_name, model[0].seen), strict=True))
    assert kept == ([], {"all": [1]}, {1})
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


def test_probe_shapes():
    shapes = probe_shapes(resnet(), ["layer1", "layer4:pre_relu", "fc:input", "logits"], images())
    assert shapes == {"layer1": (64, 8, 8), "layer4:pre_relu": (512, 1, 1), "fc:input": (512,), "logits": (5,)}


def vit(layers):
    return torchvision.models.VisionTransformer(32, 8, layers, num_heads=2, hidden_dim=16, mlp_dim=32)


def encoder_blocks(*numbers):
    return [f"encoder.layers.encoder_layer_{n}" for n in numbers]


@pytest.mark.parametrize(
    "build, size, stages",
    [
        (torchvision.models.resnet18, 64, ["relu", "layer1", "layer2", "layer3", "layer4"]),
        (torchvision.models.resnet18, 32, ["relu", "layer1", "layer2", "layer3"]),  # layer4 is 1x1
        (
            lambda: torchvision.models.mobilenet_v2(width_mult=0.25),
            64,
            ["features.1", "features.3", "features.6", "features.13", "features"],
        ),
        (lambda: vit(4), 32, encoder_blocks(0, 1, 2, 3)),
        (lambda: vit(6), 32, encoder_blocks(0, 2, 3, 5)),
        (lambda: vit(12), 32, encoder_blocks(2, 5, 8, 11)),
    ],
    ids=["resnet18-64", "resnet18-32", "mobilenet_v2", "vit-4", "vit-6", "vit-12"],
)
def test_find_stages(build, size, stages):
    model, x = build(), torch.zeros(2, 3, size, size)
    assert find_stages(model, x) == stages
    shapes = [shape[1:] for shape in probe_shapes(model, stages, x).values()]
    assert shapes == sorted(shapes, reverse=True)


def test_find_stages_number_of_blocks():
    assert find_stages(vit(12), torch.zeros(2, 3, 32, 32), token_stages=3) == encoder_blocks(3, 7, 11)


class OneBlockRepeated(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x):
        for _ in range(6):
            x = self.body[0](x)
        return x


@pytest.mark.parametrize(
    "model, x",
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(2, 3, 2, 2)),
        (nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1)), torch.zeros(2, 3, 8, 8)),
        (vit(3), torch.zeros(2, 3, 32, 32)),
        (OneBlockRepeated(), torch.zeros(2, 5, 4)),
    ],
    ids=["mlp", "no downsampling", "too few blocks", "shared block"],
)
def test_find_stages_gives_up_with_a_message(model, x):
    with pytest.raises(UserError, match="no stages found in .*: name its taps in the config"):
        find_stages(model, x)


class WritesToItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 5, 3, stride=2)

    def forward(self, x):
        return self.fc(torch.relu(self.body(x.sub_(0.5).div_(2))))


@pytest.mark.parametrize("look", [
    lambda m, x: probe_shapes(m, ["body"], x),
    find_stages,
    lambda m, x: Objective(m, WritesToItsInput(), [], example_input=x),
])  # fmt: skip
def test_an_example_stays_as_it_is(look):
    x = torch.rand(2, 3, 16, 16)
    before = x.clone()
    look(WritesToItsInput(), x)
    assert torch.equal(x, before)
