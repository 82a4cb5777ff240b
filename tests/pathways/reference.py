"""A model of the field, its forward written by hand, and the three ways of reading it."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from pathways import Tapped, tap


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


class Fails(nn.Module):
    def forward(self, x):
        raise RuntimeError("as planned")


def leaves(model):
    """Modules that call no others. An attention's projection is one of its parameters by another name."""
    whole = {n: m for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention) or not list(m.children())}
    return {n: m for n, m in whole.items() if n.rpartition(".")[0] not in whole}


def called_by(run, model):
    """Leaf modules whose forward runs in ``run()``, in order. They are watched from outside: a hook would change what runs."""
    called, names = [], {module: name for name, module in leaves(model).items()}

    def watch(frame, event, _):
        if event == "call" and frame.f_code.co_name == "forward":
            module = frame.f_locals.get("self")
            if isinstance(module, nn.Module) and module in names:
                called.append(names[module])

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        result = run()
    finally:
        sys.setprofile(before)
    return result, list(dict.fromkeys(called))


def without_relus(model, names):
    """The modules without those that fused code computes itself."""
    return [n for n in names if not isinstance(model.get_submodule(n), nn.ReLU)]
