"""Models of segmentation: segmentation-models-pytorch's by name, and PSPNet."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distpro.models import build_model, stage_taps
from pathways import Tapped, UserError
from pathways.stages import find_stages
from pathways.taps import response_of

SMALL = {"encoder_name": "resnet18"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PSPNet", "Unet", "DeepLabV3Plus", "FPN"])
def test_a_model_of_segmentation_models_pytorch(name):
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    model = build_model(f"smp:{name}", num_classes=5, **SMALL).eval()
    torch.manual_seed(0)
    own = getattr(smp, name)(**SMALL, encoder_weights=None, classes=5).eval()
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(model(x), own(x)) and model(x).shape == (2, 5, 64, 96)
    stages = find_stages(model, x)
    assert len(stages) >= 3 and "encoder.layer1" in stages
    _, taps = Tapped(model, stages, x)(x)
    assert [taps[stage].shape[-2:] for stage in stages] == sorted((taps[s].shape[-2:] for s in stages), reverse=True)


@pytest.mark.slow
def test_classes_of_its_own_and_weights_are_passed_on(monkeypatch):
    smp = pytest.importorskip("segmentation_models_pytorch")
    asked = []

    class Unet(smp.Unet):
        def __init__(self, **params):
            asked.append(params)
            super().__init__(**{**params, "encoder_weights": None})

    monkeypatch.setitem(smp.MODEL_ARCHITECTURES_MAPPING, "unet", Unet)
    build_model("smp:Unet", num_classes=5, **SMALL)
    build_model("smp:Unet", num_classes=5, classes=7, encoder_weights="imagenet", **SMALL)
    assert [(p["classes"], p["encoder_weights"]) for p in asked] == [(5, None), (7, "imagenet")]


def test_a_wrong_name_or_option():
    pytest.importorskip("segmentation_models_pytorch")
    with pytest.raises(UserError, match="has no model 'PSPnet'; did you mean 'PSPNet'"):
        build_model("smp:PSPnet")
    with pytest.raises(UserError, match="model 'smp:Unet': .*Wrong encoder name `resnet19`"):
        build_model("smp:Unet", encoder_name="resnet19")
    with pytest.raises(UserError, match="model 'smp:DeepLabV3Plus': ValueError: .*output stride 8 or 16, got 7"):
        build_model("smp:DeepLabV3Plus", encoder_output_stride=7, **SMALL)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(UserError, match=r"'smp:Unet' needs .*pip install 'distpro\[segmentation\]'"):
        build_model("smp:Unet")


# PSPNet


@pytest.fixture(scope="module")
def pspnet():
    pytest.importorskip("timm")
    torch.manual_seed(0)
    model = build_model("pspnet", num_classes=5, width=64).eval()
    for module in model.modules():  # timm begins with residual branches of 0
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def test_pspnet_gives_maps_of_the_images_size(pspnet):
    x = torch.randn(2, 3, 64, 80)
    with torch.no_grad():
        output = pspnet(x)
        assert output["out"].shape == output["aux"].shape == (2, 5, 64, 80)
        assert response_of(output) is output["out"]
        deep = pspnet.encoder(x)[-1]
        assert deep.shape == (2, 512, 8, 10)  # an eighth of the image, by dilation
        expected = pspnet.classifier(pspnet.pooling(deep))
        torch.testing.assert_close(output["out"], F.interpolate(expected, (64, 80), mode="bilinear"))


def test_the_pyramid_by_hand(pspnet):
    """Beside the map its means over 1, 4, 9 and 36 parts, each through a convolution to a quarter of its channels."""
    torch.manual_seed(0)
    x = torch.randn(2, 512, 12, 12)
    branches = [x]
    for branch, bins in zip(pspnet.pooling.pooled, (1, 2, 3, 6), strict=True):
        side = 12 // bins
        means = x.unfold(2, side, side).unfold(3, side, side).mean((4, 5))
        branches.append(F.interpolate(branch[2](branch[1](means)).relu(), (12, 12), mode="bilinear"))
    joined = torch.cat(branches, 1)
    assert joined.shape[1] == 1024
    with torch.no_grad():
        torch.testing.assert_close(pspnet.pooling(x), pspnet.pooling.join(joined), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_pspnets_taps(pspnet):
    taps, x = stage_taps(pspnet), torch.randn(2, 3, 64, 80)
    _, values = Tapped(pspnet, [taps.stem, *taps.post, *taps.pre, taps.embedding], x)(x)
    assert [tuple(values[t].shape[1:]) for t in taps.post] == [
        (64, 16, 20), (128, 8, 10), (256, 8, 10), (512, 8, 10), (64, 8, 10)
    ]  # fmt: skip
    for post, pre in zip(taps.post[:-1], taps.pre[:-1], strict=True):
        assert values[pre].min() < 0 and torch.equal(values[pre].relu(), values[post])


def test_pspnet_trains_on_one_image(pspnet):
    """One pixel per channel has no batch statistics."""
    pspnet.train()
    output = pspnet(torch.randn(1, 3, 64, 64))
    (output["out"].sum() + output["aux"].sum()).backward()
    assert all(p.grad is not None for p in pspnet.parameters())
    pspnet.eval()


def test_pspnet_without_an_auxiliary_head():
    pytest.importorskip("timm")
    assert build_model("pspnet", auxiliary=False, width=8).eval()(torch.zeros(1, 3, 32, 32)).keys() == {"out"}


def test_the_papers_encoders():
    """Parameters of timm's ResNets without their classifiers, and by hand those of the two heads."""
    timm = pytest.importorskip("timm")
    for name, deep, last in (("resnet18", 512, 256), ("resnet101", 2048, 1024)):
        with torch.device("meta"):
            model, whole = build_model("pspnet", num_classes=19, encoder=name), timm.create_model(name, num_classes=0)
        own = sum(p.numel() for p in whole.parameters())
        quarter = deep // 4
        pyramid = 4 * deep * quarter + quarter + 3 * 2 * quarter  # the bias of one, the norms of three
        head = 9 * 2 * deep * 512 + 2 * 512 + 512 * 19 + 19
        aux = 9 * last * (last // 4) + 2 * (last // 4) + (last // 4) * 19 + 19
        assert sum(p.numel() for p in model.parameters()) == own + pyramid + head + aux


@pytest.mark.parametrize("encoder", ["resnt18", "vgg11"])
def test_a_wrong_encoder(encoder):
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=rf"model 'pspnet': encoder '{encoder}': .* \(allowed: a ResNet of timm\)"):
        build_model("pspnet", encoder=encoder)
    with pytest.raises(UserError, match="pspnet.* has no parameter 'bins'"):
        build_model("pspnet", bins=3)


def test_pspnet_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"model 'pspnet' needs timm: pip install 'distpro\[timm\]'"):
        build_model("pspnet")
