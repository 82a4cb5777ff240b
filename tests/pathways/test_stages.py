"""How tensors are laid out is found out by what gives and takes them, and pathways and terms read them so."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import distpro
from distpro.config.reading import read_config
from distpro.objective import Objective, Term
from distpro.report.cost import as_text, describe
from pathways import Layout, UserError, build_pathways, find_stages, probe_layouts
from pathways.transforms import Tokens


class Cube(nn.Module):
    """Maps of as many rows and columns as channels, in both layouts: no size says which is which."""

    def __init__(self, norm=nn.LayerNorm):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 2, 2), norm(8)
        self.last = nn.Linear(8, 8)
        self.block, self.plain = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Identity()

    def forward(self, x):
        x = self.first(x)
        x = self.norm(x.movedim(1, -1))
        x = x + self.block(x)
        self.plain(x * 1)
        return self.last(x).mean((1, 2))


class TakesMaps(nn.LayerNorm):
    """As torchvision's and timm's LayerNorm2d: a LayerNorm by its class, of maps (N, C, H, W)."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def test_the_module_says_where_the_channels_are():
    x = torch.randn(2, 3, 16, 16)
    found = probe_layouts(Cube(), ["first", "norm", "block", "last", "last:input", "plain", "first:input"], x)
    last = {name for name, layout in found.items() if layout.channels_last}
    assert last == {"norm", "block", "last", "last:input"}
    assert {name for name, layout in found.items() if not layout.known} == {"plain"}  # nobody says, so (C, H, W)
    assert str(found["plain"]) == "map, as nothing says otherwise"


@pytest.mark.parametrize("norm", [TakesMaps, partial(nn.GroupNorm, 2)], ids=["LayerNorm of maps", "GroupNorm"])
def test_norms_of_maps(norm):
    model = nn.Sequential(nn.Conv2d(3, 6, 2, 2), norm(6), nn.Tanh())
    found = probe_layouts(model, ["0", "1", "2"], torch.randn(2, 3, 16, 16))
    assert not any(layout.channels_last for layout in found.values()) and all(p.known for p in found.values())


class Registers(nn.Module):
    """Tokens of a grid that is no square behind any number of others; blocks with a map of fewer of them inside."""

    def __init__(self, prefix, layers=4, width=6, behind=0):
        super().__init__()
        self.behind = nn.Parameter(torch.randn(1, behind, width))
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.front = nn.Parameter(torch.randn(1, prefix, width))
        self.blocks = nn.ModuleList(Reducing(width, prefix) for _ in range(layers))

    def forward(self, x):
        x = self.patches(x)
        size = x.shape[2:]
        x = torch.cat([self.front.expand(len(x), -1, -1), x.flatten(2).mT, self.behind.expand(len(x), -1, -1)], 1)
        for block in self.blocks:
            x = block(x, size)
        return x.mean(1)


class Reducing(nn.Module):
    def __init__(self, width, prefix):
        super().__init__()
        self.norm, self.reduce, self.prefix = nn.LayerNorm(width), nn.Conv2d(width, width, 2, 2), prefix

    def forward(self, x, size):
        tokens = self.norm(x)
        keys = self.reduce(tokens[:, self.prefix :][:, : size[0] * size[1]].mT.unflatten(2, size)).flatten(2).mT
        return x + (tokens @ keys.mT).softmax(-1) @ keys


@pytest.mark.parametrize("prefix", [0, 1, 2, 5, 9])
def test_tokens_in_front_of_any_number(prefix):
    model, x = Registers(prefix), torch.randn(2, 3, 16, 32)
    names = [f"blocks.{i}" for i in range(4)]
    assert find_stages(model, x) == names
    assert probe_layouts(model, names, x) == dict.fromkeys(names, Layout((32 + prefix, 6), grid=(4, 8), prefix=prefix))
    assert str(probe_layouts(model, names, x)["blocks.0"]) == f"tokens ({f'{prefix} + ' if prefix else ''}4×8)"


@pytest.mark.parametrize("prefix, behind", [(0, 5), (1, 3), (4, 1)])
def test_tokens_behind_the_grid_are_not_taken_for_some_in_front(prefix, behind):
    model, x = Registers(prefix, behind=behind), torch.randn(2, 3, 16, 32)
    found = probe_layouts(model, ["blocks.0", "blocks.3"], x)
    assert set(found.values()) == {Layout((32 + prefix + behind, 6))}


def test_detection_tokens():
    transformers = pytest.importorskip("transformers")
    config = transformers.YolosConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=[32, 32],
        patch_size=8, num_detection_tokens=5,
    )  # fmt: skip
    model = transformers.YolosModel(config)
    (layout,) = probe_layouts(model, ["layernorm"], torch.randn(2, 3, 32, 32)).values()
    assert (layout.shape, layout.grid) == ((22, 16), None)


def test_a_pathway_between_tokens_meets_grids_and_what_is_in_front_of_them():
    x = torch.randn(2, 3, 16, 32)
    teacher, student = Registers(5, width=7), Registers(2)
    (pathway,) = build_pathways(teacher, student, x, ["blocks.3"], ["blocks.3"], transforms=["tokens"], distance="l2")
    tokens = torch.randn(2, 34, 6)
    found, projected = pathway.transform(tokens), pathway.transform.project(tokens)
    assert torch.equal(found[:, :2], projected[:, :2]) and torch.equal(found[:, 5:], projected[:, 2:])
    assert torch.allclose(found[:, 2:5], projected[:, 2:].mean(1, True).expand(-1, 3, -1))


