"""Models of other libraries: their stages, and what is read there, are what the models themselves say."""

import pytest
import torch
from torch import nn

from distpro.batch import Batch
from pathways import Call, Tapped, UserError, build_pathways, find_stages, probe_layouts
from pathways.taps import response_of
from tests.pathways.architectures import ALL, NAMED, SMALLER, Stages
from tests.search.test_any_task import estimate

QUICK = {  # a second each at most
    "torchvision-mobilenet_v3_small", "torchvision-resnet18", "torchvision-shufflenet_v2_x0_5",
    "torchvision-squeezenet1_0", "torchvision-vit", "timm-pit_ti_224", "timm-vit_tiny_patch16_224",
}  # fmt: skip


def cases(quick, only=lambda a: True):
    marks = {False: [pytest.mark.slow], True: []}
    return [pytest.param(a, id=str(a), marks=marks[str(a) in quick]) for a in ALL if only(a)]


def test_the_lists():
    counts = {library: sum(a.library == library for a in ALL) for library in ("timm", "torchvision", "transformers")}
    assert counts == {"timm": 40, "torchvision": 20, "transformers": 6}
    assert {str(a) for a in ALL} >= {*QUICK, *SMALLER}
    assert {str(a) for a in ALL if a.stages is None} == NAMED.keys()


def by_hand(model, names, x):
    """Output and each module's output of the model run by itself."""
    read = {}

    def keep(name):
        def hook(_m, _args, output):
            tensor = output if isinstance(output, torch.Tensor) else next(iter(output))
            read[name] = tensor.clone()

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        output = response_of(Call.of(x).run(model))
    for handle in handles:
        handle.remove()
    return output, read


def stages_of(layouts):
    kinds = [("last" if p.channels_last else "maps") if len(p.shape) == 3 else "tokens" for p in layouts]
    kind = ", ".join(dict.fromkeys(kinds))
    if "tokens" not in kinds:
        return Stages(kind, [p.shape[0] for p in layouts])
    grids = [p.grid[0] if p.grid else 0 for p in layouts]
    grids = () if not any(grids) else tuple(grids[:1]) if len(set(grids)) == 1 else tuple(grids)
    assert all(p.grid is None or p.grid[0] == p.grid[1] for p in layouts)
    (prefix,) = {p.prefix for p in layouts}
    return Stages(kind, [p.shape[1] for p in layouts], grids, prefix)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", cases(QUICK, lambda a: a.stages is not None))
def test_stages_and_taps(architecture):
    model, x = architecture.build().eval(), architecture.inputs()
    names = find_stages(model, x)
    layouts = probe_layouts(model, names, x)
    found = list(layouts.values())
    assert stages_of(found) == architecture.stages
    sizes = [torch.Size(p.size).numel() for p in found]
    assert sizes == sorted(sizes, reverse=True)
    output, read = by_hand(model, names, x)
    for name, layout in layouts.items():
        plain = tuple(read[name].shape[1:])
        assert plain == ((*layout.shape[1:], layout.shape[0]) if layout.channels_last else layout.shape)
    tapped = Tapped(model, names, x)
    with torch.no_grad():
        ours, features = Call.of(x).run(tapped)
    assert torch.equal(response_of(ours), output)
    for name in names:
        assert torch.equal(features[name], read[name]), name
    tapped.remove()


@pytest.mark.parametrize("architecture", cases(set(), lambda a: a.stages is None))
def test_what_has_no_order_is_refused(architecture):
    model, x = architecture.build().eval(), architecture.inputs()
    with pytest.raises(UserError, match="no stages found in .*: name its taps in the config .*for instance"):
        find_stages(model, x)


class Classifies(nn.Module):
    """A model of any library as one that gives logits of an image."""

    def __init__(self, model, key):
        super().__init__()
        self.model, self.key = model, key

    def forward(self, x):
        response = response_of(self.model(x) if self.key is None else self.model(**{self.key: x}))
        return response.flatten(2).mean(2) if response.dim() > 2 else response


def pair_of(architecture):
    key = {True: "input_ids", False: "pixel_values"}[architecture.is_text]
    key = key if architecture.library == "transformers" else None

    def make(dtype):
        teacher, student = (Classifies(architecture.build(seed), key) for seed in (0, 1))
        for module in student.modules():
            if isinstance(module, (nn.Dropout, nn.MultiheadAttention)):
                module.p = module.dropout = 0.0
            if type(module).__name__ in ("DropPath", "StochasticDepth"):
                module.drop_prob = module.p = 0.0
        batches = []
        for seed in range(4):
            x = architecture.inputs(4, seed)
            x = x[key] if key else x
            batches.append(Batch(x, torch.tensor([0, 1, 2, 3]), 4))
        named = NAMED.get(str(architecture))
        names = [f"model.{name}" for name in named] if named else find_stages(teacher.eval(), batches[0].inputs)
        tokens = any(len(layout.shape) == 2 for layout in probe_layouts(teacher, names, batches[0].inputs).values())
        transforms = ["tokens" if tokens else "conv1x1"]
        torch.manual_seed(2)
        space = build_pathways(
            teacher, student, batches[0].inputs, names, names[-2:], transforms=transforms, distance="l2",
            connect=[[names[0], names[-1]], [names[-1], names[-2]]],
        )  # fmt: skip
        return teacher, student, space, None, batches

    return make


# GhostNet's last BatchNorm sees four values, nearly equal. There the exact estimators and central differences agree to 1e-6, and
# unrolled's second derivative is off by 3e-6.
ROUNDING = {"timm-ghostnet_050": 1e-5}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", cases({"torchvision-vit"}))
def test_one_search_step_of_each_estimator(architecture):
    make = pair_of(architecture.smaller())
    truth = estimate(make, "unrolled")
    assert torch.isfinite(truth).all() and (truth != 0).all()
    exact = ROUNDING.get(str(architecture), 1e-6)
    others = (
        ("forward_mode", {}, exact),
        ("finite_difference", {"epsilon": 1e-4}, 1e-2),
        ("sweep", {"steps": 1}, exact),
    )
    found = {name: estimate(make, name, **params) for name, params, _ in others}
    for name, _, tolerance in others:
        assert ((found[name] - truth).norm() / truth.norm()).item() < tolerance, name
    assert ((found["sweep"] - found["forward_mode"]).norm() / truth.norm()).item() < 1e-6
