"""Tapped models without their output: only what the taps need runs, and it gives what the whole model gives."""

import copy
import gc
import random
import weakref

import pytest
import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from distpro.models import build_model, stage_taps
from pathways import Tapped, tap
from tests.pathways.reference import (
    called_by,
    hooks_on,
    images,
    leaves,
    resnet,
    weighted_sum,
    without_relus,
    written_by_hand,
)
from tests.pathways.test_tapped import Untraceable
from tests.pathways.test_taps import EndsIn, InPlace

pytestmark = pytest.mark.usefixtures("trusted_tests")


class Branching(nn.Module):
    """Cannot be traced: the data decide about a branch, which is never taken. `calls` counts passes that end."""

    def __init__(self, checkpointed=False):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.ReLU()) for _ in range(3)
        )
        self.fc, self.checkpointed, self.calls = nn.Linear(4, 2), checkpointed, 0

    def forward(self, x, mask=None):
        for stage in self.stages:
            x = checkpoint(stage, x, use_reentrant=False) if self.checkpointed else stage(x)
            if x.sum() > 1e9:
                x = stage(x)
        self.calls += 1
        return self.fc(x)


def rows(n=16):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(5))


def check_only_what_is_needed_runs(model, names, x):
    """Taps, gradients and buffers against those of a twin that runs as a whole. Which modules are needed, among those
    with parameters, the twin's gradients tell. Gives the pruned model and the names of the leaf modules that ran."""
    twin = copy.deepcopy(model)
    before = {k: b.clone() for k, b in model.named_buffers()}
    tapped, whole = Tapped(model, names, x, output=False), Tapped(twin, names, x)
    assert list(map(torch.equal, before.values(), model.buffers())) == [True] * len(before)
    torch.manual_seed(0)
    (output, features), called = called_by(lambda: tapped(x), model)
    torch.manual_seed(0)
    expected = whole(x)[1]
    assert output is None and list(features) == list(expected) == list(dict.fromkeys(names))
    for name in names:
        assert torch.equal(features[name], expected[name]), name
    weighted_sum(features).backward(), weighted_sum(expected).backward()
    needed = {name.rpartition(".")[0] for name, p in twin.named_parameters() if p.grad is not None}
    for (name, p), q in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert (p.grad is None) == (q[1].grad is None) and (p.grad is None or torch.equal(p.grad, q[1].grad)), name
    for (name, b), q in zip(model.named_buffers(), twin.buffers(), strict=True):
        assert torch.equal(b, q if name.rpartition(".")[0] in needed else before[name]), name
    if tapped.traced:
        assert without_relus(model, called) == without_relus(model, tapped.modules_run)
    assert needed & leaves(model).keys() == {n for n in called if list(leaves(model)[n].parameters())}
    return tapped, called


@pytest.mark.slow
@pytest.mark.parametrize("depth", ["stem", "pre", "post"])
@pytest.mark.parametrize(
    "name",
    ["resnet8", "wrn_16_1", "vgg8", "mobilenet_v2", "shufflenet_v1", "shufflenet_v2", "densenet_bc", "deit_tiny"],
)
def test_without_output_only_what_the_taps_need_runs(name, depth):
    params = {"depth": 10, "growth": 4} if name == "densenet_bc" else {}
    torch.manual_seed(0)
    model = build_model(name, **params)
    taps = stage_taps(model)
    names = [taps.stem] if depth == "stem" else list(getattr(taps, depth)[:2])
    x = torch.randn(1, 3, 224, 224) if name == "deit_tiny" else torch.randn(2, 3, 32, 32)
    tapped, called = check_only_what_is_needed_runs(model, names, x)
    assert tapped.traced and 0 < len(called) < len(leaves(model))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    "names, last",
    [
        (["stages.0"], "stages.0.3"),
        (["stages.1:pre_relu", "stages.0"], "stages.1.3"),
        (["stages.1.1:input"], "stages.1.0"),
        (["stages.0.3:input", "stages.0:pre_relu", "stages.1.0"], "stages.1.0"),
    ],
)
def test_a_model_that_cannot_be_traced_stops_at_its_last_tap(names, last, checkpointed):
    torch.manual_seed(0)
    model = Branching(checkpointed)
    tapped, called = check_only_what_is_needed_runs(model, names, rows())
    assert not tapped.traced and tapped.modules_run is None and called[-1] == last and model.calls == 0
    assert torch.overrides._get_current_function_mode_stack() == []
    model(rows()).sum().backward()  # a plain pass through the hooked model is not ended
    assert model.calls == 1
    tapped.remove()
    assert hooks_on(model) == 0


