"""Taps against forwards written by hand, on models that the field uses and on models that misbehave."""

import gc
import random
import weakref
from collections import OrderedDict
from contextlib import nullcontext

import pytest
import torch
import torch.distributed
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.resnet import BasicBlock, ResNet

from pathways import Tapped, Taps, UserError, find_stages, probe_shapes, tap
from pathways.taps import parse_tap, untouched


def resnet(seed=0, training=True):
    """torchvision's ResNet, one block a stage: ReLUs reused and in place, shortcuts added in place."""
    torch.manual_seed(seed)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5).double().train(training)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after some training, so that a mistake shows
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean), nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def written_by_hand(model, x):
    """What the resnet gives, and every tap of it, with no operation in place."""
    taps = {"conv1:input": x, "bn1": model.bn1(model.conv1(x))}
    x = model.maxpool(F.relu(taps["bn1"]))
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        block = getattr(model, stage)[0]
        out = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
        before = out + (x if block.downsample is None else block.downsample(x))
        x = F.relu(before)
        taps |= {f"{stage}.0.bn2": out, f"{stage}.0.relu:input": before, f"{stage}:pre_relu": before, stage: x}
    taps["logits"] = model.fc(model.avgpool(x).flatten(1))
    return taps["logits"], taps


NAMES = [
    "conv1:input",
    "bn1",
    *(f"layer{i}{point}" for i in range(1, 5) for point in ("", ":pre_relu", ".0.bn2", ".0.relu:input")),
    "logits",
]


def by_hooks(model, names, x):
    with tap(model, names) as taps:
        output = model(x)
    return output, {name: taps[name] for name in names}


def by_tapped_hooks(model, names, x):
    handle = model.register_forward_hook(lambda *_: None)  # a model with hooks is not traced
    tapped = Tapped(model, names)
    handle.remove()
    assert not tapped.traced
    result = tapped(x)
    tapped.remove()
    return result


def by_trace(model, names, x):
    tapped = Tapped(model, names, example_input=x)
    assert tapped.traced
    return tapped(x)


READERS = pytest.mark.parametrize("read", [by_hooks, by_tapped_hooks, by_trace])


def images(seed=1, size=32):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(seed)).double()


def weighted_sum(features):
    """A scalar in which every element of every feature has a weight of its own."""
    return sum((f * torch.linspace(-1, 1, f.numel(), dtype=f.dtype).view_as(f)).sum() for f in features.values())


def hooks_on(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


# Values and gradients


@READERS
@pytest.mark.parametrize("training", [True, False])
def test_values_and_gradients_are_those_of_a_hand_written_forward(read, training):
    model, reference = resnet(training=training), resnet(training=training)
    x, x_reference = images().requires_grad_(), images().requires_grad_()
    output, features = read(model, NAMES, x)
    expected_output, expected = written_by_hand(reference, x_reference)

    torch.testing.assert_close(output, expected_output)
    torch.testing.assert_close({n: features[n] for n in NAMES}, {n: expected[n] for n in NAMES})
    (output.sum() + weighted_sum(features)).backward()
    (expected_output.sum() + weighted_sum(expected)).backward()
    torch.testing.assert_close(x.grad, x_reference.grad)
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    torch.testing.assert_close(dict(model.named_buffers()), dict(reference.named_buffers()))


@READERS
@pytest.mark.parametrize("name", ["conv1:input", "bn1", "layer1", "layer2.0.bn2", "layer3.0.relu:input", "logits"])
def test_a_tap_lies_on_the_way_to_the_output(read, name):
    x, x_reference = images().requires_grad_(), images().requires_grad_()
    output, features = read(resnet(), [name], x)
    expected_output, expected = written_by_hand(resnet(), x_reference)
    (grad,) = torch.autograd.grad(output.square().sum(), features[name])
    (expected_grad,) = torch.autograd.grad(expected_output.square().sum(), expected[name])
    torch.testing.assert_close(grad, expected_grad)


class EndsIn(nn.Module):
    """A stage between two linear layers, whose last activation is written in one of many ways."""

    WAYS = {
        "module": lambda self, x: self.relu(x),
        "in place": lambda self, x: self.relu_in_place(x),
        "used before": lambda self, x: self.relu_in_place(self.inner(self.relu_in_place(x))),
        "sequential": lambda self, x: self.sequence(x),
        "relu6": lambda self, x: self.relu6(x),
        "hardtanh": lambda self, x: self.hardtanh(x),
        "leaky": lambda self, x: self.leaky(x),
        "F.relu": lambda self, x: F.relu(x),
        "F.relu in place": lambda self, x: F.relu(x, True),
        "F.relu6": lambda self, x: F.relu6(x, inplace=True),
        "torch.relu": lambda self, x: torch.relu(x),
        "torch.relu_": lambda self, x: torch.relu_(x),
        "method": lambda self, x: x.relu(),
        "method in place": lambda self, x: x.relu_(),
    }

    class Stage(nn.Module):
        def __init__(self, way):
            super().__init__()
            self.way = way
            self.inner, self.relu, self.relu_in_place = nn.Linear(4, 4), nn.ReLU(), nn.ReLU(inplace=True)
            self.relu6, self.hardtanh = nn.ReLU6(inplace=True), nn.Hardtanh(-2.0, 0.5)
            self.leaky = nn.LeakyReLU(0.1, inplace=True)
            self.sequence = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)))

        def forward(self, x):
            return EndsIn.WAYS[self.way](self, x)

    def __init__(self, way):
        super().__init__()
        self.first, self.stage, self.last = nn.Linear(4, 4), self.Stage(way), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.stage(self.first(x)))

    def before_the_last_activation(self, x):
        x, stage = self.first(x), self.stage
        if stage.way == "used before":
            return stage.inner(F.relu(x))
        return stage.sequence[1][0](stage.sequence[0](x)) if stage.way == "sequential" else x


