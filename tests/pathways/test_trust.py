"""Which models may be traced, and what is noticed when they change."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, ResNet

from distpro.models import build_model
from pathways import Tapped, tap
from pathways.trust import Unchanged, trusted
from tests.pathways.reference import hooks_on, images, resnet


def own_relu(x):
    return x.clamp(min=0)


class Own(nn.Conv2d):
    """A convolution of somebody's own, that changes nothing."""


class Mixed(nn.Sequential):
    def forward(self, x):
        return super().forward(x)


@pytest.mark.slow
@pytest.mark.parametrize(
    "build",
    [
        lambda: build_model("resnet8"),
        lambda: build_model("mobilenet_v2"),
        lambda: torchvision.models.resnet50(),
        lambda: torchvision.models.mobilenet_v2(),
        lambda: torchvision.models.vgg11_bn(),
        lambda: torchvision.models.mnasnet0_5(),
        lambda: torchvision.models.regnet_y_400mf(),
    ],
)
def test_models_of_plain_layers_are_traced_and_fused(build):
    model, x = build(), torch.randn(2, 3, 64, 64)
    assert trusted(model) and Tapped(model, [], x).runs_fused
    with torch.no_grad():
        assert Tapped(model.eval().requires_grad_(False), [], x, frozen=True).eval().runs_fused


@pytest.mark.slow
def test_timms_models_of_plain_layers_are_traced_and_fused():
    timm = pytest.importorskip("timm")
    for name in ("resnet18", "convnext_atto"):
        model = timm.create_model(name, num_classes=4)
        assert Tapped(model, [], torch.randn(2, 3, 64, 64)).runs_fused, name


def _patched(name, function):
    model = resnet()
    setattr(model, name, function.__get__(model) if name == "_forward_impl" else function)
    return model


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(Own(3, 4, 1), nn.ReLU()),
        lambda: Mixed(nn.Conv2d(3, 4, 1), nn.ReLU()),
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))),
        lambda: ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=lambda c: nn.GroupNorm(2, c)),
        lambda: ResNet(BasicBlock, [1, 1, 1, 1], norm_layer=partial(Own, kernel_size=1, out_channels=64)),
        lambda: _patched("forward", lambda x: x),
        lambda: _patched("_forward_impl", lambda self, x: x),
        lambda: _with_function(),
    ],
)
def test_what_somebody_else_wrote_is_not_traced(build):
    assert not trusted(build())


def _with_function():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    model.activation = own_relu
    return model


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("patched", ["ResNet.forward", "ResNet._forward_impl", "BasicBlock.forward", "F.adaptive"])
def test_patched_classes_run_as_patched(monkeypatch, patched, when):
    model, x = resnet().eval(), images()
    tapped = None if when == "before" else Tapped(model, ["layer1"], x).eval()
    kind, name = (ResNet if patched.startswith("ResNet") else BasicBlock), patched.rpartition(".")[2]
    if patched == "F.adaptive":  # what a leaf calls is read when it runs
        original = F.adaptive_avg_pool2d
        monkeypatch.setattr(F, "adaptive_avg_pool2d", lambda x, size: original(x, size) * 2)
    else:
        original = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda self, x: original(self, x) * 2)
    tapped = tapped or Tapped(model, ["layer1"], x).eval()
    with tap(model, ["layer1"]) as taps:
        expected = model(x)
    output, features = tapped(x)
    assert torch.equal(output, expected) and torch.equal(features["layer1"], taps["layer1"])


def test_a_checkpointed_block_is_not_traced(monkeypatch):
    """Activation checkpointing of a known model by a patch of its class, as libraries do it."""
    original = BasicBlock.forward
    monkeypatch.setattr(BasicBlock, "forward", lambda self, x: checkpoint(original, self, x, use_reentrant=False))
    model, x = resnet(), images()
    assert not Tapped(model, ["layer1"], x).traced


@pytest.mark.slow
def test_timms_checkpointing_and_drop_path():
    timm = pytest.importorskip("timm")
    model, x = timm.create_model("resnet18", num_classes=4), torch.randn(2, 3, 64, 64)
    tapped = Tapped(model, ["layer1"], x)
    assert tapped.traced and tapped.unchanged
    model.set_grad_checkpointing(True)
    assert not tapped.unchanged and not Tapped(model, ["layer1"], x).traced
    model.set_grad_checkpointing(False)
    assert tapped.unchanged
    model.drop_rate = 0.5
    torch.manual_seed(0)
    found = tapped(x)[0]
    torch.manual_seed(0)
    assert torch.equal(found, model(x)) and not tapped.unchanged


# Changes


def three():
    a, b, c = (nn.Linear(4, 4) for _ in range(3))
    model = nn.Sequential(a, nn.Sequential(b), c, nn.Dropout(0.1), nn.BatchNorm1d(4))
    model.options, model.nested, model.own = {"a": [1, 2]}, [(1, {2})], torch.zeros(3)
    return model


