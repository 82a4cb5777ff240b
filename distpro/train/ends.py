"""How a training ends before its time: asked to by a signal, or because a loss is no finite number any more."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from pathways.registry import UserError


class Interrupted(Exception):
    """The run was told to stop, and has written a checkpoint first."""

    def __init__(self, signal_number: int, step: int, total: int):
        super().__init__(f"stopped at step {step} of {total}; --resume goes on from here")
        self.signal_number = signal_number


class Diverged(UserError):
    """A loss is no finite number any more."""


def divergence(keys: Sequence[str], losses: Tensor, step: int) -> Diverged:
    """What to say of the steps up to ``step`` whose ``losses`` are (steps, 1 + terms), of the task and of the terms ``keys``."""
    row, column = (~losses.isfinite()).nonzero()[0].tolist()
    wrong = ["task", *keys][column]
    cure = "training.distill_weight" if wrong == "task" else "training.distill_weight, or leave that term out"
    return Diverged(
        f"training diverged: the {wrong} loss is {losses[row, column]:g} at step {step - len(losses) + row + 1} "
        f"(lower the learning rate, {cure}?)"
    )


@contextmanager
def signals_to(ask: Callable[[int], None]) -> Iterator[None]:
    """Inside, ``ask`` is called with the number of each SIGINT and SIGTERM. In another thread than the main one nothing is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        ask(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
