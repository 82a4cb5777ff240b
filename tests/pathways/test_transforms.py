"""Transforms bring every student shape to every teacher shape, start as stated, and cost what they say."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pathways import TRANSFORMS, UserError

MAPS = [(4, 1, 1), (6, 7, 5), (5, 8, 8), (3, 9, 4), (8, 4, 9), (2, 16, 2)]
TOKENS = [(16, 6), (17, 6), (9, 4), (10, 4), (1, 3)]
CONVOLUTIONS = ["conv1x1", "conv3x3", "attention"]


def build(name, in_shape, out_shape, seed=0, **params):
    torch.manual_seed(seed)
    return TRANSFORMS.build(name, in_shape, out_shape, **params).double()


def feature(shape, seed=1, batch=3):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("resize", ["before", "after"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("in_shape, out_shape", list(product(MAPS, MAPS)))
def test_maps_get_the_teachers_shape(name, resize, in_shape, out_shape):
    transform = build(name, in_shape, out_shape, resize=resize)
    x = feature(in_shape).requires_grad_()
    y = transform(x)
    assert y.shape == (3, *out_shape)
    y.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in transform.parameters())
    assert torch.isfinite(x.grad).all()


def bn(x, eps=1e-5):
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (variance + eps).sqrt()


def nearest(x, size):
    """Nearest neighbour: output position p reads floor(p · in / out)."""
    rows, columns = ([p * side // out for p in range(out)] for side, out in zip(x.shape[2:], size, strict=True))
    return x[:, :, rows][:, :, :, columns]


def written_by_hand(name, weights, x, size, resize):
    """What the docstrings say, step by step."""
    shrinks = size[0] * size[1] < x.shape[2] * x.shape[3]
    if shrinks and resize == "before":
        x = nearest(x, size)
    if name == "attention":
        x = x * torch.sigmoid(F.conv2d(x, weights["attention.weight"], weights["attention.bias"]))
    x = bn(F.conv2d(x, weights["project.0.weight"]))
    if name == "conv1x1":
        return nearest(x, size)
    if not shrinks:
        x = nearest(x, size)
    x = bn(F.conv2d(x, weights["refine.0.weight"], padding=1))
    return nearest(x, size)


@pytest.mark.parametrize("resize", ["before", "after"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize(
    "in_shape, out_shape", [((5, 8, 8), (6, 3, 5)), ((6, 3, 5), (5, 8, 8)), ((4, 6, 6), (4, 6, 6))]
)
def test_values(name, resize, in_shape, out_shape):
    transform, x = build(name, in_shape, out_shape, resize=resize), feature(in_shape)
    if name == "attention":
        nn.init.normal_(transform.attention.bias)
    expected = written_by_hand(name, transform.state_dict(), x, out_shape[1:], resize)
    torch.testing.assert_close(transform(x), expected)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_targets_before_a_relu_can_be_met(name):
    assert (build(name, (4, 8, 8), (6, 4, 4))(feature((4, 8, 8))) < 0).any()


@pytest.mark.parametrize(
    "name, in_shape, out_shape, fans",
    [
        ("conv1x1", (48, 4, 4), (64, 4, 4), {"project.0.weight": 48}),
        ("conv3x3", (48, 4, 4), (64, 4, 4), {"project.0.weight": 48, "refine.0.weight": 64 * 9}),
        (
            "attention",
            (192, 4, 4),
            (64, 4, 4),
            {"project.0.weight": 192, "refine.0.weight": 64 * 9, "attention.weight": 192},
        ),
        ("tokens", (16, 48), (16, 64), {"project.weight": 48}),
    ],
)
def test_weights_start_kaiming_uniform(name, in_shape, out_shape, fans):
    """a = 1: uniform within ±√(6 / ((1 + a²) fan_in)) = ±√(3 / fan_in)."""
    state = build(name, in_shape, out_shape).state_dict()
    for key, fan_in in fans.items():
        weight, bound = state.pop(key), math.sqrt(3 / fan_in)
        assert 0.95 * bound < weight.abs().max() <= bound
        assert abs(weight.mean()) < 4 * bound / math.sqrt(3 * weight.numel())  # four standard errors
    norms = {k: v for k, v in state.items() if "running" not in k and "num_batches" not in k}
    assert all((v == (1 if k.endswith("1.weight") else 0)).all() for k, v in norms.items())


CIFAR = [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


def cost(name, in_shape, out_shape, resize):
    """Multiply-accumulates of one sample."""
    transform, counter = TRANSFORMS.build(name, in_shape, out_shape, resize=resize), FlopCounterMode(display=False)
    with counter, torch.no_grad():
        transform.eval()(torch.zeros(1, *in_shape))
    return counter.get_total_flops() // 2


def cost_by_hand(name, in_shape, out_shape, resize):
    (c, h, w), (d, height, width) = in_shape, out_shape
    shrinks = height * width < h * w
    early = height * width if shrinks and resize == "before" else h * w
    late = early if shrinks else height * width
    macs = c * d * early
    macs += 9 * d * d * late if name != "conv1x1" else 0
    return macs + (c * early if name == "attention" else 0)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_cost_of_both_orders_in_the_cifar_space(name):
    totals = {"before": 0, "after": 0}
    for in_shape, out_shape, resize in product(CIFAR, CIFAR, totals):
        macs = cost(name, in_shape, out_shape, resize)
        assert macs == cost_by_hand(name, in_shape, out_shape, resize)
        totals[resize] += macs
    assert totals["before"] < totals["after"]


@pytest.mark.parametrize("shrinking_only, ratio", [(False, 0.310), (True, 0.127)])
def test_cost_of_shrinking_first_in_the_cifar_space(shrinking_only, ratio):
    pairs = [(i, o) for i, o in product(CIFAR, CIFAR) if o[1] < i[1] or not shrinking_only]
    totals = {
        resize: sum(cost(name, i, o, resize) for name in CONVOLUTIONS for i, o in pairs)
        for resize in ("before", "after")
    }
    assert totals["before"] / totals["after"] == pytest.approx(ratio, abs=0.001)


def test_identity():
    x = feature((4, 5, 6))
    assert build("identity", (4, 5, 6), (4, 5, 6))(x) is x
    with pytest.raises(UserError, match=r"equal shapes, got \(4, 5, 6\) and \(4, 5, 5\)"):
        TRANSFORMS.build("identity", (4, 5, 6), (4, 5, 5))


# Tokens


@pytest.mark.parametrize("in_shape, out_shape", list(product(TOKENS + MAPS, TOKENS + MAPS)))
def test_tokens_get_the_teachers_shape(in_shape, out_shape):
    transform = build("tokens", in_shape, out_shape)
    y = transform(feature(in_shape))
    assert y.shape == (3, *out_shape)
    y.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in transform.parameters())


def tokens_by_hand(transform, x, source_class, target_class, side_in, side_out):
    projected = x @ transform.project.weight.T + transform.project.bias
    class_token, grid = (projected[:, 0], projected[:, 1:]) if source_class else (projected.mean(1), projected)
    rows = grid.reshape(len(x), side_in, side_in, -1).permute(0, 3, 1, 2)
    if side_in != side_out:
        rows = F.interpolate(rows, size=(side_out, side_out), mode="bilinear", align_corners=False)
    grid = rows.permute(0, 2, 3, 1).reshape(len(x), side_out**2, -1)
    return torch.cat([class_token[:, None], grid], 1) if target_class else grid


@pytest.mark.parametrize("side_in, side_out", [(4, 4), (4, 3), (3, 4)])
@pytest.mark.parametrize("source_class, target_class", list(product([False, True], [False, True])))
def test_class_tokens(source_class, target_class, side_in, side_out):
    in_shape, out_shape = (side_in**2 + source_class, 6), (side_out**2 + target_class, 5)
    transform, x = build("tokens", in_shape, out_shape), feature(in_shape)
    nn.init.normal_(transform.project.bias)
    expected = tokens_by_hand(transform, x, source_class, target_class, side_in, side_out)
    torch.testing.assert_close(transform(x), expected)


def test_tokens_and_maps_keep_their_places():
    """Token number r · W + c is the map's position (r, c)."""
    x = feature((5, 3, 3))
    transform = build("tokens", (5, 3, 3), (10, 5))
    nn.init.eye_(transform.project.weight)
    tokens = transform(x)
    torch.testing.assert_close(tokens[:, 1 + 1 * 3 + 2], x[:, :, 1, 2])
    torch.testing.assert_close(tokens[:, 0], x.mean((2, 3)))
    back = build("tokens", (10, 5), (5, 3, 3))
    nn.init.eye_(back.project.weight)
    torch.testing.assert_close(back(tokens), x)


