"""What holds for every model, published sizes, and how a name becomes a model."""

import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn

from distpro.models import MODELS, StageTaps, build_model, stage_taps
from distpro.models.resnet import ZeroPad, cifar_resnet
from distpro.models.shufflenet import UnitV2
from pathways import Tapped, UserError, tap

REQUIRED = {"wrn": {"depth": 10, "width": 1}}
OWN_TESTS = {"deit", "efficientnet_lite0", "encoder_decoder", "pspnet"}  # made of parts, with tests of their own
NAMES = [name for name in MODELS if name not in OWN_TESTS and not MODELS[name].__module__.endswith(".detection")]


def example(name):
    return torch.randn(2, 3, 224, 224) if name == "deit_tiny" else torch.randn(2, 3, 32, 32)


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "params", "millions"),
    [
        ("densenet_bc", {"depth": 100, "growth": 12}, 0.8),  # Huang et al., Table 2
        ("densenet_bc", {"depth": 250, "growth": 24}, 15.3),
        ("densenet_bc", {"depth": 190, "growth": 40}, 25.6),
        ("wrn", {"depth": 40, "width": 4}, 8.9),  # Zagoruyko and Komodakis, Tables 4 and 5
        ("wrn", {"depth": 28, "width": 10}, 36.5),
        ("resnet110", {"shortcut": "zero_pad"}, 1.7),  # He et al., Table 6
    ],
)
def test_published_sizes(name, params, millions):
    with torch.device("meta"):
        assert round(count(build_model(name, num_classes=10, **params)) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("name", "params", "parameters"),
    [
        ("resnet20", {"num_classes": 10, "shortcut": "zero_pad"}, 269_722),
        ("resnet32", {"num_classes": 10, "shortcut": "zero_pad"}, 464_154),
        ("resnet44", {"num_classes": 10, "shortcut": "zero_pad"}, 658_586),
        ("resnet56", {"num_classes": 10, "shortcut": "zero_pad"}, 853_018),
        ("deit_tiny", {}, 5_717_416),
    ],
)
def test_known_counts(name, params, parameters):
    assert count(build_model(name, **params)) == parameters


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_traces_alike_in_training_and_evaluation(name):
    model = build_model(name, **REQUIRED.get(name, {}))
    assert fx.symbolic_trace(model.train()).code == fx.symbolic_trace(model.eval()).code


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_stage_taps(name):
    """The stated taps are read by traced code, the head turns the embedding into the logits, and where a stage ends in
    a ReLU its two taps differ by that ReLU."""
    model, x = build_model(name, num_classes=7, **REQUIRED.get(name, {})).eval(), example(name)
    taps = stage_taps(model)
    assert len(taps.post) == len(taps.pre)
    tapped = Tapped(model, [taps.stem, *taps.post, *taps.pre, taps.embedding], x)
    with torch.no_grad():
        logits, values = tapped(x)
        assert tapped.traced
        assert logits.shape == (2, 7)
        head = model.get_submodule(taps.embedding.removesuffix(":input"))
        assert torch.equal(head(values[taps.embedding]), logits)
    for post, pre in zip(taps.post, taps.pre, strict=True):
        assert values[post].shape == values[pre].shape
        if pre == f"{post}:pre_relu":
            assert values[pre].min() < 0
            assert torch.equal(values[pre].relu(), values[post])


def test_other_models_state_no_taps():
    assert stage_taps(torchvision.models.resnet18()) is None


def test_a_users_model_states_taps():
    class Net(nn.Module):
        stage_taps = StageTaps(post=("a",), pre=("a",), stem="a", embedding="a")

    assert stage_taps(Net()).post == ("a",)


@pytest.mark.parametrize("pre", [False, True])
def test_taps_survive_the_forward_pass(pre):
    """No later operation of a model overwrites a tapped tensor in place."""
    model = build_model("wrn_16_1").eval()
    names = stage_taps(model).pre if pre else stage_taps(model).post
    kept = {}
    handles = [
        model.get_submodule(n).register_forward_hook(lambda _m, _a, out, n=n: kept.update({n: out.clone()}))
        for n in names
    ]
    with torch.no_grad(), tap(model, names) as taps:
        model(example("wrn_16_1"))
    for handle in handles:
        handle.remove()
    assert all(torch.equal(taps[n], kept[n]) for n in names)


@pytest.mark.parametrize("image", [32, 64])
def test_image_sizes(image):
    for name in ("resnet8", "wrn_16_1", "vgg8", "mobilenet_v2", "shufflenet_v1", "shufflenet_v2"):
        assert build_model(name).eval()(torch.randn(1, 3, image, image)).shape == (1, 100)


def test_densenet_agrees_with_torchvision():
    ours = build_model("densenet_bc", depth=22, growth=12).double().eval()
    theirs = torchvision.models.DenseNet(12, (3, 3, 3), num_init_features=24, num_classes=100)
    theirs.features.conv0 = nn.Conv2d(3, 24, 3, padding=1, bias=False)  # the CIFAR stem
    theirs.features.norm0 = theirs.features.relu0 = theirs.features.pool0 = nn.Identity()
    theirs.double().eval()
    for to, source in zip(theirs.parameters(), ours.parameters(), strict=True):
        to.data = torch.rand_like(source)
        source.data = to.data
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_zero_pad():
    x = torch.arange(2.0 * 16).view(1, 2, 4, 4)
    y = ZeroPad(2, 6, stride=2)(x)
    assert y.shape == (1, 6, 2, 2)
    assert torch.equal(y[:, 2:4], x[:, :, ::2, ::2])
    assert y[:, :2].count_nonzero() == y[:, 4:].count_nonzero() == 0


