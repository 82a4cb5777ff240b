"""Tapped models: the same model, traced where that is right and read by hooks where it is not."""

import random
from collections import OrderedDict

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from pathways import Tapped, UserError, tap
from tests.pathways.reference import (
    NAMES,
    READERS,
    by_hooks,
    by_tapped_hooks,
    hooks_on,
    images,
    resnet,
    weighted_sum,
    written_by_hand,
)

pytestmark = pytest.mark.usefixtures("trusted_tests")


def test_tapped_shares_the_model_and_leaves_it_alone():
    model = resnet()
    before = OrderedDict((k, v.clone()) for k, v in model.state_dict().items())
    attributes = {m: dict(vars(m)) for m in model.modules()}
    rng = torch.get_rng_state()
    tapped = Tapped(model, NAMES, example_input=images())
    assert tapped.model is model and hooks_on(model) == 0
    assert [id(p) for p in tapped.parameters()] == [id(p) for p in model.parameters()]
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {m: dict(vars(m)) for m in model.modules()} == attributes
    assert torch.equal(torch.get_rng_state(), rng)
    with torch.no_grad():
        model.fc.bias.fill_(7)
        assert torch.equal(tapped.eval()(images())[0], model(images()))


def test_tapped_follows_training_and_evaluation_mode():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    tapped, x = Tapped(model, ["2"]), torch.randn(16, 8)
    assert tapped.traced
    for mode in (True, False, True):
        tapped.train(mode)
        torch.manual_seed(3)
        output, features = tapped(x)
        torch.manual_seed(3)
        assert torch.equal(output, model(x))
        assert bool((features["2"] == 0).any()) is mode