@READERS
@pytest.mark.parametrize("way", EndsIn.WAYS)
def test_pre_relu_is_what_enters_the_last_activation(read, way):
    torch.manual_seed(0)
    model, x = EndsIn(way).double(), torch.randn(64, 4).double()
    expected, plain = model.before_the_last_activation(x), model(x)
    output, features = read(model, ["stage:pre_relu", "stage"], x)
    torch.testing.assert_close(features["stage:pre_relu"], expected)
    torch.testing.assert_close(output, plain)
    torch.testing.assert_close(model.last(features["stage"]), plain)
    assert (features["stage:pre_relu"] != features["stage"]).any()


@READERS
def test_pre_relu_of_a_stage_and_of_modules_inside_it(read):
    torch.manual_seed(0)
    model, x = EndsIn("sequential").double(), torch.randn(8, 4).double()
    inside = "stage.sequence.1"
    names = [
        "stage",
        f"{inside}.1",
        f"{inside}:pre_relu",
        "stage:pre_relu",
        f"{inside}.1:pre_relu",
        f"{inside}.1:input",
    ]
    _, features = read(model, names, x)
    for name in names[2:]:
        torch.testing.assert_close(features[name], model.before_the_last_activation(x))
    for name in names[:2]:
        torch.testing.assert_close(features[name], F.relu(model.before_the_last_activation(x)))


@READERS
def test_pre_relu_of_a_module_that_ends_otherwise_is_an_error(read):
    model = nn.Sequential(OrderedDict(a=nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), b=nn.Linear(2, 2)))
    with pytest.raises(UserError, match="'a' does not end in a ReLU"):
        read(model, ["a:pre_relu"], torch.zeros(1, 2))
    assert torch.overrides._get_current_function_mode_stack() == []


# Operations in place


class InPlace(nn.Module):
    """y = a(x), written to in place by one of many ways before z = b(y)."""

    WAYS = {
        "result ignored": lambda self, y: (F.relu_(y), y)[1],
        "through identity": lambda self, y: self.relu(self.identity(y)),
        "through a view": lambda self, y: y.view(-1).relu_().view(y.shape[0], 3),
        "through a view, result ignored": lambda self, y: (y.view(-1).relu_(), y)[1],
        "subtraction": lambda self, y: self._subtract(y),
        "twice": lambda self, y: y.relu_().add_(1),
    }

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.identity, self.relu = nn.Identity(), nn.ReLU(inplace=True)

    def _subtract(self, y):
        y -= 1
        return y

    def forward(self, x):
        return self.b(self.WAYS[self.way](self, self.a(x)))


@pytest.mark.parametrize("way", InPlace.WAYS)
@pytest.mark.parametrize("force_hooks", [False, True])
def test_taps_are_what_they_were_when_read(way, force_hooks):
    torch.manual_seed(0)
    model, x = InPlace(way), torch.randn(16, 3)
    plain, before = model(x), model.a(x)
    expected = {"a": before, "b:input": model.WAYS[way](model, before.clone())}
    output, features = by_tapped_hooks(model, list(expected), x) if force_hooks else Tapped(model, list(expected))(x)
    torch.testing.assert_close(output, plain)
    torch.testing.assert_close(features, expected)


def test_stages_that_nothing_overwrites_are_not_copied():
    tapped = Tapped(resnet(), ["layer1", "layer2", "layer3", "layer4"])
    with torch.profiler.profile() as profile:
        tapped(images())
    assert not [event.key for event in profile.key_averages() if event.key == "aten::clone"]


# Names


@pytest.mark.parametrize(
    "name, message",
    [
        ("layer5", "no module 'layer5' to tap; did you mean 'layer"),
        ("layer1.0.conv9", "did you mean 'layer1.0.conv"),
        ("layer1:outputs", "unknown point 'outputs'; did you mean 'output'.*allowed: output, input, pre_relu"),
    ],
)
def test_wrong_names_are_answered_with_the_nearest(name, message):
    for build in (Tapped, Taps):
        with pytest.raises(UserError, match=message):
            build(resnet(), [name])