CHANGES = {
    "a module replaced": lambda m: setattr(m, "0", nn.Linear(4, 4)),
    "two modules exchanged": lambda m: m._modules.update({"0": m[2], "2": m[0]}),
    "a module in place of its neighbour": lambda m: m._modules.update({"0": m[2]}),
    "the order of modules": lambda m: m._modules.update({"0": m._modules.pop("0")}),
    "a module more": lambda m: m[1].append(nn.ReLU()),
    "a module less": lambda m: m[1].pop(0),
    "a class": lambda m: setattr(m[0], "__class__", Own),
    "an attribute": lambda m: setattr(m[3], "p", 0.2),
    "a new attribute": lambda m: setattr(m, "scale", 1.0),
    "an attribute gone": lambda m: delattr(m, "own"),
    "a tensor": lambda m: setattr(m, "own", torch.ones(3)),
    "a list in a dict": lambda m: m.options["a"].append(3),
    "a set in a tuple in a list": lambda m: m.nested[0][1].add(3),
    "a method": lambda m: setattr(m, "forward", m.forward),
    "no bias": lambda m: setattr(m[0], "bias", None),
    "no statistics": lambda m: setattr(m[4], "running_mean", None),
    "a buffer": lambda m: m.register_buffer("more", torch.zeros(1)),
    "a hook": lambda m: m[1].register_forward_hook(lambda *_: None),
    "a hook before": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "a hook behind": lambda m: m[0].register_full_backward_hook(lambda *_: None),
    "a hook behind, before": lambda m: m[0].register_full_backward_pre_hook(lambda *_: None),
    "compiled": lambda m: m[1].compile(backend="eager"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change):
    model = three()
    unchanged = Unchanged(model)
    assert unchanged()
    CHANGES[change](model)
    assert not unchanged()


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_on_all_modules_are_noticed(kind):
    unchanged = Unchanged(three())
    handle = getattr(nn.modules.module, f"register_module_{kind}_hook")(lambda *_: None)
    try:
        assert not unchanged()
    finally:
        handle.remove()
    assert unchanged()


def test_what_traced_code_reads_for_itself_may_change():
    model = three()
    unchanged = Unchanged(model)
    with torch.no_grad():
        model[0].weight.mul_(2)
    model[0].bias = nn.Parameter(torch.ones(4))
    model[4].running_mean = torch.ones(4)
    assert unchanged()
    for change in (model.eval, model[1].train, model.double, lambda: model.requires_grad_(False)):
        change()
        assert unchanged(), change
    model[3].p = 0.1 * 1  # the same value
    model.options = {"a": [1, 2]}
    assert unchanged()


def test_a_tensor_under_two_names_is_not_known_by_one():
    """The class token of a ViT made one with another parameter: a trace would read whichever name came first."""
    model = torchvision.models.VisionTransformer(8, 4, 1, 1, 8, 8, num_classes=3)
    assert Tapped(model, ["encoder"]).traced
    model.encoder.extra = model.class_token
    assert not Tapped(model, ["encoder"]).traced


def test_a_tap_inside_a_leaf_that_shares_a_module():
    """It runs before the encoder layer and inside it: the tap is what it gave last."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 1, 4, dropout=0.0, batch_first=True)
    model, x = nn.Sequential(layer.linear1, layer), torch.randn(2, 3, 4)
    tapped = Tapped(model, ["0"])
    with tap(model, ["0"]) as taps:
        model(x)
    assert not tapped.traced and torch.equal(tapped(x)[1]["0"], taps["0"])


# Hooks


def user():
    torch.manual_seed(0)
    return Mixed(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3)).double()


def test_hooks_of_a_pass_are_gone_after_it_and_come_last():
    model, x = user(), images(size=8)
    tapped = Tapped(model, ["0"], x)
    assert not tapped.traced and hooks_on(model) == 0
    model[0].register_forward_hook(lambda m, args, output: output * 3)
    assert torch.equal(tapped(x)[1]["0"], model[0](x)) and hooks_on(model) == 1
    model._modules["0"] = nn.Conv2d(3, 4, 1).double()
    assert torch.equal(tapped(x)[1]["0"], model[0](x))
    with pytest.raises(RuntimeError):
        tapped(x[:, :2])
    assert hooks_on(model) == 0


@pytest.mark.parametrize("hold", [False, True])
@pytest.mark.parametrize("build", [user, resnet])
def test_a_copy_reads_its_own_model(build, hold):
    model, x = build().eval(), images(size=8 if build is user else 32)
    names = ["0"] if build is user else ["layer1"]
    tapped = Tapped(model, names, x, hold=hold)
    twin = copy.deepcopy(tapped)
    assert twin.traced is tapped.traced is twin.unchanged is (build is resnet)
    with torch.no_grad():
        for p in twin.model.parameters():
            p.add_(1)
        before = tapped(x)
        output, features = twin(x)
        assert torch.equal(output, twin.model(x)) and not torch.equal(output, before[0])
        assert not torch.equal(features[names[0]], before[1][names[0]])
        again = tapped(x)
        assert torch.equal(again[0], before[0]) and torch.equal(again[1][names[0]], before[1][names[0]])
        assert torch.equal(before[0], model(x))


def test_a_copy_of_what_has_changed_is_changed_too():
    model, x = resnet().eval(), images()
    tapped = Tapped(model, ["layer1"], x)
    model.layer1.register_forward_hook(lambda m, args, output: output * 2)
    twin = copy.deepcopy(tapped)
    assert not twin.traced and torch.equal(twin(x)[0], model(x))


# Compiled


@pytest.mark.slow
def test_a_model_that_is_compiled_itself_is_read_in_every_pass(compiler):
    model, x = user(), images(size=8)
    expected = [model[0](x + n) for n in range(3)]
    model.compile(backend="eager")
    tapped = Tapped(model, ["0"])
    for n in range(3):
        assert torch.equal(tapped(x + n)[1]["0"], expected[n])
