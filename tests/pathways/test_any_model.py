"""Tapped, probed and pruned models whose inputs and outputs are containers."""

import copy
import random
from collections import OrderedDict
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torchvision.models import segmentation

from pathways import Call, Tapped, UserError, build_pathways, find_stages, probe_features, probe_shapes, tap
from pathways.containers import alike
from pathways.probing import untouched
from tests.pathways.containers import Detector, TextClassifier, pictures, text
from tests.pathways.reference import called_by, hooks_on

pytestmark = pytest.mark.usefixtures("trusted_tests")

# torchvision's segmentation models give an OrderedDict and ask for the shape of their input


@pytest.fixture(
    scope="module",
    params=[
        ("lraspp_mobilenet_v3_large", ["backbone[low]", "backbone[high]", "classifier.cbr:input"]),
        ("deeplabv3_mobilenet_v3_large", ["backbone[out]", "classifier.3:pre_relu", "logits"]),
        pytest.param(("fcn_resnet50", ["backbone.layer2", "backbone:input"]), marks=pytest.mark.slow),
    ],
    ids=lambda param: param[0],
)
def segmenter(request):
    name, taps = request.param
    torch.manual_seed(0)
    model = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.1), nn.init.uniform_(module.running_var, 0.8, 1.25)
    return model, taps, torch.randn(2, 3, 64, 64)


def passes(model, x, run):
    """What a pass gives in both modes, with the model's buffers afterwards."""
    results = []
    for training in (True, False):
        with untouched(model):
            torch.manual_seed(5)
            results.append((run(model.train(training), x), [b.clone() for b in model.buffers()]))
    return results


@pytest.mark.slow
def test_a_segmenter_is_traced_and_gives_the_same_to_the_last_bit(segmenter):
    model, taps, x = segmenter
    tapped = Tapped(model, taps, x)
    assert tapped.traced and tapped.runs_fused and hooks_on(model) == 0

    def plain(model, x):
        with tap(model, taps) as values:
            return model(x), dict(values)

    expected, found = passes(model, x, plain), passes(model, x, lambda _, x: tapped(x))
    assert alike(expected, found)
    assert type(found[0][0][0]) is OrderedDict and list(found[0][0][0]) == ["out"]


@pytest.mark.slow
def test_a_frozen_segmenter_is_fused(segmenter):
    model, taps, x = segmenter
    model = copy.deepcopy(model).eval().requires_grad_(False)
    tapped = Tapped(model, taps, x, frozen=True).eval()
    with torch.no_grad():
        assert tapped.traced and tapped.runs_fused
        assert alike(model(x), tapped(x)[0], 1e-4)


def test_traced_code_has_to_agree_in_training_mode_too():
    passes = []

    class Counts(nn.Module):
        """Its training passes are numbered where the tracer does not see it."""

        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            passes.extend([1] * self.training)
            return self.a(x) * max(1, len(passes))

    x = torch.randn(4, 3)
    assert Tapped(Counts(), ["a"], x, frozen=True).traced
    assert not Tapped(Counts(), ["a"], x).traced


def test_a_model_that_cannot_train_on_the_example_is_traced_if_the_code_fails_likewise():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
    assert Tapped(model, ["1"], torch.randn(1, 3)).traced


# Pruned


@pytest.mark.parametrize("frozen", [False, True])
def test_a_detector_stops_early_only_where_it_never_trains(frozen):
    """In training mode it asks for targets, which the example has not: nobody knows what it would do."""
    model, images = Detector().eval(), pictures()
    tapped = Tapped(model, ["backbone"], Call((images,)), output=False, frozen=frozen)
    (output, features), called = called_by(lambda: tapped(images), model)
    assert output is None and torch.equal(features["backbone"], model.backbone(torch.stack(images) / 2))
    assert ("head" in called) is not frozen


def test_a_text_model_stops_at_its_last_tap():
    model, batch = TextClassifier(), text()
    names = ["encoder.layer.0", "encoder.layer.1:input[hidden_states]"]
    tapped = Tapped(model, names, batch, output=False)
    (output, features), called = called_by(lambda: Call.of(batch).run(tapped), model)
    assert (
        output is None
        and "encoder.layer.1.attention.query" not in called
        and torch.equal(features[names[0]], features[names[1]])
    )


@pytest.mark.slow
def test_a_dict_in_and_out_compiles(compiler):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x, y):
            hidden = self.a(x) + y
            return OrderedDict(out=self.b(hidden), hidden=hidden)

    model, batch = Net(), {"y": torch.randn(2, 4), "x": torch.randn(2, 3)}
    tapped = Tapped(model, ["a", "logits", "[hidden]"], batch)
    assert tapped.traced
    output, features = compiler(tapped, backend="eager", fullgraph=True)(**batch)
    assert type(output) is OrderedDict and alike(output, model(**batch))
    assert torch.equal(features["logits"], output["out"]) and torch.equal(features["[hidden]"], output["hidden"])


# Probed


def test_probe_features_and_shapes_of_any_model():
    torch.manual_seed(0)
    model, batch = TextClassifier().train(), text()
    features = probe_features(model, ["encoder[last_hidden_state]", "logits"], batch)
    assert not any(f.requires_grad for f in features.values()) and hooks_on(model) == 0 and model.training
    assert torch.equal(features["logits"], model.eval()(**batch).logits)
    assert probe_shapes(model, ["encoder[last_hidden_state]", "logits"], batch) == {
        "encoder[last_hidden_state]": (5, 6),
        "logits": (3,),
    }
    assert probe_shapes(Detector(), ["neck[fine]", "head"], Call((pictures(),))) == {
        "neck[fine]": (4, 8, 8),
        "head": (5, 8, 8),
    }


