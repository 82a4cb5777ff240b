"""Counter-based random numbers: every value is a pure function of a key and a counter, so there is no state to save.

The mixing function is SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014):
the number of counter n under key k is the n-th output of a generator seeded with k.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

BITS = 31  # of a drawn number; a product with another number below 2**31 still fits int64


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def make_key(*parts: int | str) -> int:
    """A signed 64-bit key from numbers and words, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def make_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by ``make_key(*parts)``."""
    return torch.Generator().manual_seed(make_key(*parts))


def _shift(value: Tensor, by: int) -> Tensor:
    """Logical right shift: ``>>`` on int64 copies the sign bit."""
    return (value >> by) & ((1 << (64 - by)) - 1)


def splitmix64(key: int, counter: Tensor) -> Tensor:
    """Hash of int64 ``counter``, any shape and device: all 64 bits as int64."""
    z = counter * _GAMMA + key  # int64 arithmetic wraps, as the algorithm wants
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def draw(key: int, counter: Tensor) -> Tensor:
    """Uniform int64 numbers in [0, 2**31) of ``counter``'s shape."""
    return _shift(splitmix64(key, counter), 64 - BITS)


def below(drawn: Tensor, bound: int) -> Tensor:
    """Drawn numbers as uniform integers in [0, bound), by multiply and shift."""
    return (drawn * bound) >> BITS


def chance(drawn: Tensor, probability: float) -> Tensor:
    """Drawn numbers as bool, true with the given probability."""
    return drawn < round(probability * (1 << BITS))


def fraction(drawn: int, low: float, high: float) -> float:
    """One drawn number as a float in [low, high)."""
    return low + (high - low) * drawn / (1 << BITS)
