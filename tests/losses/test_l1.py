"""The teacher's response as target, against PyTorch's own L1 and a sum by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distpro.losses import build_loss
from pathways.registry import UserError

MAP = [(1, 6, 8)]


def maps(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 1, 6, 8, dtype=torch.float64, generator=draw) for _ in range(2)]


def test_it_is_the_mean_absolute_error():
    s, t = maps()
    assert build_loss("l1", MAP, MAP)(s, t).item() == pytest.approx(F.l1_loss(s, t).item(), rel=1e-12)
    rows = s.flatten(1)[:, :4], t.flatten(1)[:, :4]
    assert build_loss("l1", [(4,)], [(4,)])(*rows).item() == pytest.approx(F.l1_loss(*rows).item(), rel=1e-12)


@pytest.mark.parametrize("positions", ["counted", "all"])
def test_positions_that_do_not_count(positions):
    (s, t), mask = maps(), torch.rand(3, 6, 8, generator=torch.Generator().manual_seed(1)) < 0.6
    loss = build_loss("l1", MAP, MAP, positions=positions)
    s.requires_grad_()
    value = loss(s, t, mask=mask)
    (gradient,) = torch.autograd.grad(value, s)
    kept = mask if positions == "counted" else torch.ones_like(mask)
    errors = (s - t)[:, 0][kept].abs()
    assert value.item() == pytest.approx(errors.sum().item() / len(errors), rel=1e-12)
    assert torch.equal(gradient[:, 0] != 0, kept)
    none = loss(s, t, mask=torch.zeros_like(mask)).item()
    assert none == 0 if positions == "counted" else none == pytest.approx(F.l1_loss(s, t).item())


def test_a_larger_response_is_pooled():
    s, t = maps()
    half = F.avg_pool2d(t, 2)
    truth = F.l1_loss(F.avg_pool2d(s, 2), half)
    assert build_loss("l1", MAP, [(1, 3, 4)])(s, half).item() == pytest.approx(truth.item(), rel=1e-12)


def test_what_cannot_be_compared():
    with pytest.raises(UserError, match="loss 'l1' needs equal channel counts, got 1"):
        build_loss("l1", MAP, [(2, 6, 8)])
    with pytest.raises(UserError, match="positions must be counted or all, got 'valid'"):
        build_loss("l1", MAP, MAP, positions="valid")