def test_stages_of_any_model():
    blocks = [f"encoder.layer.{i}" for i in range(4)]
    assert find_stages(TextClassifier(), text()) == blocks
    assert find_stages(TextClassifier(8), text(), token_stages=2) == ["encoder.layer.3", "encoder.layer.7"]

    class TwoScales(Detector):
        def __init__(self):
            super().__init__()
            self.down = nn.Conv2d(4, 4, 2, 2)

        def forward(self, images, targets=None):
            return self.down(self.head.in_channels * self.backbone(torch.stack(images)))

    assert find_stages(TwoScales(), Call((pictures(),))) == ["backbone", "down"]
    with pytest.raises(UserError, match="no stages found in Detector: name its taps in the config"):
        find_stages(Detector(), Call((pictures(),)))


def test_a_head_that_runs_on_every_level_is_no_stage():
    class Levels(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.ModuleList(nn.Conv2d(3, 3, 2, 2) for _ in range(3))
            self.head = nn.Conv2d(3, 3, 1)

        def forward(self, images):
            x, found = torch.stack(images), []
            for down in self.down:
                x = down(x)
                found.append(self.head(x))
            return found

    assert find_stages(Levels(), Call((pictures(),))) == ["down.0", "down.1", "down.2"]


class Attends(nn.Module):
    """A token model that shows its attention and the vectors of each head to hooks, as timm's do."""

    def __init__(self, layers=4):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.ModuleList(AttendingBlock() for _ in range(layers))

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


class AttendingBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.Identity(), nn.Dropout()

    def forward(self, x):
        heads = self.norm(x.unflatten(2, (2, 4)).transpose(1, 2))
        return x + (self.drop(heads @ heads.mT) @ heads).transpose(1, 2).flatten(2)


def test_attention_is_no_map():
    assert find_stages(Attends(), torch.randn(2, 3, 32, 32)) == [f"blocks.{i}" for i in range(4)]


class ChannelsLast(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.merge = nn.ModuleList(nn.Linear(4 * 8 * 2**i, 16 * 2**i) for i in range(2))

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        for merge in self.merge:
            x = merge(torch.cat([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], -1))
        return x.mean((1, 2))


@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_maps_with_their_channels_last_are_stages(size):
    stages = find_stages(ChannelsLast(), torch.randn(2, 3, *size))
    assert stages == ["stem", "merge.0", "merge.1"]


class Resizes(nn.Module):
    """Keeps what it has seen in buffers, which change in every way."""

    def __init__(self):
        super().__init__()
        self.fc, self.count = nn.Linear(3, 3), 0
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("kind", torch.zeros(2))
        self.register_buffer("none", None)
        self.register_buffer("shared", torch.ones(1).expand(4))

    def forward(self, x):
        self.count += 1
        self.extra = random.random()
        self.seen.resize_(self.count * 5).fill_(7)
        self.kind.data = torch.ones(2, dtype=torch.float64)
        self.none = torch.ones(1)
        self.register_buffer("new", torch.ones(1))
        if self.fails:
            raise RuntimeError("as planned")
        return self.fc(x)


@pytest.mark.parametrize("fails", [False, True])
def test_buffers_of_another_size_are_put_back(fails):
    model = Resizes()
    model.fails = fails
    state = random.getstate()
    with pytest.raises(RuntimeError, match="as planned") if fails else nullcontext():
        probe_features(model, ["fc"], torch.zeros(2, 3))
    with pytest.raises(RuntimeError if fails else UserError, match="as planned" if fails else "no stages found"):
        find_stages(model, torch.zeros(2, 3))
    assert random.getstate() == state and model.count == 0 and not hasattr(model, "extra")
    assert list(model._buffers) == ["seen", "kind", "none", "shared"]
    assert torch.equal(model.seen, torch.zeros(1)) and torch.equal(model.kind, torch.zeros(2))
    assert model.none is None and torch.equal(model.shared, torch.ones(4))


@pytest.mark.slow
def test_compiled_models_are_probed(compiler):
    model, x = nn.Sequential(nn.Sequential(nn.Linear(3, 4)), nn.ReLU()), torch.zeros(2, 3)
    model[0].compile(backend="eager")
    model(x)
    assert probe_shapes(model, ["0.0"], x) == {"0.0": (4,)}
    with tap(model, ["0.0"]) as taps:  # older versions of PyTorch compile again for a new hook, later ones do not
        model(x)
        try:
            assert torch.equal(taps["0.0"], model[0][0].forward(x))
        except UserError as error:
            assert "compiled before the tap was set" in str(error)


# Pathways


def test_pathways_of_text_models():
    torch.manual_seed(0)
    teacher, student, batch = TextClassifier(), TextClassifier(2), text(length=10)
    taps = ["encoder.layer.3", "encoder[hidden_states.2]"], ["encoder[last_hidden_state]"]
    space = build_pathways(teacher, student, batch, *taps, transforms=["tokens"], distance="l2")
    assert [p.key for p in space] == [f"{t}<-encoder[last_hidden_state]@tokens" for t in taps[0]]
    tapped = Tapped(student, list(taps[1]), batch)
    _, features = Call.of(batch).run(tapped)
    assert space[0].transform(features[taps[1][0]]).shape == (2, 10, 6)