def test_what_tracing_overlooks_is_noticed_with_an_example():
    class CountsInAList(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.calls = nn.Linear(3, 3), []

        def forward(self, x):
            self.calls.append(1)
            return self.a(x) * len(self.calls)

    x = torch.randn(4, 3)
    tapped = Tapped(CountsInAList(), ["a"], example_input=x)
    assert not tapped.traced
    first, second = tapped(x)[0], tapped(x)[0]
    assert not torch.equal(first, second)


class Straight(torch.autograd.Function):
    """The sign of a number, with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Untraceable(nn.Module):
    """Forwards that a symbolic trace would get wrong, or that it cannot follow."""

    WAYS = {
        "data decide": lambda self, y, mask: y * 2 if y.sum() > 0 else y * 3,
        "functional dropout": lambda self, y, mask: F.dropout(y, 0.5, training=self.training),
        "mode decides": lambda self, y, mask: y * 2 if self.training else y,
        "torch random": lambda self, y, mask: y * 0 if torch.rand(()).item() < 0.5 else y,
        "python random": lambda self, y, mask: y * 0 if random.random() < 0.5 else y,
        "optional argument": lambda self, y, mask: y * mask if mask is not None else y,
        "counts": lambda self, y, mask: self._count(y),
        "stores": lambda self, y, mask: self._store(y),
        "replaces a buffer": lambda self, y, mask: self._replace(y),
        "no gradient": lambda self, y, mask: y + self._frozen(y),
        "own function": lambda self, y, mask: Straight.apply(y),
        "autocast": lambda self, y, mask: self._autocast(y, True),
        "no autocast": lambda self, y, mask: self._autocast(y, False),
        "new tensor": lambda self, y, mask: y + torch.arange(3.0),
    }

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.count, self.last = 0, None
        self.register_buffer("mean", torch.zeros(3))

    def _count(self, y):
        self.count += 1
        return y * self.count

    def _store(self, y):
        self.last = y
        return y

    def _replace(self, y):
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        return y - self.mean

    def _frozen(self, y):
        with torch.no_grad():
            return self.b(y)

    def _autocast(self, y, enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            return self.b(y.float()).float()

    def forward(self, x):
        return self.b(self.WAYS[self.way](self, self.a(x), None))


class UntraceableWithMask(Untraceable):
    def forward(self, x, mask=None):
        return self.b(self.WAYS[self.way](self, self.a(x), mask))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", Untraceable.WAYS)
def test_models_that_cannot_be_traced_are_read_by_hooks_with_equal_results(way, training):
    kind = UntraceableWithMask if way == "optional argument" else Untraceable
    arguments = {"mask": torch.tensor([1.0, 0.0, 2.0])} if way == "optional argument" else {}
    torch.manual_seed(0), random.seed(0)
    model = kind(way).train(training)
    twin = kind(way).train(training)
    twin.load_state_dict(model.state_dict())
    states = random.getstate(), torch.get_rng_state()
    tapped = Tapped(model, ["a", "b:input"])
    assert not tapped.traced
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=way == "no autocast")
    for step in range(6):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        results = []
        for run in (twin, tapped):
            torch.manual_seed(step), random.seed(step)
            with autocast:
                results.append(run(x, **arguments))
        expected, (output, features) = results
        assert torch.equal(output, expected)
        with autocast:
            assert torch.equal(features["a"], model.a(x)) and torch.equal(model.b(features["b:input"]), output)
        expected.sum().backward(), output.sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert torch.equal(model.mean, twin.mean) and model.count == twin.count


def test_a_buffer_updated_in_place_is_traced_without_being_touched():
    class RunningMean(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.register_buffer("mean", torch.ones(3))

        def forward(self, x):
            y = self.a(x)
            self.mean.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
            return y - self.mean

    torch.manual_seed(0)
    model, x = RunningMean(), torch.randn(4, 3)
    twin = RunningMean()
    twin.load_state_dict(model.state_dict())
    tapped = Tapped(model, ["a"])
    assert tapped.traced and torch.equal(model.mean, torch.ones(3))
    for _ in range(3):
        assert torch.equal(tapped(x)[0], twin(x))
        assert torch.equal(model.mean, twin.mean)


def test_hooks_and_forwards_put_on_a_model_still_run():
    model, calls = resnet(), []
    model.layer2.register_forward_hook(lambda *_: calls.append("hook"))
    Tapped(model, ["layer1"])(images())
    model = resnet()
    original = model.forward
    model.forward = lambda x: calls.append("forward") or original(x)
    Tapped(model, ["layer1"])(images())
    assert calls == ["hook", "forward"]


@READERS
def test_functional_call_uses_the_swapped_parameters(read):
    model, other = resnet(0).eval(), resnet(1).eval()
    if read is by_tapped_hooks:
        model.register_forward_hook(lambda *_: None)
    tapped = Tapped(model, ["layer1", "layer3:pre_relu"])
    assert tapped.traced is (read is not by_tapped_hooks)
    swapped = {f"model.{k}": v for k, v in other.state_dict().items()}
    output, features = functional_call(tapped, swapped, (images(),))
    expected_output, expected = written_by_hand(other, images())
    torch.testing.assert_close(output, expected_output)
    torch.testing.assert_close(features, {n: expected[n] for n in features})


@pytest.mark.parametrize("traced", [True, False])
def test_forward_mode_tangents_equal_finite_differences(traced):
    """Train-mode BatchNorm, buffers cloned: ḟ = [f(θ + εv) − f(θ − εv)] / 2ε in float64."""
    model, x = resnet(), images()
    if not traced:
        model.register_forward_hook(lambda *_: None)
    tapped = Tapped(model, ["layer1", "layer2:pre_relu", "layer4"])
    assert tapped.traced is traced
    parameters = dict(tapped.named_parameters())
    generator = torch.Generator().manual_seed(2)
    v = {k: torch.randn(p.shape, generator=generator, dtype=p.dtype) for k, p in parameters.items()}

    def run(values):
        buffers = {k: b.clone() for k, b in tapped.named_buffers()}
        output, features = functional_call(tapped, {**values, **buffers}, (x,))
        return {**features, "output": output}

    before = {k: b.clone() for k, b in tapped.named_buffers()}
    with forward_ad.dual_level():
        duals = {k: forward_ad.make_dual(p.detach(), v[k]) for k, p in parameters.items()}
        tangents = {k: forward_ad.unpack_dual(f).tangent for k, f in run(duals).items()}
    with torch.no_grad():
        epsilon = 1e-7
        plus, minus = (run({k: p + s * epsilon * v[k] for k, p in parameters.items()}) for s in (1, -1))
    for name, tangent in tangents.items():
        difference = (plus[name] - minus[name]) / (2 * epsilon)
        assert (tangent - difference).norm() <= 1e-5 * difference.norm(), name
    assert all(torch.equal(b, before[k]) for k, b in tapped.named_buffers())


# Compilation, DDP, autocast


COMPILED = ["bn1", "layer1", "layer2.0.relu:input", "layer4:pre_relu", "logits"]


@pytest.mark.slow
@pytest.mark.parametrize("backend, traced", [("eager", True), ("aot_eager", True), ("eager", False)])
def test_compiled(compiler, backend, traced):
    model = resnet()
    if not traced:
        model.fc.register_forward_hook(lambda *_: None)
    tapped = Tapped(model, COMPILED)
    assert tapped.traced is traced
    output, features = compiler(tapped, backend=backend, fullgraph=traced)(images())
    reference = resnet()
    expected_output, expected = written_by_hand(reference, images())
    torch.testing.assert_close(output, expected_output)
    torch.testing.assert_close(features, {n: expected[n] for n in COMPILED})
    weighted_sum(features).backward(), weighted_sum({n: expected[n] for n in COMPILED}).backward()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


@pytest.mark.slow
def test_hooks_registered_before_compilation_read_the_compiled_model(compiler):
    model, names = resnet(), ["layer1", "layer3:pre_relu", "layer2.0.relu:input"]
    with tap(model, names) as taps:
        compiler(model, backend="eager")(images())
    expected = written_by_hand(resnet(), images())[1]
    torch.testing.assert_close({n: taps[n] for n in names}, {n: expected[n] for n in names})


@pytest.mark.slow
@pytest.mark.parametrize("outside", ["DDP", "Tapped", "tap"])
def test_ddp(one_process, outside):
    model, names = resnet(), ["layer1", "layer3:pre_relu"]
    inner = [f"module.{n}" for n in names]
    if outside == "DDP":
        output, features = DistributedDataParallel(Tapped(model, names))(images())
    elif outside == "Tapped":
        tapped = Tapped(DistributedDataParallel(model), inner)
        assert not tapped.traced  # DDP's forward prepares the exchange of gradients
        output, features = tapped(images())
    else:
        output, features = by_hooks(DistributedDataParallel(model), inner, images())
    reference = resnet()
    expected_output, expected = written_by_hand(reference, images())
    expected = {n: expected[n] for n in names}
    torch.testing.assert_close(list(features.values()), list(expected.values()))
    (output.sum() + weighted_sum(features)).backward()
    (expected_output.sum() + weighted_sum(expected)).backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@READERS
def test_autocast(read):
    model = resnet().float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = written_by_hand(model, images().float())[1]
        _, features = read(model, NAMES, images().float())
    assert features["layer2"].dtype == features["layer1.0.relu:input"].dtype == torch.bfloat16
    assert all(torch.equal(features[n], expected[n]) for n in NAMES)


class Rewritten(nn.Module):
    """An in-place operation behind a module's input, which the model goes on with under another name."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)

    def forward(self, x):
        hidden = self.first(x)
        return self.last(hidden + self.act(hidden))


def test_reading_a_tap_may_not_change_what_the_model_gives():
    torch.manual_seed(0)
    model, x = Rewritten(), torch.randn(3, 4)
    with pytest.raises(UserError, match="Rewritten gives another output when act:input are read"):
        Tapped(model, ["act:input"], x)
    output, _ = Tapped(model, ["first"], x)(x)
    assert torch.equal(output, model(x))


def test_a_frozen_model_hands_on_the_nan_of_its_input():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    x = torch.randn(2, 3, 8, 8)
    tapped = Tapped(model, ["2"], x, frozen=True)
    x[1, 0, 4, 4] = torch.nan
    with torch.no_grad():
        assert tapped.runs_fused
        output, taps = tapped(x)
        assert torch.equal(output.isnan(), model(x).isnan()) and output[1].isnan().all()
        assert taps["2"].isnan().any()
