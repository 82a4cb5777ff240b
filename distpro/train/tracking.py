"""The numbers of a run while it runs: JSON lines in the run's folder, and the same in TensorBoard and other sinks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distpro.files import naming, write_atomically
from distpro.train.sinks import SINKS, Sink, floats
from distpro.train.stopping import Interrupted
from pathways.registry import UserError
from pathways.space import Spec, parse_spec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = "metrics.jsonl"
Number = float | Tensor


class Tracker:
    """Writes ``metrics.jsonl`` to a run's folder, and tells TensorBoard and other sinks (`distpro.train.sinks`).

    Each line of ``metrics.jsonl`` is a JSON object with ``step``, ``epoch`` and values by tag. JSON has no NaN and no
    infinity: both are written as ``null``.

    Args:
        folder: of the run; made if absent.
        resume_step: the first step that will be run again; what was written for it and later steps is removed from
            ``metrics.jsonl`` and hidden in TensorBoard. ``None`` is a new run: everything of an older one in this
            folder goes.
        resume_rows: rows of ``metrics.jsonl`` that are kept at most: a run that was killed behind an evaluation may have
            written a row of the step before ``resume_step`` that it writes again. None: no limit.
        tensorboard: whether to write event files.
        sinks: others, by name, or {name: parameters}.

    Attributes:
        rows: that ``metrics.jsonl`` has.

    Raises UserError if a ``metrics.jsonl`` that is already there is damaged elsewhere than in its last line.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        resume_step: int | None = None,
        resume_rows: int | None = None,
        tensorboard: bool = True,
        sinks: Sequence[Spec] = (),
    ):
        self.folder = Path(folder)
        first = resume_step or 0
        kept = [row for row in read_metrics(self.folder) if row["step"] < first][:resume_rows]
        self.rows = len(kept)
        write_atomically("".join(map(_line, kept)), self.folder / METRICS)
        self._file = open(self.folder / METRICS, "a", encoding="utf-8", buffering=1)  # a line survives a crash
        specs = [parse_spec(spec, "tracking.sinks") for spec in (*(["tensorboard"] if tensorboard else []), *sinks)]
        self._sinks: list[Sink] = []
        try:
            for name, params in dict(specs).items():
                self._sinks.append(SINKS.build(name, folder=self.folder, first_step=first, **params))
        except BaseException:
            self.close(failed=True)
            raise
        self._step = max((int(row["step"]) for row in kept), default=0)

    def scalars(self, values: Mapping[str, Number], step: int, epoch: float) -> None:
        """Record numbers by tag (``train/loss``, ``term/<key>``, ``lr``, ...) at a step. Tensors of one element are
        fetched together, one transfer per device."""
        numbers = floats(values)
        self._step = step
        with naming(self.folder / METRICS):
            self._file.write(_line({"step": step, "epoch": epoch, **numbers}))
        self.rows += 1
        for sink in self._sinks:
            sink.scalars(numbers, step)

    def alpha_layout(self, keys: Sequence[str], levels: Tensor | Sequence[Sequence[int]]) -> None:
        """Overlay the tags ``alpha/<key>`` in TensorBoard's Custom Scalars: one chart per teacher level, and one for
        the terms without a level. ``levels`` is (N, 3); only its first column is read. Call it once per run."""
        charts: dict[str, list[str]] = {}
        for key, level in zip(keys, torch.as_tensor(levels).tolist(), strict=True):
            title = f"teacher level {level[0]}" if level[0] else "terms without a level"
            charts.setdefault(title, []).append(f"alpha/{key}")
        for sink in self._sinks:
            sink.alpha_layout(dict(sorted(charts.items())))

    def text(self, tag: str, markdown: str) -> None:
        """Show a text."""
        for sink in self._sinks:
            sink.text(tag, markdown)

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """Show a picture."""
        for sink in self._sinks:
            sink.figure(tag, figure, step)

    def images(self, tag: str, pictures: Tensor, step: int) -> None:
        """Show pictures, uint8 (K, 3, H, W)."""
        for sink in self._sinks:
            sink.images(tag, pictures, step)

    def summary(self, settings: Mapping[str, Any], metrics: Mapping[str, Number]) -> None:
        """Enter the run with settings and final metrics in the sinks' tables of runs. Values that are no number or string are
        shown as text."""
        plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in settings.items()}
        for sink in self._sinks:
            sink.summary(plain, floats(metrics), self._step)

    def flush(self) -> None:
        """Hand everything that was recorded to the operating system, so that it outlives this process."""
        self._file.flush()
        for sink in self._sinks:
            sink.flush()

    def close(self, failed: bool = False) -> None:
        """Flush and close all files and sinks. ``failed``: after an error, which a signal to stop is not."""
        self._file.close()
        for sink in self._sinks:
            sink.close(failed)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close(failed=kind is not None and not issubclass(kind, Interrupted))


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """The rows of a run's ``metrics.jsonl``, in the order they were written; ``null`` is read as NaN. No file is no
    rows. A last line that was cut off is left out; any other damage raises UserError."""
    path = Path(folder) / METRICS
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise UserError(f"{path}: line {number} is damaged; remove it to go on") from None
        rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows


def _line(row: Mapping[str, float]) -> str:
    return json.dumps({name: value if math.isfinite(value) else None for name, value in row.items()}) + "\n"
