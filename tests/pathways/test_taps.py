"""Taps against a forward written by hand, and on models that write in place or fail."""

import gc
import weakref
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pathways import Tapped, Taps, UserError, tap
from pathways.taps import parse_tap
from tests.pathways.reference import (
    NAMES,
    READERS,
    Fails,
    by_hooks,
    by_tapped_hooks,
    hooks_on,
    images,
    resnet,
    weighted_sum,
    written_by_hand,
)

pytestmark = pytest.mark.usefixtures("trusted_tests")

# Values and gradients


@pytest.mark.slow
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


@pytest.mark.slow
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
    tapped = Tapped(resnet(), ["maxpool", "layer1", "layer2", "layer3", "layer4"])  # maxpool's output is a shortcut
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
    assert parse_tap("a.b") == ("a.b", "output", None) and parse_tap("a:pre_relu") == ("a", "pre_relu", None)
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
            return {"x": None}

    with pytest.raises(UserError, match="gives dict, not a tensor"):
        by_hooks(Wrapped(), ["logits"], torch.zeros(1))


# Removal and memory


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
    tapped(images())
    handle.remove()
    assert not tapped.traced and hooks_on(model) == 0


def test_hooks_that_stay_are_removed():
    model = resnet()
    handle = model.register_forward_hook(lambda *_: None)
    tapped = Tapped(model, ["layer1", "layer2:pre_relu"], hold=True)
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