@pytest.mark.parametrize("length", [10, 12, 16, 17, 18, 7])
def test_tokens_of_one_length_are_projected_position_by_position(length):
    """Words are no grid, whatever their number; and no two positions are mixed."""
    transform, x = build("tokens", (length, 6), (length, 5)), feature((length, 6)).requires_grad_()
    y = transform(x)
    torch.testing.assert_close(y, x @ transform.project.weight.T + transform.project.bias)
    (gradient,) = torch.autograd.grad(y[:, 3].sum(), x)
    assert gradient[:, 3].all() and not gradient[:, :3].any() and not gradient[:, 4:].any()


@pytest.mark.parametrize(
    "prefix, source_prefix, target_prefix", [(None, 2, 1), (None, 0, 2), (3, 3, 3), ((4, 1), 4, 1), ((0, 5), 0, 5)]
)
@pytest.mark.parametrize("side_in, side_out", [(4, 3), (3, 5)])
def test_tokens_in_front_of_a_grid(prefix, source_prefix, target_prefix, side_in, side_out):
    in_shape, out_shape = (side_in**2 + source_prefix, 6), (side_out**2 + target_prefix, 5)
    transform, x = build("tokens", in_shape, out_shape, prefix=prefix), feature(in_shape)
    y, projected = transform(x), transform.project(x)
    both = min(source_prefix, target_prefix)
    assert y.shape == (3, *out_shape)
    torch.testing.assert_close(y[:, :both], projected[:, :both])
    for position in range(both, target_prefix):
        torch.testing.assert_close(y[:, position], projected[:, source_prefix:].mean(1))
    plain = build("tokens", (side_in**2, 6), (side_out**2, 5), prefix=0)
    plain.load_state_dict(transform.state_dict())
    torch.testing.assert_close(y[:, target_prefix:], plain(x[:, source_prefix:]))


