"""The search space: which pathways exist, what they are called, and what they compute."""

import pytest
import torch
from torch import nn

from pathways import Pathway, UserError, build_pathways, tap
from pathways.space import parse_spec


class Net(nn.Module):
    """Feature maps of the CIFAR networks: 16x32x32, 32x16x16, 64x8x8."""

    def __init__(self, widths=(16, 32, 64)):
        super().__init__()
        a, b, c = widths
        self.layer1 = nn.Sequential(nn.Conv2d(3, a, 3, padding=1), nn.BatchNorm2d(a), nn.ReLU(inplace=True))
        self.layer2 = nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.ReLU(inplace=True))
        self.layer3 = nn.Sequential(nn.Conv2d(b, c, 3, stride=2, padding=1), nn.ReLU(inplace=True))

    def forward(self, x):
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))


LAYERS = ["layer1", "layer2", "layer3"]
SHAPES = {"layer1": (16, 32, 32), "layer2": (32, 16, 16), "layer3": (64, 8, 8)}
TRANSFORMS = ["conv1x1", "conv3x3", "attention"]


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_the_27_pathways_of_cifar(images):
    teacher, student = Net(), Net()
    space = build_pathways(teacher, student, images, LAYERS, LAYERS)
    expected = [
        (f"layer{i}<-layer{j}@{name}", (i, j, k), name)
        for i in (1, 2, 3)
        for j in (1, 2, 3)
        for k, name in enumerate(TRANSFORMS, 1)
    ]
    assert [(p.key, p.level, p.transform_name) for p in space] == expected
    with tap(teacher, LAYERS) as of_teacher, tap(student, LAYERS) as of_student, torch.no_grad():
        teacher(images), student(images)
    for pathway in space:
        assert isinstance(pathway, Pathway) and pathway.key in repr(pathway)
        (i,), (j,) = pathway.teacher_taps, pathway.student_taps
        assert tuple(of_teacher[i].shape[1:]) == SHAPES[i]
        assert pathway.transform(of_student[j]).shape == of_teacher[i].shape
        loss = pathway(of_student[j], of_teacher[i])
        assert loss.shape == () and loss > 0
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for n, p in pathway.named_parameters() if n.endswith("0.weight"))
    weights = [p.transform.project[0].weight for p in space]
    assert len({w.data_ptr() for w in weights}) == 27


def test_a_pathway_is_the_distance_of_the_transformed_feature():
    transform, distance = nn.Conv2d(3, 4, 1), nn.MSELoss()
    pathway = Pathway("t", "s", (1, 2, 3), "mine", transform, distance)
    x, target = torch.randn(2, 3, 5, 5), torch.randn(2, 4, 5, 5)
    assert pathway.key == "t<-s@mine"
    assert torch.equal(pathway(x, target, target=None, index=None), distance(transform(x), target))


def test_a_pathway_is_a_term():
    pathway = Pathway("t", "s", (1, 2, 3), "mine", nn.Identity(), nn.MSELoss())
    asked = {"weight": None, "per_level": False, "reduction": None, "masked": False, "rows": "first", "scalars": {}}
    assert {name: getattr(pathway, name) for name in asked} == asked and pathway.at(3) is None
    pathway.weight = 0.5
    assert Pathway("t", "s", (1, 2, 3), "mine", nn.Identity(), nn.MSELoss()).weight is None


def test_shapes_that_are_known_are_not_probed(images):
    class Silent(Net):
        def forward(self, x):
            raise AssertionError("the model runs")

    expected = build_pathways(Net(), Net(), images, LAYERS, LAYERS[:2])
    teacher, student = {"teacher_shapes": SHAPES}, {"student_shapes": {**SHAPES, "layer1": [16, 32, 32]}}
    for models, known in [
        ((Silent(), Net()), teacher),
        ((Net(), Silent()), student),
        ((Silent(), Silent()), teacher | student),
    ]:
        space = build_pathways(*models, images, LAYERS, LAYERS[:2], **known)
        assert [repr(p) for p in space] == [repr(p) for p in expected]
    with pytest.raises(UserError, match=r"no shape is given for student tap 'layer2' \(given: layer1\)"):
        build_pathways(Net(), Net(), images, LAYERS, LAYERS, student_shapes={"layer1": (16, 32, 32)})