def test_tokens_of_one_number_and_other_grids_are_not_compared_by_position():
    ours, theirs = (17, 4), (17, 4)
    assert Tokens(ours, theirs).by_position
    other = Tokens(ours, theirs, grid=[(4, 4), (2, 8)])
    assert not other.by_position and other(torch.randn(2, 17, 4)).shape == (2, 17, 4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"grid": [(4, 5), None]}, "17 tokens are no grid of 4x5 behind any others"),
        ({"grid": [(4, 4), None], "prefix": 2}, "17 tokens are no grid of 4x4 behind a prefix of 2"),
        ({"grid": (4, 4)}, r"grid must be two of \(height, width\) or none, got \(4, 4\)"),
    ],
)
def test_grids_that_are_none(options, message):
    with pytest.raises(UserError, match=message):
        Tokens((17, 4), (3, 5, 5), **options)


# Channels last


def swin(num_classes=5):
    """Small, but as torchvision makes it: maps (N, H, W, C)."""
    torch.manual_seed(0)
    return torchvision.models.SwinTransformer(
        [2, 2], 12, [1, 1], [2, 2], [2, 2], stochastic_depth_prob=0, num_classes=num_classes
    )


def resnet():
    torch.manual_seed(1)
    return torchvision.models.resnet18(num_classes=5)


def test_stages_with_their_channels_last():
    model, x = swin(), torch.randn(2, 3, 16, 16)
    names = find_stages(model, x)
    assert names == ["features.1", "features"]
    found = probe_layouts(model, names, x)
    assert list(found.values()) == [Layout((12, 8, 8), channels_last=True), Layout((24, 4, 4), channels_last=True)]
    assert str(found["features.1"]) == "map, channels last"


@pytest.mark.parametrize("ours_last, theirs_last", [(True, False), (False, True), (True, True)])
def test_pathways_read_maps_with_their_channels_last(ours_last, theirs_last):
    x = torch.randn(2, 3, 32, 32)
    student, teacher = (swin() if last else resnet() for last in (ours_last, theirs_last))
    ours, theirs = ("features.3" if last else "layer2" for last in (ours_last, theirs_last))
    space = build_pathways(teacher, student, x, [theirs], [ours], transforms=["conv1x1", "attention"])
    width = {True: 24, False: 128}
    for pathway in space:
        assert pathway.transform.project[0].weight.shape == (width[theirs_last], width[ours_last], 1, 1)
    a, b = torch.randn(2, width[ours_last], 8, 8), torch.randn(2, width[theirs_last], 4, 4)
    for pathway in space:
        expected = pathway.distance(pathway.transform(a, (4, 4)), b)
        given = [f.movedim(1, -1) if last else f for f, last in ((a, ours_last), (b, theirs_last))]
        assert torch.allclose(pathway(*given), expected)


def test_terms_give_losses_maps_with_their_channels_first():
    x, y = torch.randn(2, 3, 16, 16), torch.tensor([0, 1])
    teacher, student = resnet().double(), swin().double()
    loss = distpro.build_loss("at", [(12, 8, 8)], [(64, 8, 8)])
    term = Term(loss, "at", ["features.1"], ["conv1"], student_last=["features.1"])
    _, parts = Objective(teacher, student, [term], example_input=x.double())(x.double(), y)
    kept = {}
    student.features[1].register_forward_hook(lambda _m, _a, out: kept.update(ours=out))
    teacher.conv1.register_forward_hook(lambda _m, _a, out: kept.update(theirs=out))
    with torch.no_grad():
        student(x.double()), teacher.eval()(x.double())
    maps = kept["ours"].square().mean(3), kept["theirs"].square().mean(1)
    a, b = (F.normalize(m.flatten(1), dim=1) for m in maps)
    assert torch.allclose(parts["at"], (a - b).square().mean().float())


@pytest.mark.slow
def test_a_config_reads_them_too():
    """The terms of a Swin student fit what it gives, and the dry run says what that is."""
    config = {
        "data": {"name": "cifar10"},
        "teacher": {"model": "torchvision:resnet18", "taps": ["layer1", "layer2"]},
        "student": {"model": f"{__name__}:swin"},
        "pathways": {"transforms": ["conv1x1"], "connect": "same"},
        "terms": [{"loss": "at"}, {"loss": "hint", "student_taps": ["features.1"], "teacher_taps": ["layer1"]}],
    }
    found = describe(read_config(config), searching=True)
    parameters = {key: count for key, _, count, _ in found.terms}
    assert parameters["layer1<-features.1@conv1x1"] == 12 * 64 + 2 * 64 and parameters["at"] == 0
    assert 12 * 64 * 9 <= parameters["hint"] < 13 * 64 * 9  # a 3×3 convolution
    text = as_text(found)
    assert "    features.1  12×16×16  map, channels last\n" in text and "    layer1  64×8×8  map\n" in text
