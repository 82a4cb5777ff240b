"""Knowledge review and its hierarchical context loss: the parts that can be switched off, and odd sizes.

Golden numbers of the whole are in ``golden_feature_dense.py``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distpro.losses import build_loss
from tests.losses.test_feature_dense import LEVELS, _build, _inputs


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


ROWS = {  # rows of the reproduction study's ablation
    "baseline": {"review": False, "hcl": False},
    "RM": {"residual": False, "hcl": False},
    "RLF": {"attention": False, "hcl": False},
    "ABF": {"hcl": False},
    "HCL": {"attention": False},
    "all": {},
}


@pytest.mark.parametrize("row", ROWS)
def test_review_levels_listen_to_the_deeper_student_levels(row):
    teacher_shapes = [(5, 16, 16), (7, 4, 4), (9, 1, 1)]
    loss = _build("review", LEVELS, teacher_shapes, **ROWS[row])
    student = _inputs(LEVELS, requires_grad=True)
    levels = loss.levels(student, _inputs(teacher_shapes))
    heard = [
        [bool(g is not None and g.any()) for g in torch.autograd.grad(v, student, retain_graph=True, allow_unused=True)]
        for v in levels
    ]
    assert heard == [[j == k if row == "baseline" else j >= k for j in range(3)] for k in range(3)]


def test_review_without_hcl_is_the_squared_error_of_the_same_outputs():
    loss = _build("review", LEVELS, LEVELS, hcl=False)
    s, t = _inputs(LEVELS), _inputs(LEVELS)
    outputs = loss.outputs(s, [x.shape[2:] for x in t])
    torch.testing.assert_close(
        loss.levels(s, t), torch.stack([((o - x) ** 2).mean() for o, x in zip(outputs, t, strict=True)])
    )


def test_review_without_attention_adds_the_residual():
    on, off = (_build("review", LEVELS, LEVELS, attention=a) for a in (True, False))
    off.load_state_dict(on.state_dict(), strict=False)
    for abf in on.abfs[1:]:
        torch.nn.init.zeros_(abf.att_conv[0].weight)
        torch.nn.init.constant_(abf.att_conv[0].bias, 100.0)  # both attention maps are one
    s, t = _inputs(LEVELS), _inputs(LEVELS)
    torch.testing.assert_close(on.levels(s, t), off.levels(s, t))


def test_review_without_the_residual_framework_adds_all_deeper_levels():
    loss = _build("review", LEVELS, LEVELS, **ROWS["RM"])
    s, t = _inputs(LEVELS), _inputs(LEVELS)
    for k, value in enumerate(loss.levels(s, t)):
        parts = [
            F.interpolate(conv(f), size=t[k].shape[2:], mode="nearest")
            for conv, f in zip(loss.branches[k].convs, s[k:], strict=True)
        ]
        torch.testing.assert_close(value, ((sum(parts) - t[k]) ** 2).mean())


def test_review_takes_the_pooled_feature_as_a_vector():
    loss = _build("review", [(6, 4, 4), (6,)], [(8, 4, 4), (8,)])
    as_map = _build("review", [(6, 4, 4), (6, 1, 1)], [(8, 4, 4), (8, 1, 1)])
    as_map.load_state_dict(loss.state_dict())
    s, t = _inputs([(6, 4, 4), (6,)]), _inputs([(8, 4, 4), (8,)])
    maps = [[x[0], x[1][..., None, None]] for x in (s, t)]
    torch.testing.assert_close(loss(s, t), as_map(*maps))


@pytest.mark.parametrize("side", [14, 7, 5, 3])
def test_hcl_on_sizes_that_the_levels_do_not_divide(side):
    s, t = (_inputs([(3, side, side)])[0] for _ in range(2))
    total, weights = 0.0, 0.0
    for i, size in enumerate([side, *(level for level in (4, 2, 1) if level < side)]):
        pooled = F.adaptive_avg_pool2d(s, size) - F.adaptive_avg_pool2d(t, size)
        total, weights = total + 0.5**i * (pooled**2).mean(), weights + 0.5**i
    torch.testing.assert_close(build_loss("hcl")(s, t), total / weights)
