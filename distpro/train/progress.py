"""How far a long piece of work has come: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

from time import monotonic
from typing import Any

from rich import get_console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from distpro.console import LOG, number_text, on_terminal

LOG_SECONDS = 10.0  # between two lines in a log file


BAR_SECONDS = 0.2  # between two looks at the values on a terminal


class Progress:
    """How far a loop is and how long it will still take: a bar on a terminal, a plain line every ten seconds elsewhere.

    >>> with Progress(total=1000, what="search") as progress:
    ...     progress.update(1000, loss=0.25)
    search  100%  1000/1000 steps  elapsed 0:00:00  left 0:00:00  loss 0.25

    Args:
        total: number of units, also those that were done before a resumed run began.
        what: name of the loop.
        unit: what is counted, in the singular.
    """

    def __init__(self, total: int, what: str, unit: str = "step"):
        self.total, self.what, self.unit = total, what, unit
        self._done = 0
        self._values: dict[str, Any] = {}
        self._shown: int | None = None
        self._start = self._last = monotonic()
        self._first: tuple[int, float] | None = None
        self._bar = _bar() if on_terminal() else None

    def __enter__(self) -> Progress:
        if self._bar:
            self._task = self._bar.add_task(self.what, total=self.total, tail="")
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._shown != self._done:
            self._show()
        if self._bar:
            self._bar.stop()

    def update(self, done: int, **values: Any) -> None:
        """Say that ``done`` of ``total`` units are done. Numbers are shown beside it until others of the same names
        come (tensors of one element are read only when they are shown). Cheap enough for every step."""
        now = monotonic()
        self._done = done
        self._values |= values
        # The first unit often pays for compilation, and a resumed run starts in the middle: speed counts from here.
        self._first = self._first or (done, now)
        if now - self._last >= (BAR_SECONDS if self._bar else LOG_SECONDS):
            self._last = now
            self._show()

    def message(self, text: str) -> None:
        """Print a line that stays."""
        LOG.info("%s", text)
        if self._bar:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def _show(self) -> None:
        self._shown = self._done
        left = self._seconds_left()
        count = f"{self._done}/{self.total} {self.unit}s"
        values = "".join(f"  {_name(k)} {number_text(float(v))}" for k, v in self._values.items())
        tail = f"left {'?' if left is None else _clock(left)}{values}"
        if self._bar:
            self._bar.update(self._task, completed=self._done, tail=f"{count}  {tail}")
            return
        percent = 100 * self._done // max(self.total, 1)
        elapsed = _clock(monotonic() - self._start)
        print(f"{self.what}  {percent:3d}%  {count}  elapsed {elapsed}  {tail}", flush=True)

    def _seconds_left(self) -> float | None:
        if self._done >= self.total:
            return 0.0
        first_done, first_time = self._first or (0, self._start)
        if self._done <= first_done:
            return None
        return (monotonic() - first_time) / (self._done - first_done) * (self.total - self._done)


def _bar() -> Bar:
    return Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[tail]}", markup=False),
        console=get_console(),
    )


def _name(name: str) -> str:
    return name.replace("_per_second", "/s").replace("_", " ")


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds, as in 12:05:09."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
