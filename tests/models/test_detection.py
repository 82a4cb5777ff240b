"""Detectors on small pyramids, and the bottleneck of head network distillation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distpro.models import build_model
from pathways import UserError


def test_the_bottleneck_is_the_authors():
    """2×2 convolutions 64-64-256-64-3 and 3-64-128-256-256 without biases, as in the authors' `Bottleneck4LargeResNet`."""
    model = build_model("ghnd_bottleneck").eval()
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    widths = [(c.in_channels, c.out_channels) for c in convolutions]
    assert widths == [(64, 64), (64, 256), (256, 64), (64, 3), (3, 64), (64, 128), (128, 256), (256, 256)]
    assert all(c.kernel_size == (2, 2) and c.bias is None for c in convolutions)
    assert [c.padding for c in convolutions] == [(1, 1)] * 4 + [(0, 0)] * 4
    kinds = [[type(m).__name__ for m in part] for part in (model.encoder, model.decoder)]
    conv, norm, relu = "Conv2d", "BatchNorm2d", "ReLU"
    assert kinds[0] == [conv, norm, conv, norm, relu, conv, norm, conv]
    assert kinds[1] == [norm, relu, conv, norm, conv, norm, relu, conv, norm, conv, norm, relu]
    assert sum(p.numel() for p in model.parameters()) == 4 * sum(a * b for a, b in widths) + 2 * (
        64 + 256 + 64 + 3 + 64 + 128 + 256 + 256
    )
    x = torch.randn(2, 64, 9, 14)
    assert model.encoder(x).shape == (2, 3, 13, 18) and model(x).shape == (2, 256, 9, 14)
    assert build_model("ghnd_bottleneck", encoder=[8, 3], decoder=[8, 64])(x).shape == x.shape
    with pytest.raises(UserError, match="need an even number of convolutions, as many as each other, got 3 and 4"):
        build_model("ghnd_bottleneck", encoder=[8, 8, 3])


@pytest.mark.slow
@pytest.mark.parametrize(
    "backbone", ["resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"]
)
@pytest.mark.parametrize("levels", [1, 3])
def test_a_pyramid_has_the_strides_that_it_says(backbone, levels):
    model = build_model("fcos_fpn", num_classes=2, backbone=backbone, channels=32, levels=levels).eval()
    with torch.no_grad():
        maps = model.backbone(torch.randn(1, 3, 64, 96))
    strides = [32 // 2 ** (levels - 1 - n) for n in range(levels)]
    assert {key: tuple(x.shape) for key, x in maps.items()} == {
        str(n): (1, 32, 64 // stride, 96 // stride) for n, stride in enumerate(strides)
    }
    assert model.anchor_generator.sizes == tuple((float(stride),) for stride in strides)


@pytest.mark.slow
def test_a_backbone_s_weights(tmp_path):
    torch.manual_seed(0)
    classifier = build_model("torchvision:resnet18")
    torch.save(classifier.state_dict(), tmp_path / "resnet18.pt")
    model = build_model("fasterrcnn_fpn", channels=32, backbone_checkpoint=str(tmp_path / "resnet18.pt"))
    assert torch.equal(model.backbone.body.layer4[1].conv2.weight, classifier.layer4[1].conv2.weight)


@pytest.mark.slow
def test_what_is_no_pyramid_is_refused():
    for name, params, message in (
        ("fcos_fpn", {"channels": 48}, "channels must be a multiple of 32"),
        ("fcos_fpn", {"backbone": "vgg11"}, "over a ResNet or a MobileNet of torchvision, not 'vgg11'"),
        ("fcos_fpn", {"backbone": "resnet19"}, "torchvision has no model 'resnet19'; did you mean 'resnet18'"),
        ("retinanet_fpn", {"levels": 5}, "a feature pyramid over resnet18 has 1 to 4 levels, got 5"),
        ("fasterrcnn_fpn", {"anchor_sizes": [8, 16]}, "anchor_sizes must be 3 numbers above 0, one a level"),
    ):
        with pytest.raises(UserError, match=message):
            build_model(name, **params)
