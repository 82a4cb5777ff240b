"""Which values a loss's options may have: one check, when a loss is built and when one of its scalars moves."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from pathways.registry import UserError


@dataclass(frozen=True)
class Range:
    """Finite numbers from ``low`` to ``high``, or ``above`` low: without low itself."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, Real):
            return False
        number = float(value)
        return math.isfinite(number) and self.low <= number <= self.high and not (self.above and number == self.low)

    def __str__(self) -> str:
        if self.low == -math.inf:
            return "finite"
        if self.high < math.inf:
            return f"{'above' if self.above else 'from'} {self.low:g} {'and at most' if self.above else 'to'} {self.high:g}"
        return f"finite, {'above' if self.above else 'at least'} {self.low:g}"


FINITE = Range()
POSITIVE = Range(0, above=True)
NOT_NEGATIVE = Range(0)
SHARE = Range(0, 1)
COUNT = Range(1)

_KINDS = {"float": Real, "int": Integral, "bool": bool, "str": str}
_WORDS = {"float": "a number", "int": "a whole number", "bool": "true or false", "str": "a word"}


def check_options(
    what: str, entry: Callable[..., Any], params: Mapping[str, Any], ranges: Mapping[str, Range] | None = None
) -> None:
    """Raise UserError, which begins with ``what``, for a value in ``params`` that is not of the kind that its annotation
    says, is not finite, or is outside of the range in ``ranges`` (the entry's own by default). Unknown names pass."""
    ranges = getattr(entry, "ranges", {}) if ranges is None else ranges
    accepted = inspect.signature(entry).parameters
    for name, value in params.items():
        parameter = accepted.get(name)
        if parameter is None or parameter.kind is parameter.VAR_KEYWORD:
            continue
        annotation = parameter.annotation
        kinds = [kind.strip() for kind in getattr(annotation, "__name__", str(annotation)).split("|")]
        if value is None and "None" in kinds:
            continue
        kind = " | ".join(kind for kind in kinds if kind != "None")
        item = kind.removeprefix("Sequence[").removesuffix("]")
        if item not in _KINDS:
            if isinstance(value, str) and re.search("Tensor|Module|Linear|bool", kind) and "str" not in kind:
                raise UserError(f"{what}: {name} cannot be a word, got {value!r}")
            continue
        if item != kind and (isinstance(value, str) or not isinstance(value, Sequence)):
            raise UserError(f"{what}: {name} must be a list, each {_WORDS[item]}, got {value!r}")
        for one in value if item != kind else [value]:
            if not isinstance(one, _KINDS[item]) or (isinstance(one, bool) and item != "bool"):
                raise UserError(f"{what}: {name} must be {_WORDS[item]}, got {one!r}")
            if item in ("float", "int"):
                check_range(what, name, one, ranges.get(name, FINITE))


def check_range(what: str, name: str, value: Any, allowed: Range) -> None:
    """Raise UserError for a number, or an item of a list of numbers, that is not allowed. Other values pass."""
    for one in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(one, Real) and one not in allowed:
            raise UserError(f"{what}: {name} must be {allowed}, got {one}")
