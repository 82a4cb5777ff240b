"""BatchNorm over the batch of two processes against PyTorch's, in float64, over the whole batch in one."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distpro.train import distributed
from pathways.registry import UserError
from tests.train.ranks import in_two

SHAPES = {"1d": (7, 3), "1d tokens": (7, 3, 5), "2d": (7, 3, 4, 2), "3d": (7, 3, 2, 2, 3)}
KINDS = {"1d": nn.BatchNorm1d, "1d tokens": nn.BatchNorm1d, "2d": nn.BatchNorm2d, "3d": nn.BatchNorm3d}


class Named(nn.BatchNorm2d):
    """As of any library that derives a class and keeps the forward."""


class WithActivation(nn.BatchNorm2d):
    """Normalises, then more, as timm's BatchNormAct2d."""

    def forward(self, x):
        return F.gelu(F.batch_norm(input=x, running_mean=self.running_mean, running_var=self.running_var,
                                   weight=self.weight, bias=self.bias, training=self.training, eps=self.eps,
                                   momentum=0.1))  # fmt: skip


class OwnArithmetic(nn.BatchNorm2d):
    def forward(self, x):
        return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)


def case(kind, shape, mean=0.0, std=1.0, dtype=torch.float64, cut=3, **options):
    """A layer, the whole batch, and how the ranks share it: ``cut`` samples, and the rest."""
    torch.manual_seed(0)
    layer = kind(shape[1], **options).to(dtype)
    if layer.affine:
        with torch.no_grad():
            layer.weight.uniform_(0.5, 2)
            layer.bias.normal_()
    x, weights = torch.randn(2, *shape, dtype=torch.float64)
    return layer, (x * std + mean).to(dtype), weights.to(dtype), [slice(0, cut), slice(cut, shape[0])]


def passes(layer, x, weights):
    """Two training passes: outputs, gradients and running statistics, and the outputs in evaluation mode."""
    x = x.clone().requires_grad_()
    first = layer(x)
    y = layer(x * 1.5 - 0.25)
    (y * weights).sum().backward()
    gradients = {f"{name}.grad": p.grad for name, p in layer.named_parameters()}
    buffers = {name: b.clone() for name, b in layer.named_buffers()}
    return {"first": first.detach(), "y": y.detach(), "x": x.grad, **gradients, **buffers}, layer.eval()(x).detach()


CASES = [
    *((KINDS[name], shape, {}) for name, shape in SHAPES.items()),
    *(
        (nn.BatchNorm2d, SHAPES["2d"], options)
        for options in (
            {"affine": False},
            {"momentum": None},
            {"eps": 0.1},
            {"track_running_stats": False},
            {"cut": 1},
            {"cut": 0},  # an empty part
        )
    ),
    *((kind, SHAPES["2d"], {}) for kind in (Named, WithActivation)),
    (nn.BatchNorm1d, (2, 3), {"cut": 1}),  # one sample a rank
    *((nn.BatchNorm2d, (8, 3, 4, 2), {"mean": mean, "cut": 4}) for mean in (300.0, -200.0)),
]

FLOAT32 = [
    ((8, 2, 6, 6), {"mean": mean, "std": std, "dtype": torch.float32, "cut": 4})
    for mean, std in ((0.0, 1.0), (30.0, 1.0), (300.0, 1.0), (3000.0, 1.0), (1000.0, 0.1))
]


def together(rank):
    found = []
    for kind, shape, options in CASES:
        layer, x, weights, parts = case(kind, shape, **options)
        model = nn.Sequential(layer)
        distributed.synchronise_batch_norm(model)
        assert isinstance(model[0], distributed.SyncBatchNorm) and isinstance(model[0], kind)
        found.append(passes(copy.deepcopy(model[0]), x[parts[rank]], weights[parts[rank]]))
    return found


def outputs(rank):
    found = []
    for shape, options in FLOAT32:
        layer, x, _, parts = case(nn.BatchNorm2d, shape, **options)
        model = nn.Sequential(layer)
        distributed.synchronise_batch_norm(model)
        found.append(model(x[parts[rank]]).detach())
    return found


def refusals(rank):
    messages = []
    for layer, x in ((OwnArithmetic(3), torch.randn(4, 3, 2, 2)), (nn.BatchNorm1d(3), torch.randn(1 - rank, 3))):
        model = nn.Sequential(layer)
        distributed.synchronise_batch_norm(model)
        try:
            model(x)
        except UserError as error:
            messages.append(str(error))
    return messages


def timm_layer():
    from timm.layers import BatchNormAct2d

    torch.manual_seed(0)
    return BatchNormAct2d(3).double(), torch.randn(6, 3, 4, 4, dtype=torch.float64)


def timm_outputs(rank):
    layer, x = timm_layer()
    model = nn.Sequential(layer)
    distributed.synchronise_batch_norm(model)
    return model(x[rank * 2 : 2 + 4 * rank]).detach()


@pytest.fixture(scope="module")
def found():
    of_timm = [timm_outputs] if importlib.util.find_spec("timm") else []
    return in_two(together, outputs, refusals, twice_in_part, *of_timm)


