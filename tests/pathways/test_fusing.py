"""Fused code of traced models: the same numbers as the model's own, and given up where somebody would notice."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call

from distpro.models import build_model, stage_taps
from pathways import Tapped
from pathways.fusing import FrozenConv, computes_in_bfloat16
from tests.pathways.reference import NAMES, called_by, images, resnet, weighted_sum, written_by_hand

ZOO = [
    "resnet8",
    pytest.param("ResNet50", marks=pytest.mark.slow),
    "wrn_16_1",
    "vgg8",
    "mobilenet_v2",
    pytest.param("shufflenet_v1", marks=pytest.mark.slow),
    "shufflenet_v2",
    pytest.param("densenet_bc", marks=pytest.mark.slow),
]


def trained(name):
    """A model with statistics as after some training, so that a mistake shows."""
    torch.manual_seed(0)
    model = build_model(name, **({"depth": 10, "growth": 4} if name == "densenet_bc" else {}))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3), nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval().requires_grad_(False)


def plain(model, names, x):
    """The model's answers by its own code: without an example nothing is fused."""
    tapped = Tapped(model, names)
    assert tapped.traced and not tapped.runs_fused
    with torch.no_grad():
        return tapped(x)


def error(found, exact):
    """Largest error of output and taps, relative to the largest element of each."""
    (output, taps), (exact_output, exact_taps) = found, exact
    pairs = [(output, exact_output), *((taps[n], exact_taps[n]) for n in exact_taps)]
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("taps", ["pre", "post"])
@pytest.mark.parametrize("name", ZOO)
def test_a_frozen_model_gives_the_same(name, taps, layout):
    model = trained(name).to(memory_format=layout)
    names = [*getattr(stage_taps(model), taps), "logits"]
    x = torch.randn(3, 3, 32, 32).contiguous(memory_format=layout)
    exact = plain(copy.deepcopy(model).double(), names, x.double())
    given = x.clone()
    fused = Tapped(model, names, x[:2], frozen=True).eval()
    with torch.no_grad():
        assert fused.runs_fused
        once, again = fused(x), fused(x)
        assert error(once, exact) < 1e-5 and error(again, once) == 0 and torch.equal(x, given)
        with torch.autocast("cpu", torch.bfloat16):
            assert error(fused(x), exact) < 1.5 * error(plain(model, names, x), exact)
        wide = copy.deepcopy(fused.double())
        assert error(wide(x.double()), exact) < 1e-12


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_folded_where_the_cpu_computes_in_it(native, monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: native, raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    model, x = trained("resnet8"), images().float()
    tapped = Tapped(model, ["layer2"], x[:2], frozen=True).eval()
    with torch.no_grad():
        assert tapped.runs_fused
        with torch.autocast("cpu", torch.bfloat16):
            assert tapped.runs_fused == native
            exact = plain(copy.deepcopy(model).double(), ["layer2"], x.double())
            assert error(tapped(x), exact) < 1.5 * error(plain(model, ["layer2"], x), exact)


@pytest.mark.parametrize(
    "limit, computes",
    [("DEFAULT", True), ("AVX512_CORE_AMX", True), ("avx512_core_bf16", True), ("AVX2", False), ("AVX512_CORE", False)],
)
def test_bfloat16_is_not_native_where_onednn_may_not_use_it(limit, computes, monkeypatch):
    """https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html"""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: True, raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert computes_in_bfloat16() == computes


def test_what_follows_a_convolution_becomes_part_of_it(monkeypatch):
    """ResNet-8 has 9 convolutions, one BatchNorm each; a tap before a ReLU keeps that ReLU apart."""
    model, calls = trained("resnet8"), []
    call = FrozenConv.__call__
    monkeypatch.setattr(FrozenConv, "__call__", lambda self, *a: calls.append((self.relu, a)) or call(self, *a))
    fused = Tapped(model, ["layer2:pre_relu"], images().float(), frozen=True)
    calls.clear()
    with torch.no_grad():
        _, called = called_by(lambda: fused(images().float()), model)
    assert called == ["layer2.0.relu2", "pool", "fc"]
    assert len(calls) == 9 and all(isinstance(norm, nn.BatchNorm2d) for _, (_, norm, _, _) in calls)
    assert [relu for relu, _ in calls].count(True) == 1 + 2 * 3 - 1
    assert sum(other is not None for _, (*_, other) in calls) == 3


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 6, 7, 7), (1, 6, 1, 1)])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_sums_of_any_shape(shape, relu, bias, layout):
    torch.manual_seed(1)
    conv, norm = (
        nn.Conv2d(4, 6, 3, 2, 1, groups=2, bias=bias).requires_grad_(False),
        nn.BatchNorm2d(6, affine=bias).eval(),
    )
    norm.requires_grad_(False)
    nn.init.normal_(norm.running_mean), nn.init.uniform_(norm.running_var, 0.5, 2)
    x, other = torch.randn(2, 4, 13, 14).contiguous(memory_format=layout)[..., :13], torch.randn(shape)
    kept = other.clone()
    expected = norm(conv(x)) + other
    with torch.no_grad():
        found = FrozenConv(relu)(conv, norm, x, other)
    torch.testing.assert_close(found, expected.relu() if relu else expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(other, kept)


def test_changed_weights_and_statistics_are_noticed():
    model, x = trained("resnet8"), images().float()
    fused = Tapped(model, ["layer1"], x, frozen=True).eval()
    with torch.no_grad():
        before = fused(x)[0]
    for change in (
        lambda: model.layer1[0].bn2.running_var.mul_(2),
        lambda: model.load_state_dict(build_model("resnet8").state_dict()),
        lambda: model.conv1.weight.mul_(1.5),
        lambda: setattr(model.conv1.weight, "data", torch.randn(16, 3, 3, 3)),
        lambda: model.conv1.weight.data.mul_(0.5),
        lambda: [b.data.mul_(2) for b in model.buffers() if b.is_floating_point()],
        lambda: torch._foreach_mul_([p.data for p in model.parameters()], 1.1),
        lambda: torch._foreach_lerp_(
            [p.data for p in model.parameters()], [p.data for p in build_model("resnet8").parameters()], 0.3
        ),
        lambda: model.layer1[0].bn1.running_mean.data.copy_(torch.randn(16)),
        lambda: setattr(model.layer1[0].bn1, "weight", nn.Parameter(torch.randn(16), requires_grad=False)),
        lambda: setattr(model.layer1[0].bn1, "eps", 0.5),
    ):
        with torch.no_grad():
            change()
            after = fused(x)[0]
            torch.testing.assert_close(after, model(x), rtol=1e-4, atol=1e-4)
        assert fused.runs_fused is False and not torch.allclose(after, before)  # gradients are on here
        before = after


def test_folded_weights_follow_the_values():
    """Each kind of source by itself, written to in a way that counts no version; NaN, too."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3).requires_grad_(False), nn.BatchNorm2d(4).requires_grad_(False).eval()
    run, x = FrozenConv(True), torch.randn(2, 3, 5, 5)
    for tensor in (conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var):
        with torch.no_grad():
            before = run(conv, norm, x, None)
            version = tensor._version
            tensor.data.mul_(1.5).add_(0.1)
            assert tensor._version == version
            found = run(conv, norm, x, None)
            torch.testing.assert_close(found, norm(conv(x)).relu())
            assert not torch.equal(found, before)
    conv.bias.data[0] = float("nan")
    with torch.no_grad():
        assert run(conv, norm, x, None)[:, 0].isnan().all() and not run(conv, norm, x, None)[:, 1:].isnan().any()
        norm.eps = 3.0
        torch.testing.assert_close(run(conv, norm, x, None)[:, 1:], norm(conv(x)).relu()[:, 1:])


def test_fused_code_gives_way():
    """To gradients, training mode, hooks and other modules in the place of those that were there."""
    model, x = trained("resnet8"), images().float()
    fused = Tapped(model, ["layer1"], x, frozen=True).eval()
    assert not fused.runs_fused
    with torch.no_grad():
        assert fused.runs_fused
        assert not fused.train().runs_fused
        assert fused.eval().runs_fused
        model.layer1[0].bn1.train()
        assert not fused.runs_fused
        seen = []
        handle = fused.eval().model.layer1[0].bn1.register_forward_hook(lambda *_: seen.append(1))
        fused(x)
        assert seen == [1]
        handle.remove()
        handle = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
        fused(x)
        handle.remove()
        assert len(seen) > 20 and fused.runs_fused
        model.relu = nn.Sigmoid()
        assert not fused.runs_fused
        torch.testing.assert_close(fused(x)[0], model(x))
    x.requires_grad_()
    assert fused(x)[0].requires_grad


def test_batchnorm_without_statistics_is_not_folded():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()).eval()
    x = images().float()
    with torch.no_grad():
        torch.testing.assert_close(Tapped(model, [], x, frozen=True).eval()(x[:1])[0], model(x[:1]))


def test_a_difference_is_noticed():
    """Statistics so small that folding loses digits: the model's own code runs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=0)).eval()
    x = 1 + 1e-6 * torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        y = model[0](x)
        model[1].running_mean.copy_(y.mean((0, 2, 3)))
        model[1].running_var.copy_(y.var((0, 2, 3)))
        fused = Tapped(model, [], x, frozen=True).eval()
        assert not fused.runs_fused and torch.equal(fused(x)[0], model(x))


# A model that trains


@pytest.mark.parametrize("training", [True, False])
def test_relus_in_place_change_nothing(training):
    """Outputs, taps before and after ReLUs, and gradients, to the last bit."""
    model, x = resnet(training=training), images()
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    twin = copy.deepcopy(model)
    fused = Tapped(model, NAMES, x)
    assert fused.runs_fused
    output, taps = fused(x)
    expected_output, expected = written_by_hand(twin, x)
    assert torch.equal(output, expected_output)
    assert all(torch.equal(taps[n], expected[n]) for n in NAMES)
    weighted_sum(taps).backward(), weighted_sum({n: expected[n] for n in NAMES}).backward()
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(p.grad, q[1].grad), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_training_the_zoo(name):
    model = trained(name).train().requires_grad_(True)
    twin, x = copy.deepcopy(model), torch.randn(2, 3, 32, 32)
    fused, straight = Tapped(model, stage_taps(model).pre, x), Tapped(twin, stage_taps(model).pre)
    assert fused.runs_fused and not straight.runs_fused
    for tapped in (fused, straight):
        torch.manual_seed(3)
        output, taps = tapped(x)
        (F.cross_entropy(output, torch.tensor([1, 2])) + weighted_sum(taps)).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    for b, c in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(b, c)


def test_forward_mode_through_relus_in_place():
    model, x = trained("resnet8").double(), images()
    fused, straight = Tapped(model, ["layer2:pre_relu"], x), Tapped(model, ["layer2:pre_relu"])
    direction = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    tangents = []
    for tapped in (fused, straight):
        with forward_ad.dual_level():
            duals = {f"model.{n}": forward_ad.make_dual(p, direction[n]) for n, p in model.named_parameters()}
            output, taps = functional_call(tapped, duals, (x,))
            tangents.append([forward_ad.unpack_dual(t).tangent for t in (output, taps["layer2:pre_relu"])])
    assert fused.runs_fused and all(map(torch.equal, *tangents)) and tangents[0][0].abs().max() > 0