def test_names():
    assert parse_tap("a.b") == ("a.b", "output") and parse_tap("a:pre_relu") == ("a", "pre_relu")
    model = nn.Sequential(OrderedDict(body=nn.Linear(2, 3), logits=nn.Linear(3, 4), scale=nn.Linear(4, 5)))
    assert by_hooks(model, ["logits"], torch.zeros(1, 2))[1]["logits"].shape == (1, 4)  # the module, where there is one
    with tap(model, ["body", "body"]) as taps:
        model(torch.zeros(1, 2))
    assert list(taps) == ["body"] and len(taps) == 1


def test_a_module_that_does_not_run_is_noticed():
    model = resnet()
    model.spare = nn.Linear(2, 2)
    with tap(model, ["spare", "layer1"]) as taps:
        model(images())
        assert taps["layer1"].shape == (3, 64, 8, 8)
        with pytest.raises(UserError, match="'spare' has read nothing"):
            taps["spare"]
    with pytest.raises(UserError, match="'spare' has read nothing"):
        Tapped(model, ["spare"])(images())


def test_an_output_without_tensor_is_an_error():
    class Wrapped(nn.Module):
        def forward(self, x):
            return {"x": x}

    with pytest.raises(UserError, match="gives dict, not a tensor"):
        by_hooks(Wrapped(), ["logits"], torch.zeros(1))


# Removal and memory


class Fails(nn.Module):
    def forward(self, x):
        raise RuntimeError("as planned")


def test_hooks_are_gone_afterwards():
    model = resnet()
    with tap(model, NAMES):
        assert hooks_on(model)
        model(images())
    assert hooks_on(model) == 0
    model.layer3.append(Fails())
    with pytest.raises(RuntimeError, match="as planned"), tap(model, ["layer2", "layer3:pre_relu", "layer4"]):
        model(images())
    assert hooks_on(model) == 0
    assert torch.overrides._get_current_function_mode_stack() == []


def test_tapped_hooks_are_removed():
    model = resnet()
    handle = model.register_forward_hook(lambda *_: None)
    tapped = Tapped(model, ["layer1", "layer2:pre_relu"])
    handle.remove()
    assert hooks_on(model)
    tapped.remove()
    assert hooks_on(model) == 0


class Packed:
    """Stands for a tensor that the graph has saved, so that the graph's life can be watched."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.fixture
def no_cycles():
    """References alone must free what is dropped: no cycle collection while the test runs."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@READERS
def test_nothing_keeps_the_tensors_or_the_graph_of_a_step(read, no_cycles):
    model, watched = resnet(), []

    def pack(tensor):
        packed = Packed(tensor.detach())  # with its own graph it would be a cycle
        watched.append(weakref.ref(packed))
        return packed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
        output, features = read(model, NAMES, images())
    watched += [weakref.ref(f) for f in features.values()]
    assert any(ref() is not None for ref in watched)
    del output, features
    assert [ref() for ref in watched if ref() is not None] == []


@pytest.mark.parametrize("fails", [False, True])
def test_a_tapped_model_with_hooks_keeps_nothing_between_steps(fails, no_cycles):
    model, watched = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), []
    model[0].register_forward_hook(lambda m, a, out: watched.append(weakref.ref(out)))
    tapped = Tapped(model, ["0", "1:pre_relu"])
    if fails:
        model[2] = Fails()
        with pytest.raises(RuntimeError, match="as planned"):
            tapped(torch.zeros(1, 2))
    else:
        tapped(torch.zeros(1, 2))
    assert len(watched) == 1 and watched[0]() is None


# Tapped


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
    tapped = Tapped(model, ["a"], example_input=x)
    assert torch.equal(model.mean, torch.ones(3))
    for _ in range(3):
        assert torch.equal(tapped(x)[0], twin(x))
        assert torch.equal(model.mean, twin.mean)


def test_hooks_and_forwards_put_on_a_model_still_run():
    model, calls = resnet(), []
    model.layer2.register_forward_hook(lambda *_: calls.append("hook"))
    Tapped(model, ["layer1"])(images())
    model = resnet()
    model.forward = lambda x, forward=model.forward: calls.append("forward") or forward(x)
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


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield torch.compile
    torch._dynamo.reset()


COMPILED = ["bn1", "layer1", "layer2.0.relu:input", "layer4:pre_relu", "logits"]


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


def test_hooks_registered_before_compilation_read_the_compiled_model(compiler):
    model, names = resnet(), ["layer1", "layer3:pre_relu", "layer2.0.relu:input"]
    with tap(model, names) as taps:
        compiler(model, backend="eager")(images())
    expected = written_by_hand(resnet(), images())[1]
    torch.testing.assert_close({n: taps[n] for n in names}, {n: expected[n] for n in names})


@pytest.fixture
def one_process(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


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


# Probing


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
