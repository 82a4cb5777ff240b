"""Means of a few runs, and how far they may be off."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# Two-sided 95 % points of Student's t for 1, 2, ... degrees of freedom.
# fmt: off
T95: tuple[float, ...] = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)
# fmt: on


def difference_text(differences: Sequence[float], digits: int) -> str:
    """The mean of some differences, with its 95 % interval where there are several; "" of none.

    >>> difference_text([1.0, 2.0, 3.0], 1)
    '+2.0 [-0.5, +4.5]'
    """
    if not differences:
        return ""
    mean = statistics.mean(differences)
    if len(differences) == 1:
        return f"{mean:+.{digits}f}"
    half = half_width(differences)
    return f"{mean:+.{digits}f} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]"


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean of two or more values, by Student's t.

    >>> round(half_width([1.0, 2.0, 3.0]), 2)
    2.48
    """
    freedom = len(values) - 1
    point = T95[freedom - 1] if freedom <= len(T95) else 1.96 + 2.4 / freedom  # within 0.002 of the exact one
    return point * statistics.stdev(values) / math.sqrt(len(values))
