"""The parts of the campaign, and how many cases each may have."""

from __future__ import annotations

from collections.abc import Callable

from torture import kill
from torture.campaign import Campaign

PARTS: dict[str, tuple[Callable[[Campaign, int], None], int]] = {
    "kill": (kill.attack, 400),
    "tell": (kill.tell, 200),
}