@pytest.mark.slow
def test_values_gradients_and_running_statistics(found):
    """Both ranks' results side by side are those of the whole batch; parameters' gradients add up to its."""
    for (kind, shape, options), (ours, plain), (theirs, plain_theirs) in zip(CASES, *found["together"], strict=True):
        layer, x, weights, _ = case(kind, shape, **options)
        expected, evaluated = passes(layer, x, weights)
        for name, value in expected.items():
            if name in ("first", "y", "x"):
                got = torch.cat([ours[name], theirs[name]])
            elif name in ("weight.grad", "bias.grad"):
                got = ours[name] + theirs[name]
            else:
                got = ours[name]
                assert torch.equal(got, theirs[name])
            what = f"{kind.__name__} {shape} {options}: {name}"
            torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-11, msg=lambda m, w=what: f"{w}\n{m}")
        if layer.track_running_stats:  # else an evaluation takes the statistics of its own part
            torch.testing.assert_close(torch.cat([plain, plain_theirs]), evaluated, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_a_mean_much_larger_than_the_deviation_costs_no_digits(found):
    """The float32 inputs are exact, and all that is rounded is of the deviation's size: a few roundings of it."""
    for (shape, options), ours, theirs in zip(FLOAT32, *found["outputs"], strict=True):
        layer, x, _, _ = case(nn.BatchNorm2d, shape, **options)
        expected = layer.double()(x.double()).detach()
        error = (torch.cat([ours, theirs]).double() - expected).abs().max()
        assert error < 4 * torch.finfo(torch.float32).eps * expected.abs().max(), (options, error)


@pytest.mark.slow
def test_what_cannot_be_synchronised_is_refused_by_name(found):
    for messages in found["refusals"]:
        assert "OwnArithmetic does not normalise by torch.nn.functional.batch_norm" in messages[0]
        assert "one value per channel" in messages[1]


@pytest.mark.slow
def test_timm(found):
    """Its norm with an activation is synchronised, the activation stays."""
    pytest.importorskip("timm")
    output = torch.cat(found["timm_outputs"])
    layer, x = timm_layer()
    torch.testing.assert_close(output, layer(x).detach(), rtol=1e-9, atol=1e-11)
    assert output.min() == 0


def test_alone_and_in_evaluation_it_is_the_layer_that_it_was():
    layer, x, weights, _ = case(nn.BatchNorm2d, SHAPES["2d"])
    model = nn.Sequential(copy.deepcopy(layer), nn.InstanceNorm2d(3), nn.SyncBatchNorm(3))
    distributed.synchronise_batch_norm(model)
    distributed.synchronise_batch_norm(model)  # again changes nothing
    assert [type(m).__name__ for m in model] == ["SyncBatchNorm2d", "InstanceNorm2d", "SyncBatchNorm"]
    (ours, evaluated), (theirs, expected) = passes(model[0], x, weights), passes(layer, x, weights)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and torch.equal(evaluated, expected)


def test_a_layer_without_a_width_is_refused():
    with pytest.raises(UserError, match="LazyBatchNorm2d does not know its width"):
        distributed.synchronise_batch_norm(nn.Sequential(nn.LazyBatchNorm2d()))


def twice(layer, x, weights):
    """The Hessian of a loss of BatchNorm's outputs times a direction, by inputs and parameters, by double backward."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    inputs = [x, *layer.parameters()]
    loss = (torch.tanh(layer(x)) * weights).pow(2).sum()
    gradients = torch.autograd.grad(loss, inputs, create_graph=True)
    product = sum((g * torch.cos(p.detach() * 3)).sum() for g, p in zip(gradients, inputs, strict=True))
    return [h.detach() for h in torch.autograd.grad(product, inputs)]


def twice_in_part(rank):
    """Each rank's own; of parameters, the parts that add up to the whole batch's."""
    found = []
    for kind, shape, options in TWICE:
        layer, x, weights, parts = case(kind, shape, **options)
        distributed.synchronise_batch_norm(layer)
        found.append(twice(layer, x[parts[rank]], weights[parts[rank]]))
    return found


TWICE = [
    *((KINDS[name], shape, {}) for name, shape in SHAPES.items()),
    (nn.BatchNorm2d, SHAPES["2d"], {"affine": False}),
    (nn.BatchNorm2d, SHAPES["2d"], {"eps": 0.1, "cut": 0}),
]


@pytest.mark.slow
def test_a_second_backward_pass(found):
    found = found["twice_in_part"]
    for n, (kind, shape, options) in enumerate(TWICE):
        layer, x, weights, _ = case(kind, shape, **options)
        of_inputs, *of_parameters = twice(layer, x, weights)
        torch.testing.assert_close(torch.cat([rank[n][0] for rank in found]), of_inputs, rtol=1e-10, atol=1e-12)
        for k, whole in enumerate(of_parameters):
            torch.testing.assert_close(sum(rank[n][1 + k] for rank in found), whole, rtol=1e-10, atol=1e-12)
