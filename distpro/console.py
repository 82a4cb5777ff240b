"""What a person reads while a command runs: tables and messages, on a terminal or in a log file."""

from __future__ import annotations

import logging
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from rich import box, get_console
from rich.console import Console
from rich.table import Table
from rich.text import Text

import pathways

LOG = logging.getLogger("distpro")
LOG.propagate = False  # it is printed already
LOG.setLevel(logging.INFO)
LOG.addHandler(logging.NullHandler())

LINE = 2000  # characters of a line of a message
LOG_WIDTH = 1000  # of a table in a log file, where lines may be long but should not be broken


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], width: int | None = None) -> None:
    """Print a table to stdout. Columns of numbers are aligned to the right; floats get four significant digits. ``width``: of
    the whole; default: the terminal's, in a log file as wide as it needs to be."""
    grid = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
    for n, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[n], (int, float)) for row in rows)
        grid.add_column(Text(column), justify="right" if numeric else "left", overflow="fold", no_wrap=n == 0)
    for row in rows:
        grid.add_row(*(Text(number_text(cell) if isinstance(cell, float) else str(cell)) for cell in row))
    console = get_console() if on_terminal() and width is None else Console(width=width or LOG_WIDTH)
    console.print(grid)


@contextmanager
def logged(path: Path, anew: bool) -> Iterator[None]:
    """Write what is said meanwhile to a file as well, a line with its time each: notes, warnings, evaluations, and the error that
    ends it. ``anew``: in place of what the file holds."""
    handler = logging.FileHandler(path, mode="w" if anew else "a", encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    LOG.addHandler(handler)
    try:
        yield
    except BaseException as error:
        LOG.error("%s", f"{type(error).__name__}: {error}".splitlines()[0])
        raise
    finally:
        LOG.removeHandler(handler)
        handler.close()


def note(message: str) -> None:
    """Print a line that a person should know of before the work begins."""
    LOG.info("%s", message)
    print(message, flush=True)


def warn(message: str) -> None:
    """Print ``distpro: note: <message>`` to stderr, in one of several processes: what may be meant so, and may not."""
    if os.environ.get("RANK", "0") == "0":
        LOG.warning("%s", message)
        print(f"distpro: note: {message}", file=sys.stderr, flush=True)


def fail(message: str) -> None:
    """Print ``distpro: <message>`` to stderr; long lines are cut, and what is no text (a terminal's commands) is escaped."""
    lines = [shortened(_printable(line), LINE) for line in message.split("\n")]
    print("distpro: " + "\n".join(lines), file=sys.stderr, flush=True)


class _Stream:
    """A stream that is written to for as long as somebody reads it: then, to nowhere."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._kept(lambda: self._stream.write(text)) or len(text)

    def flush(self) -> None:
        self._kept(self._stream.flush)

    def _kept(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            return None


@contextmanager
def unread_streams_ignored() -> Iterator[None]:
    """Inside, a reader of stdout or stderr that goes away (``| head``) does not end the program."""
    with redirect_stdout(_Stream(sys.stdout)), redirect_stderr(_Stream(sys.stderr)):  # type: ignore[type-var]
        yield


def shortened(text: str, most: int) -> str:
    """A text without its middle where it is longer than ``most``."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-(most // 2 - 5) :]}"


def _printable(line: str) -> str:
    line = re.sub(r"<([\w.]+) object at 0x[0-9a-f]+>", r"<\1>", line)  # which tells nobody anything
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in line)


def raised(error: BaseException) -> str:
    """An error of somebody's code in one line: its type, its message, and where in that code it was raised."""
    text = str(error)
    places = [(frame.filename, str(frame.lineno)) for frame in traceback.extract_tb(error.__traceback__)]
    if "\nOriginal Traceback" in text:  # of a worker process of a DataLoader, whose frames are in the message only
        places = re.findall(r'File "(.+?)", line (\d+)', text)
        text = text.strip().splitlines()[-1].partition(": ")[2]
    own = [place for place in places if is_own_code(place[0])] or places
    where = f" ({own[-1][0]}, line {own[-1][1]})" if own else ""
    return f"{type(error).__name__}: {' '.join(text.split())[:300]}{where}"


def is_own_code(file: str) -> bool:
    """Whether a file is neither distpro's, nor of an installed package or of Python."""
    path = Path(file)
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return not (installed or file.startswith("<") or any(path.is_relative_to(folder) for folder in _LIBRARIES))


_LIBRARIES = [Path(__file__).parent, Path(pathways.__file__).parent]
_LIBRARIES += [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]


def pip_install(extra: str) -> str:
    """How to install an extra, for who has the package and for who has a clone."""
    return f"pip install 'distpro[{extra}]' (in a clone: pip install -e '.[{extra}]')"


def on_terminal() -> bool:
    return sys.stdout.isatty() and not get_console().is_dumb_terminal


def number_text(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"
