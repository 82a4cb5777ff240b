"""Groups of parameters, against optimisers made by hand and timm's groups."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer, resnet18

from distpro.build.groups import _by_registration, depths_of, parameter_groups
from distpro.build.optimizer import build_optimizer
from distpro.config.reading import read_config
from distpro.models import build_model


def config(**optimizer):
    return read_config({"student": {"model": "resnet8"}, "training": {"optimizer": optimizer}})


def norms_and_biases(model):
    """By the types of the modules."""
    return [
        p
        for m in model.modules()
        for n, p in m.named_parameters(recurse=False)
        if n == "bias" or isinstance(m, (nn.BatchNorm2d, nn.LayerNorm))
    ]


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_no_decay_is_an_optimiser_of_two_groups(name):
    if name == "lamb":
        pytest.importorskip("timm")
    students = []
    for hand_made in (False, True):
        torch.manual_seed(0)
        student = build_model("resnet8", num_classes=10)
        if hand_made:
            spared = norms_and_biases(student)
            rest = [p for p in student.parameters() if all(p is not q for q in spared)]
            groups = [{"params": rest}, {"params": spared, "weight_decay": 0.0}]
            if name == "sgd":
                optimizer = torch.optim.SGD(groups, 0.1, momentum=0.9, nesterov=True, weight_decay=0.3)
            elif name == "adamw":
                optimizer = torch.optim.AdamW(groups, 0.1, weight_decay=0.3)
            else:
                from timm.optim import Lamb

                optimizer = Lamb(groups, 0.1, weight_decay=0.3)
        else:
            checked = config(name=name, lr=0.1, weight_decay=0.3, no_decay="norms_and_biases")
            optimizer = build_optimizer(checked, list(student.parameters()), student)
        for p in student.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        for p in student.parameters():
            p.grad = p.detach().clone()
        optimizer.step()
        students.append(student.state_dict())
    for name, value in students[0].items():
        assert torch.allclose(value, students[1][name], rtol=1e-6, atol=1e-7), name


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_layer_decay_is_timms_of_a_vit(name):
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    model = timm.create_model(name, depth=3)
    theirs = {
        p: (0.1 * group["lr_scale"], group["weight_decay"])
        for group in param_groups_layer_decay(
            model, weight_decay=0.05, layer_decay=0.7, no_weight_decay_list=model.no_weight_decay()
        )
        for p in group["params"]
    }
    o = config(name="adamw", lr=0.1, layer_decay=0.7, no_decay="norms_and_biases").training.optimizer
    groups = parameter_groups(o, list(model.parameters()), model)
    ours = {p: (group["lr"], group.get("weight_decay", 0.05)) for group in groups for p in group["params"]}
    assert ours.keys() == theirs.keys()
    for n, p in model.named_parameters():
        assert ours[p] == pytest.approx(theirs[p]), n


def test_the_order_of_registration_says_the_same_of_a_vit():
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", depth=3)
    assert _by_registration(model) == depths_of(model)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (lambda: build_model("resnet8", num_classes=10), ["conv1 bn1", "layer1.0", "layer2.0", "layer3.0", "fc"]),
        (resnet18, ["conv1 bn1"] + [f"layer{n}.{k}" for n in (1, 2, 3, 4) for k in (0, 1)] + ["fc"]),
        (
            partial(VisionTransformer, 32, 8, 12, 2, 8, 8, num_classes=3),
            ["class_token encoder.pos_embedding conv_proj"]
            + [f"encoder.layers.encoder_layer_{n}" + " encoder.ln" * (n == 11) for n in range(12)]
            + ["heads.head"],
        ),
    ],
    ids=["resnet8", "resnet18", "vit"],
)
def test_layers_in_words(model, layers):
    model = model()
    depths = depths_of(model)
    assert len(depths) == len(list(model.parameters())) and max(depths.values()) == len(layers) - 1
    for name, p in model.named_parameters():
        place = next(
            n for n, several in enumerate(layers) if any(name == x or name.startswith(f"{x}.") for x in several.split())
        )
        assert depths[p] == place, name


def test_what_is_no_students_has_the_full_rate_and_comes_first():
    student, term = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2)
    o = config(lr=1.0, layer_decay=0.5).training.optimizer
    groups = parameter_groups(o, [*student.parameters(), *term.parameters()], student)
    assert [(group["lr"], len(group["params"])) for group in groups] == [(1.0, 4), (0.5, 2), (0.25, 2)]


def test_groups_are_left_alone_without_either():
    params = [nn.Parameter(torch.zeros(2))]
    assert parameter_groups(config().training.optimizer, params) == params
