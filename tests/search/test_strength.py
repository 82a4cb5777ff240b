"""The climb to the strength at which a training is best, on maps whose optimum is known."""

from __future__ import annotations

import math

import pytest

from distpro.search.strength import Strength


def bowl(optimum, start, calls, diverges=math.inf):
    """A loss of the strength start · factor, smallest at the optimum."""

    def judge(factor):
        calls.append(start * factor)
        return math.inf if start * factor > diverges else math.log(start * factor / optimum) ** 2

    return judge


@pytest.mark.parametrize("optimum", [0.03, 0.5, 1.0, 4.0, 12.0, 25.0, 300.0])
def test_all_starts_lead_to_the_nearest_strength_of_the_grid(optimum):
    grid = [10 ** (n / 2) for n in range(-8, 9)]
    nearest = min(grid, key=lambda x: abs(math.log(x / optimum)))
    for start in (0.1, 1.0, 10.0):
        calls = []
        found = start * Strength(bowl(optimum, start, calls), most=12).best()
        assert found == pytest.approx(nearest)
        assert len(calls) == len(set(calls)) <= 8  # nothing is trained twice


def test_a_strength_that_diverges_is_not_taken():
    for worst in (math.inf, math.nan):
        strength = Strength(lambda factor, worst=worst: worst if factor > 5 else -factor, most=9)
        assert strength.best() == pytest.approx(10**0.5)


def test_no_more_judgements_than_allowed():
    for most in (1, 2, 3, 4):
        calls = []
        found = Strength(bowl(1000.0, 1.0, calls), most).best()
        assert len(calls) == most and found == pytest.approx(max(calls))


def test_near_by_only():
    calls = []
    assert Strength(bowl(3.0, 1.0, calls), most=9).best(coarse=False) == pytest.approx(10**0.5)
    assert calls == pytest.approx([1, 10**0.5, 10])