@pytest.mark.parametrize("way", Untraceable.WAYS)
def test_what_lies_behind_the_last_tap_leaves_no_trace(way):
    torch.manual_seed(0)
    model, x = Untraceable(way), torch.randn(4, 3)
    tapped, states = Tapped(model, ["a"], x, output=False), (random.getstate(), torch.get_rng_state())
    ((output, features), called) = called_by(lambda: tapped(x), model)
    assert output is None and torch.equal(features["a"], model.a(x)) and called == ["a"]
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    assert (model.count, model.last) == (0, None) and torch.equal(model.mean, torch.zeros(3))


class Repeats(Branching):
    """One stage twice, so that a tap of it is what the second call gives."""

    def forward(self, x, mask=None):
        x = self.stages[1](self.stages[0](self.stages[0](x)))
        return super().forward(x)


@pytest.mark.parametrize(
    "example, names", [(rows(), ["stages.0.0"]), (rows(), ["stages.0.0", "stages.2"]), (None, ["fc:input"])]
)
def test_a_model_runs_to_its_end_where_it_is_unknown_which_reading_is_the_last(example, names):
    torch.manual_seed(0)
    model = Repeats().eval()
    with tap(model, names) as taps:
        model(rows())
    assert model.calls == 1
    output, features = Tapped(model, names, example, output=False)(rows())
    assert output is None and model.calls == 2
    assert all(torch.equal(features[n], taps[n]) for n in names)


def test_a_traced_module_that_runs_twice_gives_its_second_output():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.b(self.a(self.a(x)))

    model, x = Twice(), torch.randn(2, 3)
    tapped = Tapped(model, ["a"], x, output=False)
    assert tapped.modules_run == ["a"] and torch.equal(tapped(x)[1]["a"], model.a(model.a(x)))


def test_a_model_with_hooks_of_others_runs_to_its_end():
    model, calls = resnet(), []
    model.register_forward_hook(lambda *_: calls.append("hook"))
    tapped = Tapped(model, ["layer1"], images(), output=False)
    calls.clear()
    output, features = tapped(images())
    assert calls == ["hook"] and output is None
    assert torch.equal(features["layer1"], written_by_hand(resnet(), images())[1]["layer1"])


def test_ddp_runs_to_its_end_and_exchanges_gradients(one_process):
    model = DistributedDataParallel(Branching())
    Tapped(model, ["module.stages.0"], rows(), output=False)(rows())
    assert model.module.calls == 1


@pytest.mark.parametrize("kind", [resnet, Branching])
def test_nothing_wanted_nothing_run(kind):
    model = kind()
    tapped = Tapped(model, [], output=False)
    result, called = called_by(lambda: tapped(rows()), model)
    assert result == (None, {}) and called == tapped.modules_run == []


@pytest.mark.parametrize("kind, x", [(resnet, images()), (Branching, rows())])
def test_logits_need_the_whole_model(kind, x):
    model = kind().eval()
    tapped = Tapped(model, ["logits"], x, output=False)
    (output, features), called = called_by(lambda: tapped(x), model)
    assert output is None and torch.equal(features["logits"], model(x))
    assert {*without_relus(model, called)} == {*without_relus(model, leaves(model))}


class Part(nn.Module):
    """A model whose first half is under test, and a second half that is not to run."""

    def __init__(self, first):
        super().__init__()
        self.first, self.dead = first, nn.Linear(2, 2)

    def forward(self, x):
        return self.dead(self.first(x)[..., :2])