def test_shufflenet_v2_relu_over_both_halves_changes_no_gradient():
    unit, x = UnitV2(8).double(), torch.randn(4, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(4, 8, 5, 5, dtype=torch.float64)

    def as_published(features):
        passing, new = features.chunk(2, 1)
        new = unit.bn2(unit.conv2(F.relu(unit.bn1(unit.conv1(new)))))
        both = torch.cat([passing, F.relu(unit.bn3(unit.conv3(new)))], 1)
        return F.channel_shuffle(both, 2)

    inputs = [x, *unit.parameters()]
    gradients = torch.autograd.grad((unit(x.relu()) * probe).sum(), inputs)
    expected = torch.autograd.grad((as_published(x.relu()) * probe).sum(), inputs)
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("name", ["resnet20", "ResNet50", "wrn_16_2", "densenet_bc", "mobilenet_v2", "vgg13"])
def test_initialisation(name):
    """Convolutions have variance 2 / (kernel area × output channels); their means and variances are estimates from
    n weights, so they are compared within five standard errors."""
    torch.manual_seed(0)
    model = build_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all() and module.bias.eq(0).all()
        if isinstance(module, nn.Conv2d):
            area = module.kernel_size[0] * module.kernel_size[1]
            z, n = module.weight * (area * module.out_channels / 2) ** 0.5, module.weight.numel()
            assert abs(z.mean().item()) < 5 / n**0.5
            assert abs(z.var().item() - 1) < 5 * (2 / n) ** 0.5
            assert module.bias is None or module.bias.eq(0).all()


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("resnet_20", {}, "unknown model 'resnet_20'; did you mean 'resnet20'"),
        ("resnet20", {"shortcut": "zeropad"}, "unknown shortcut 'zeropad'; did you mean 'zero_pad'"),
        ("resnet20", {"shortcuts": "zero_pad"}, "no parameter 'shortcuts'; did you mean 'shortcut'"),
        ("resnet20", {"channels": [16, 32]}, r"four numbers .* got \[16, 32\]"),
        ("wrn", {}, "model 'wrn': missing a required argument: 'depth'"),
        ("wrn", {"depth": 18, "width": 1}, r"6n \+ 4 .* got 18"),
        ("wrn", {"depth": 16, "width": 0}, "at least 1, got 0"),
        ("densenet_bc", {"depth": 99}, r"6n \+ 4 .* got 99"),
        ("densenet_bc", {"growth": 0}, "at least 1, got 0"),
        ("mobilenet_v2", {"width": 0.05}, "at least 1/16, got 0.05"),
        ("torchvision:resnet181", {}, "torchvision has no model 'resnet181'; did you mean 'resnet18'"),
        ("torchvision:resnet18", {"depth": 3}, "model 'torchvision:resnet18': .*'depth'"),
        ("no_such_package.nets:Net", {}, "cannot import 'no_such_package.nets' .*No module named"),
        ("torch.nn:Linea", {}, "'torch.nn' has no 'Linea'; did you mean 'Linear'"),
        ("torch.nn:Linear", {"in_features": 2}, "missing a required argument: 'out_features'"),
        ("torch.nn:Linear", {"num_classes": 2}, "no parameter 'num_classes'"),
        ("torch:pi", {}, "'pi' is float, not a class or function"),
        ("torch:Size", {}, "gives Size, not a torch.nn.Module"),
    ],
)
def test_what_is_wrong_is_said(name, params, message):
    with pytest.raises(UserError, match=message):
        build_model(name, **params)


def test_cifar_resnet_depth():
    with pytest.raises(UserError, match=r"6n \+ 2 .* got 18"):
        cifar_resnet(18)


def test_num_classes_is_passed_only_if_given():
    assert isinstance(build_model("torch.nn:Identity"), nn.Identity)
    assert build_model("torchvision:resnet18").fc.out_features == 1000
    assert build_model("torchvision:resnet18", num_classes=7).fc.out_features == 7


@pytest.mark.parametrize("name", ["deeplabv3_mobilenet_v3_large", "ssdlite320_mobilenet_v3_large"])
def test_torchvision_fetches_nothing(name, monkeypatch):
    def fetch(*_args, **_kwargs):
        raise AssertionError("weights were fetched")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    assert isinstance(build_model(f"torchvision:{name}", num_classes=3), nn.Module)


def test_timm_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'distpro\[timm\]'"):
        build_model("timm:resnet18")


def test_timm():
    pytest.importorskip("timm")
    assert build_model("timm:resnet18", num_classes=7).get_classifier().out_features == 7
    with pytest.raises(UserError, match="did you mean 'resnet18'"):
        build_model("timm:resnet181")


def test_model_of_the_current_directory(tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text(
        "from torch import nn\nclass Net(nn.Linear):\n    def __init__(self, num_classes):\n"
        "        super().__init__(4, num_classes)\n"
    )
    (tmp_path / "broken_nets.py").write_text("1 / 0\n")
    (tmp_path / "leaving_nets.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert build_model("own_nets:Net", num_classes=3).out_features == 3
    with pytest.raises(UserError, match="cannot import 'broken_nets' .*ZeroDivisionError"):
        build_model("broken_nets:Net")
    with pytest.raises(UserError, match=r"cannot import 'leaving_nets' \(SystemExit: 3\)"):
        build_model("leaving_nets:Net")
    with pytest.raises(UserError, match=r"cannot import 'own_nets.py' .*; did you mean 'own_nets:Net'\?"):
        build_model("own_nets.py:Net")
