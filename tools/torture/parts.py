"""The parts of the campaign, and how many cases each may have."""

from __future__ import annotations

from collections.abc import Callable

from torture import garbage, kill
from torture.campaign import Campaign

PARTS: dict[str, tuple[Callable[[Campaign, int], None], int]] = {
    "kill": (kill.attack, 400),
    "tell": (kill.tell, 200),
    "configs": (garbage.configs, 120),
    "files": (garbage.files, 60),
}