def test_a_student_without_parameters(images):
    (pathway,) = build_pathways(Net(), nn.Sequential(nn.ReLU()), images, ["layer1"], ["0"], transforms=["conv1x1"])
    assert pathway.transform.project[0].weight.shape == (16, 3, 1, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("known", [{}, {"student_shapes": {"0": (4, 7, 7)}}])
def test_transforms_compute_in_the_precision_of_what_they_read(dtype, known):
    torch.manual_seed(0)
    teacher, student = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).to(dtype) for _ in range(2))
    x = torch.randn(2, 3, 9, 9).to(dtype)
    (pathway,) = build_pathways(teacher, student, x, ["0"], ["0"], transforms=["conv1x1"], distance="l2", **known)
    assert {p.dtype for p in pathway.parameters()} == {dtype}
    ours, theirs = student[0](x), teacher[0](x)
    loss = pathway(ours, theirs)
    conv, norm = pathway.transform.project
    mixed = torch.einsum("oi,nihw->nohw", conv.weight.detach()[:, :, 0, 0].double(), ours.detach().double())
    spread = mixed.var((0, 2, 3), correction=0, keepdim=True)
    normed = (mixed - mixed.mean((0, 2, 3), keepdim=True)) / (spread + norm.eps).sqrt()
    truth = (normed - theirs.detach().double()).square().mean()
    # a bfloat16 has 8 bits; a mean over 392 positions averages their rounding
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert loss.item() == pytest.approx(truth.item(), rel=tolerance)
    loss.backward()
    assert conv.weight.grad.any()


def test_a_part_of_the_student_in_another_precision(images):
    student = nn.Sequential(nn.Conv2d(3, 4, 3).double(), nn.Conv2d(4, 5, 3), nn.ReLU())
    shapes = {"0": (4, 30, 30), "1": (5, 28, 28), "2": (5, 28, 28)}
    space = build_pathways(
        Net(), student, images, ["layer1"], list(shapes), transforms=["conv1x1"], student_shapes=shapes
    )
    assert [p.transform.project[0].weight.dtype for p in space] == [torch.float64, torch.float32, torch.float64]


def test_both_sides_may_have_taps_and_widths_of_their_own(images):
    space = build_pathways(
        Net((8, 24, 40)),
        Net(),
        images,
        teacher_taps=["layer2:pre_relu", "layer3"],
        student_taps=["layer1", "layer2", "layer3:pre_relu"],
        connect="review",
        transforms=["conv3x3"],
        distance="l2",
    )
    assert [p.key for p in space] == [
        "layer2:pre_relu<-layer1@conv3x3",
        "layer2:pre_relu<-layer2@conv3x3",
        "layer2:pre_relu<-layer3:pre_relu@conv3x3",
        "layer3<-layer2@conv3x3",
        "layer3<-layer3:pre_relu@conv3x3",
    ]
    assert [p.level for p in space] == [(1, 1, 1), (1, 2, 1), (1, 3, 1), (2, 2, 1), (2, 3, 1)]
    assert [p.transform.project[0].out_channels for p in space] == [24, 24, 24, 40, 40]


def test_options_of_transforms_and_distances(images):
    space = build_pathways(
        Net(),
        Net(),
        images,
        ["layer1"],
        ["layer1"],
        connect=[["layer1", "layer1"]],
        transforms=["identity", {"name": "conv1x1", "resize": "after"}, {"conv1x1": {"resize": "before"}}],
        distance={"name": "hcl", "levels": [8, 2]},
    )
    assert [p.transform_name for p in space] == ["identity.1", "conv1x1.2", "conv1x1.3"]
    assert [p.distance.levels for p in space] == [(8, 2)] * 3


