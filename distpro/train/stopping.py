"""How a running training is told to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = [signal.SIGINT, signal.SIGTERM]
SIGNALS += [signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []  # what SLURM is asked to send before a job's end


class Interrupted(Exception):
    """The run was told to stop, and has written a checkpoint first."""

    def __init__(self, signal_number: int, step: int, total: int, begun: int | None = None):
        here = "here" if begun is None else f"step {begun}, where its horizon began"
        super().__init__(f"stopped at step {step} of {total}; --resume goes on from {here}")
        self.signal_number = signal_number


class Cut(Exception):
    """An evaluation was left because the run was told to stop."""


class Stop:
    """The signal that this process has been told to stop by, if any: it is up to the loop when."""

    number: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT, SIGTERM and SIGUSR1 down; a second one raises KeyboardInterrupt at once. Only of the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: object) -> None:
            if self.number is not None:
                raise KeyboardInterrupt
            self.number = number

        before = {number: signal.signal(number, ask) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