@pytest.mark.parametrize(
    "model, names",
    [(InPlace(way), n) for way in InPlace.WAYS if way != "twice" for n in (["a"], ["b:input"], ["b"], ["a", "b:input"])]
    + [(EndsIn(way), n) for way in EndsIn.WAYS for n in (["first"], ["stage:pre_relu"], ["stage", "last"])],
)
def test_writes_in_place_are_kept_where_a_tap_needs_them(model, names):
    torch.manual_seed(0)
    x = torch.randn(16, 3 if isinstance(model, InPlace) else 4)
    names = [f"first.{n}" for n in names]
    tapped, called = check_only_what_is_needed_runs(Part(copy.deepcopy(model)), names, x)
    assert tapped.traced is Tapped(Part(model), names, x).traced and "dead" not in called
    assert tapped.traced or tapped.modules_run is None


class Writes(nn.Module):
    """A write in place whose result only the dead part of the model reads. The tap is `b`."""

    WAYS = {
        "before the tap": (lambda self, y: (self.relu(y.view(-1)), self.b(y)), ["a", "relu", "b"]),
        "after the tap": (lambda self, y: (self.b(y * 2), self.relu(y))[::-1], ["a", "b"]),
        "to the tap": (lambda self, y: (self.relu(self.b(y)),) * 2, ["a", "b"]),
        "to a sum": (lambda self, y: (self.relu(y + self.c(y)), self.b(y)), ["a", "b"]),
    }

    def __init__(self, way):
        super().__init__()
        self.way, self.relu = way, nn.ReLU(inplace=True)
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.c(sum(z.view(-1, 3) for z in self.WAYS[self.way][0](self, self.a(x))))


@pytest.mark.parametrize("way", Writes.WAYS)
def test_a_write_in_place_is_kept_only_where_a_tap_reads_it(way):
    torch.manual_seed(0)
    tapped, called = check_only_what_is_needed_runs(Writes(way), ["b"], torch.randn(16, 3))
    assert tapped.traced and tapped.modules_run == Writes.WAYS[way][1]


def test_operations_without_users_are_kept_where_no_module_has_to_run_for_them():
    class Effects(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            torch._assert(x.shape[1] == 3, "three columns")
            z = self.b(self.a(x))
            torch._assert(z.shape[1] == 3, "three columns")
            return z

    tapped, called = check_only_what_is_needed_runs(Effects(), ["a"], torch.randn(2, 3))
    assert tapped.traced and called == ["a"]
    with pytest.raises(AssertionError, match="three columns"):
        tapped(torch.randn(2, 4))


@pytest.mark.parametrize("names, updated", [(["a"], False), (["b"], True)])
def test_a_buffer_is_updated_where_the_pass_gets_to_it(names, updated):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            y = self.a(x)
            self.seen.add_(x.shape[0])
            return self.b(y)

    model, x = Counts(), torch.randn(2, 3)
    assert Tapped(model, names, x).traced
    tapped = Tapped(model, names, x, output=False)
    tapped(x)
    assert not tapped.traced and model.seen == 2 * updated


def test_a_pass_that_ends_early_keeps_nothing():
    model, watched = Branching(), []
    tapped = Tapped(model, ["stages.1:pre_relu"], rows(), output=False)
    model.stages[0][0].register_forward_hook(lambda m, a, out: watched.append(weakref.ref(out)))
    gc.collect(), gc.disable()
    try:
        tapped(rows())
        assert len(watched) == 1 and watched[0]() is None
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize("kind, traced, x", [(resnet, True, images()), (Branching, False, rows())])
def test_compiled_without_output(compiler, kind, traced, x):
    model = kind().eval()
    names = ["layer1", "layer2:pre_relu"] if traced else ["stages.0", "stages.1:pre_relu"]
    tapped = Tapped(model, names, x, output=False)
    assert tapped.traced is traced
    output, features = compiler(tapped, backend="eager", fullgraph=traced)(x)
    assert output is None and (traced or model.calls == 0)
    torch.testing.assert_close(features, tapped(x)[1])
    assert torch.overrides._get_current_function_mode_stack() == []