def test_tokens_and_maps_in_one_space():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(8, 12)

        def forward(self, x):
            return self.body(x.flatten(2).mT.flatten(1).view(len(x), -1, 8)[:, :17])

    images = torch.randn(2, 3, 32, 32)
    (to_tokens,) = build_pathways(
        Tokens(), Net(), images, ["body"], ["layer3"], transforms=["tokens"], distance="cosine"
    )
    (to_map,) = build_pathways(Net(), Tokens(), images, ["layer3"], ["body"], transforms=["tokens"])
    assert to_tokens.transform(torch.zeros(2, 64, 8, 8)).shape == (2, 17, 12)
    assert to_map.transform(torch.zeros(2, 17, 12)).shape == (2, 64, 8, 8)


def test_building_leaves_the_models_alone(images):
    teacher, student = Net(), Net().train()
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (teacher, student)]
    build_pathways(teacher.eval(), student, images, LAYERS, LAYERS)
    for model, state in zip((teacher, student), before, strict=True):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not teacher.training and student.training and student.layer1[1].training


@pytest.mark.parametrize(
    "options, message",
    [
        ({"teacher_taps": ["layer9"]}, "no module 'layer9'"),
        ({"connect": "al"}, "unknown connection rule 'al'; did you mean 'all'"),
        ({"connect": []}, "search space is empty"),
        ({"transforms": []}, "search space is empty"),
        ({"transforms": ["conv2x2"]}, "layer1 <- layer1: unknown transform 'conv2x2'; did you mean 'conv"),
        ({"transforms": [{"name": "conv1x1", "reszie": "after"}]}, "no parameter 'reszie'; did you mean 'resize'"),
        ({"transforms": [{"name": "conv1x1", "in_shape": [3, 3, 3]}]}, "multiple values for argument 'in_shape'"),
        ({"transforms": ["identity"]}, "layer1 <- layer2: transform 'identity' needs equal shapes"),
        ({"distance": "hlc"}, "unknown distance 'hlc'; did you mean 'hcl'"),
        ({"distance": {"hcl": {"decay_rate": 1}}}, "no parameter 'decay_rate'; did you mean 'decay'"),
        ({"distance": {"hcl": None}}, "distance: expected a name"),
        ({"transforms": [3]}, "transforms: expected a name"),
    ],
)
def test_errors(images, options, message):
    arguments = {"teacher_taps": LAYERS, "student_taps": LAYERS, **options}
    with pytest.raises(UserError, match=message):
        build_pathways(Net(), Net(), images, **arguments)


@pytest.mark.parametrize(
    "spec, parsed",
    [
        ("hcl", ("hcl", {})),
        ({"name": "hcl"}, ("hcl", {})),
        ({"name": "hcl", "levels": [4]}, ("hcl", {"levels": [4]})),
        ({"hcl": {"levels": [4]}}, ("hcl", {"levels": [4]})),
        ({"hcl": {}}, ("hcl", {})),
    ],
)
def test_parse_spec(spec, parsed):
    original = str(spec)
    assert parse_spec(spec, "distance") == parsed
    assert str(spec) == original


@pytest.mark.parametrize("spec", [None, 3, ["hcl"], {"hcl": 1}, {"a": {}, "b": {}}, {}])
def test_parse_spec_errors(spec):
    with pytest.raises(UserError, match="distance: expected a name or"):
        parse_spec(spec, "distance")


@pytest.mark.parametrize("transform", ["conv1x1", "conv3x3", "attention"])
@pytest.mark.parametrize("resize", ["before", "after"])
def test_a_pathway_follows_the_size_of_the_batch(transform, resize):
    """Built at one image size, it compares maps of another as one that was built there does."""
    teacher, student = (nn.Sequential(nn.Conv2d(3, n, 3, stride=s)) for n, s in ((6, 4), (5, 2)))
    spec = [{"name": transform, "resize": resize}]
    pathways = {}
    for size in (17, 33):
        torch.manual_seed(0)
        example = torch.zeros(2, 3, size, size)
        (pathways[size],) = build_pathways(teacher, student, example, ["0"], ["0"], transforms=spec, distance="l2")
    x = torch.randn(4, 3, 33, 33)
    assert torch.equal(pathways[17](student(x), teacher(x)), pathways[33](student(x), teacher(x)))
