"""Forward-mode passes against central differences in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torchvision.models import VisionTransformer

from distpro.search.estimators.tangents import forward_mode


class Both(nn.Module):
    """Gives a tuple with a mapping inside, as tapped models do."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        feature = self.first(x)
        return self.second(feature), {"feature": feature}


def conv_net(norm: nn.Module) -> nn.Module:
    first = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Softplus())
    return Both(first, nn.Sequential(nn.Flatten(), nn.Linear(6 * 16, 4)))


MODELS = {
    "batch norm": lambda: conv_net(nn.BatchNorm2d(6)),
    "batch norm without affine part": lambda: conv_net(nn.BatchNorm2d(6, affine=False)),
    "batch norm without running statistics": lambda: conv_net(nn.BatchNorm2d(6, track_running_stats=False)),
    "batch norm with a zero weight": lambda: conv_net(nn.BatchNorm2d(6)),
    "group norm": lambda: conv_net(nn.GroupNorm(2, 6)),
    "batch norm over vectors": lambda: Both(
        nn.Sequential(nn.Flatten(), nn.Linear(108, 5), nn.BatchNorm1d(5), nn.Tanh()), nn.Linear(5, 4)
    ),
    "attention": lambda: Both(
        VisionTransformer(image_size=6, patch_size=3, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16),
        nn.Identity(),
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [True, False])
def test_tangents_equal_central_differences(name, training):
    torch.manual_seed(0)
    model = MODELS[name]().double().train(training)
    if "zero" in name:
        nn.init.zeros_(model.first[1].weight)
    x = torch.randn(8, 3, 6, 6, dtype=torch.float64)
    values = {n: p.detach() for n, p in model.named_parameters()}
    direction = {n: torch.randn_like(p) for n, p in values.items()}

    def at(epsilon):
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        with torch.no_grad():
            return functional_call(model, ({n: v + epsilon * direction[n] for n, v in values.items()}, buffers), (x,))

    epsilon = 1e-6
    (plus, plus_feature), (minus, minus_feature) = at(epsilon), at(-epsilon)
    output, feature = forward_mode(model, values, direction, x)
    for found, high, low in (
        (output, plus, minus),
        (feature["feature"], plus_feature["feature"], minus_feature["feature"]),
    ):
        truth = (high - low) / (2 * epsilon)
        assert (found - truth).norm() < 1e-7 * truth.norm() + 1e-9


def test_parameters_that_do_not_move_and_buffers_stay():
    model = conv_net(nn.BatchNorm2d(6)).train()
    x = torch.randn(4, 3, 6, 6)
    before = {n: b.clone() for n, b in model.named_buffers()}
    values = {n: p.detach() for n, p in model.named_parameters()}
    last = {"second.1.bias": torch.ones(4)}
    output, features = forward_mode(model, values, last, x)
    assert torch.equal(output, torch.ones(4, 4))
    assert not features["feature"].any()
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())
