"""Encoder-decoders: S2D's layers and numbers of parameters, sizes, taps, and what is no encoder."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import fx

from distpro.models import build_model, stage_taps
from distpro.models.encoder_decoder import DECODERS
from pathways import Tapped, UserError
from pathways.stages import find_stages


def build(encoder="torchvision:shufflenet_v2_x0_5", **params):
    torch.manual_seed(0)
    return build_model("encoder_decoder", encoder=encoder, **{"width": 32, **params})


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_output_has_the_image_s_size(decoder):
    model = build(decoder=decoder, num_classes=3).eval()
    for size in ((96, 128), (64, 64), (70, 90)):
        found = model(torch.randn(2, 3, *size))
        assert found.shape == (2, 3, *size) and found.isfinite().all()


def published(decoder, channels, width):
    """Parameters of S2D's decoder as its paper describes it: a 1×1 convolution to ``width`` channels (there half of the
    encoder's), then four steps that halve them, all with BatchNorm, and a 3×3 convolution to one channel."""
    total = channels * width + 2 * width
    for _ in range(4):
        half = width // 2
        if decoder == "upproj":
            total += 2 * 25 * width * half + 9 * half * half + 3 * 2 * half
        else:
            total += int(decoder[-1]) ** 2 * width * half + 2 * half
        width = half
    return total + 9 * width


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_parameters_are_s2d_s(decoder):
    model = build("torchvision:resnet18", decoder=decoder, width=None)
    encoder = torchvision.models.resnet18()
    expected = sum(p.numel() for p in encoder.parameters()) - sum(p.numel() for p in encoder.fc.parameters())
    assert sum(p.numel() for p in model.parameters()) == expected + published(decoder, 512, 256)
    assert not any(name.startswith("fc") for name, _ in model.encoder.named_children())


def test_the_encoder_is_the_classifier_s_up_to_its_last_map():
    model = build("torchvision:resnet18").eval()
    whole = torchvision.models.resnet18().eval()
    whole.load_state_dict(model.encoder.state_dict(), strict=False)
    x, seen = torch.randn(2, 3, 64, 64), []
    whole.avgpool.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    whole(x)
    assert torch.equal(model.encoder(x), seen[0])


@pytest.mark.parametrize(
    "encoder",
    ["mobilenet_v3_small", "regnet_y_400mf", "mnasnet0_5", "squeezenet1_1", "densenet121", "shufflenet_v2_x0_5"],
)
def test_encoders_of_torchvision(encoder):
    model = build(f"torchvision:{encoder}")
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 1, 64, 64)


@pytest.mark.parametrize("encoder", ["resnet10t", "mobilenetv3_small_050", "efficientnet_lite0"])
def test_encoders_of_timm(encoder):
    timm = pytest.importorskip("timm")
    model = build(f"timm:{encoder}")
    x = torch.randn(1, 3, 64, 64)
    assert model.eval()(x).shape == (1, 1, 64, 64)
    features = timm.create_model(encoder, num_classes=0, global_pool="").eval()
    features.load_state_dict(model.encoder.state_dict())
    assert torch.equal(features(x), model.encoder(x))


@pytest.mark.slow
@pytest.mark.parametrize("decoder", DECODERS)
def test_taps_are_the_steps_of_the_decoder(decoder):
    model, x = build(decoder=decoder).eval(), torch.randn(2, 3, 96, 128)
    taps = stage_taps(model)
    assert taps.embedding is None and len(taps.post) == len(taps.pre) == 4
    tapped = Tapped(model, [taps.stem, *taps.post, *taps.pre], x)
    with torch.no_grad():
        output, values = tapped(x)
        assert tapped.traced and torch.equal(output, model(x))
    sizes = [tuple(values[tap].shape[1:]) for tap in taps.post]
    assert sizes == [(16, 6, 8), (8, 12, 16), (4, 24, 32), (2, 48, 64)]
    for post, pre in zip(taps.post, taps.pre, strict=True):
        assert values[pre].min() < 0 and torch.equal(values[pre].relu(), values[post])


def test_traces_alike_in_training_and_evaluation():
    model = build()
    assert fx.symbolic_trace(model.train()).code == fx.symbolic_trace(model.eval()).code


def test_the_encoder_s_stages_are_found_where_nobody_states_any():
    found = find_stages(build().eval(), torch.randn(2, 3, 96, 128))
    assert all(name.startswith("encoder.") for name in found[:3]) and len(found) >= 3


def test_up_projection_puts_zeros_between_the_pixels():
    """Laina et al.: unpooling, then convolutions of 5×5; here by writing every second pixel."""
    step = DECODERS["upproj"](16).eval()
    x = torch.randn(2, 16, 3, 5)
    sparse = torch.zeros(2, 16, 6, 10)
    sparse[:, :, ::2, ::2] = x
    truth = F.relu(step.upper(sparse) + step.lower(sparse))
    assert torch.allclose(step(x), truth, atol=1e-6)
    assert "corner" not in step.state_dict()


def test_a_student_of_it_says_what_the_data_need():
    assert build_model("encoder_decoder", num_classes=11, width=16).head.out_channels == 11


@pytest.mark.slow
@pytest.mark.parametrize(
    "params, message",
    [
        ({"encoder": "resnet18"}, "encoder must be torchvision:NAME or timm:NAME, got 'resnet18'"),
        ({"encoder": "torchvision:resnet81"}, "torchvision has no model 'resnet81'; did you mean 'resnet18'"),
        ({"encoder": "torchvision:vit_b_16"}, "vit_b_16 has no part that gives maps alone"),
        ({"encoder": "timm:vit_tiny_patch16_224"}, "takes no image of 64x64"),
        ({"encoder": "torchvision:swin_t", "width": 32}, r"maps with their channels last, \(1, 2, 2, 768\)"),
        ({"decoder": "deconv"}, "unknown decoder 'deconv'; did you mean 'deconv"),
        ({"width": 20}, "width must be a multiple of 16, got 20"),
        ({"depth": 3}, "has no parameter 'depth'"),
        ({"encoder_params": {"weigths": None}}, "weigths"),
    ],
)
def test_what_is_refused(params, message):
    with pytest.raises(UserError, match=message):
        build(**params)