def test_a_prefix_and_a_map():
    transform, x = build("tokens", (20, 6), (5, 3, 2), prefix=4), feature((20, 6))
    grid = transform.project(x[:, 4:]).mT.unflatten(2, (4, 4))
    torch.testing.assert_close(transform(x), F.interpolate(grid, size=(3, 2), mode="bilinear", align_corners=False))


# Errors and precision


@pytest.mark.parametrize(
    "name, in_shape, out_shape, params, message",
    [
        *(
            (name, (16, 6), (4, 4, 4), {}, rf"'{name}' needs feature maps .*got shape \(16, 6\).*use 'tokens'")
            for name in CONVOLUTIONS
        ),
        ("conv1x1", (4, 4, 4), (10,), {}, r"got shape \(10,\)"),
        (
            "conv3x3",
            (4, 4, 4),
            (4, 2, 2),
            {"resize": "first"},
            "'conv3x3': resize must be before or after, got 'first'",
        ),
        ("conv3x3", (4, 4, 4), (4, 2, 2), {"size": 3}, "no parameter 'size'"),
        ("tokens", (12, 6), (16, 6), {}, "12 tokens are no square grid"),
        ("tokens", (16, 6), (98, 6), {}, "98 tokens are no square grid"),
        ("tokens", (12, 6), (4, 3, 3), {}, "12 tokens are no square grid.*say with 'prefix'"),
        ("tokens", (18, 6), (9, 6), {"prefix": 1}, "18 tokens are no square grid, behind a prefix of 1"),
        ("tokens", (3, 6), (9, 6), {"prefix": 3}, "3 tokens are no square grid"),
        ("tokens", (16, 6), (9, 6), {"prefix": -1}, "prefix must be one or two counts of tokens, got -1"),
        ("tokens", (16, 6), (9, 6), {"prefix": True}, "prefix must be one or two counts"),
        ("tokens", (16, 6), (9, 6), {"prefix": [1, 2, 3]}, "prefix must be one or two counts"),
        ("tokens", (16, 6), (9, 6), {"prefix": "one"}, "prefix must be one or two counts"),
        ("tokens", (10,), (16, 6), {}, r"got shape \(10,\)"),
    ],
)
def test_shapes_that_do_not_fit(name, in_shape, out_shape, params, message):
    with pytest.raises(UserError, match=message):
        TRANSFORMS.build(name, in_shape, out_shape, **params)


@pytest.mark.parametrize(
    "name, in_shape, out_shape", [("attention", (4, 6, 6), (5, 3, 3)), ("tokens", (16, 4), (10, 5))]
)
def test_autocast(name, in_shape, out_shape):
    transform, x = TRANSFORMS.build(name, in_shape, out_shape), feature(in_shape).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = transform(x)
    torch.testing.assert_close(y.float(), transform(x), rtol=0.05, atol=0.05)
