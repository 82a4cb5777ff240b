"""The parts of the campaign, and how many cases each may have."""

from __future__ import annotations

from collections.abc import Callable

from torture import disk, fuzz, garbage, kill, lies, long, ranks, strangers
from torture.campaign import Campaign

PARTS: dict[str, tuple[Callable[[Campaign, int], None], int]] = {
    "kill": (kill.attack, 400),
    "tell": (kill.tell, 200),
    "damaged": (disk.damaged, 300),
    "disk": (disk.full, 150),
    "lock": (disk.lock, 40),
    "lies": (lies.attack, 130),
    "ranks": (ranks.attack, 100),
    "long": (long.attack, 4),
    "configs": (garbage.configs, 120),
    "fuzz": (fuzz.attack, 60),
    "strangers": (strangers.attack, 200),
    "files": (garbage.files, 60),
}
