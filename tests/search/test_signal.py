"""What gradients said over a search, against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distpro.search.signal import Signal, is_signal


def test_mean_spread_and_sign():
    g = np.random.default_rng(0).normal([0.5, -3.0, 0.0], [1.0, 0.1, 0.0], (7, 3))
    signal = Signal(3)
    for row in g:
        signal.add(torch.tensor(row, dtype=torch.float32))
    positive = (g > 0).sum(0)
    for row, mean, spread, up in zip(signal.rows(), g.mean(0), g.std(0, ddof=1), positive, strict=True):
        assert row["mean"] == pytest.approx(mean, rel=1e-6) and row["spread"] == pytest.approx(
            spread, rel=1e-5, abs=1e-9
        )
        if spread:
            assert row["held"] == pytest.approx(max(up, 7 - up) / 7)


def test_it_goes_on_where_it_was():
    rows = torch.randn(5, 2)
    whole, first = Signal(2), Signal(2)
    for row in rows:
        whole.add(row)
    for row in rows[:2]:
        first.add(row)
    second = Signal(2)
    second.load_state_dict(first.state_dict())
    for row in rows[2:]:
        second.add(row)
    assert second.rows() == whole.rows() and second.updates == 5


def test_what_is_a_signal():
    assert is_signal(1.0, 0.9, 4) and not is_signal(1.0, 1.1, 4)  # two standard errors are the spread itself
    assert is_signal(-1.0, 0.0, 2) and not is_signal(1.0, 0.0, 1)
    assert Signal(2).rows() == []
