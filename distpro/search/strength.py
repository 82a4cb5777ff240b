"""How hard all terms pull together: a search over one factor, on a grid of powers of ten and their halves."""

from __future__ import annotations

import math
from collections.abc import Callable

COARSE, FINE = 2, 1  # steps of the grid, in halves of a power of ten


class Strength:
    """The factor on all weights whose training is judged best, found by hill climbing.

    First by factors of 10, upwards as long as that helps, else downwards; then by √10 to both sides of the best. On a smooth
    map with one optimum, all starts that are powers of ten apart lead to the same factor.

    Args:
        judge: factor → what is to be small; ``inf`` where a training diverges.
        most: judgements that may be made in all.

    Attributes:
        judged: what each factor was judged, by half powers of ten.
    """

    def __init__(self, judge: Callable[[float], float], most: int):
        self.judge, self.most = judge, most
        self.judged: dict[int, float] = {}

    def best(self, coarse: bool = True) -> float:
        """The factor. Without ``coarse``, of 1 and what is near."""
        self._look(0)
        for step in (COARSE, FINE) if coarse else (FINE,):
            self._climb(step)
        return self.factor(self._where())

    @staticmethod
    def factor(place: int) -> float:
        """10^(place / 2)"""
        return 10.0 ** (place / 2)

    def _climb(self, step: int) -> None:
        for way in (step, -step):
            start = self._where()
            while self._look(self._where() + way) and self._where() != start:
                start = self._where()

    def _look(self, place: int) -> bool:
        """Judge a factor, unless that was done; False where no more may be judged."""
        if place not in self.judged:
            if len(self.judged) >= self.most:
                return False
            value = self.judge(self.factor(place))
            self.judged[place] = math.inf if math.isnan(value) else value
        return True

    def _where(self) -> int:
        return min(self.judged, key=lambda place: (self.judged[place], place))
