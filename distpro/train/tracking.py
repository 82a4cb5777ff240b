"""The numbers of a run while it runs: JSON lines in the run's folder, and the same in TensorBoard."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distpro.files import naming, write_atomically
from pathways.registry import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"
Number = float | Tensor


class Tracker:
    """Writes ``metrics.jsonl`` and TensorBoard event files to a run's folder.

    Each line of ``metrics.jsonl`` is a JSON object with ``step``, ``epoch`` and values by tag. JSON has no NaN and no
    infinity: both are written as ``null``.

    Args:
        folder: of the run; made if absent.
        resume_step: the first step that will be run again; what was written for it and later steps is removed from
            ``metrics.jsonl`` and hidden in TensorBoard. ``None`` is a new run: everything of an older one in this
            folder goes.
        tensorboard: whether to write event files.

    Raises UserError if a ``metrics.jsonl`` that is already there is damaged elsewhere than in its last line.
    """

    def __init__(self, folder: str | Path, *, resume_step: int | None = None, tensorboard: bool = True):
        self.folder = Path(folder)
        first = resume_step or 0
        kept = [row for row in read_metrics(self.folder) if row["step"] < first]
        write_atomically("".join(map(_line, kept)), self.folder / METRICS)
        self._file = open(self.folder / METRICS, "a", encoding="utf-8", buffering=1)  # a line survives a crash
        self._writer = _summary_writer(self.folder, first) if tensorboard else None
        self._step = max((int(row["step"]) for row in kept), default=0)

    def scalars(self, values: Mapping[str, Number], step: int, epoch: float) -> None:
        """Record numbers by tag (``train/loss``, ``term/<key>``, ``lr``, ...) at a step. Tensors of one element are
        fetched together, one transfer per device."""
        numbers = _floats(values)
        self._step = step
        with naming(self.folder / METRICS):
            self._file.write(_line({"step": step, "epoch": epoch, **numbers}))
        if self._writer:
            for tag, value in numbers.items():
                self._writer.add_scalar(tag, value, step)

    def alpha_layout(self, keys: Sequence[str], levels: Tensor | Sequence[Sequence[int]]) -> None:
        """Overlay the tags ``alpha/<key>`` in TensorBoard's Custom Scalars: one chart per teacher level, and one for
        the terms without a level. ``levels`` is (N, 3); only its first column is read. Call it once per run."""
        charts: dict[str, list[Any]] = {}
        for key, level in zip(keys, torch.as_tensor(levels).tolist(), strict=True):
            title = f"teacher level {level[0]}" if level[0] else "terms without a level"
            # TensorBoard reads each tag of a layout as a regular expression that matches the beginning of a tag.
            charts.setdefault(title, ["Multiline", []])[1].append(f"{re.escape(f'alpha/{key}')}$")
        if self._writer:
            self._writer.add_custom_scalars({"alpha": dict(sorted(charts.items()))})

    def text(self, tag: str, markdown: str) -> None:
        """Show a text in TensorBoard."""
        if self._writer:
            self._writer.add_text(tag, markdown)

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """Show a picture in TensorBoard."""
        if self._writer:
            self._writer.add_figure(tag, figure, step)

    def images(self, tag: str, pictures: Tensor, step: int) -> None:
        """Pictures, uint8 (K, 3, H, W), for TensorBoard."""
        if self._writer is not None:
            self._writer.add_images(tag, pictures.cpu(), step)

    def hparams(self, flat_config: Mapping[str, Any], metrics: Mapping[str, Number]) -> None:
        """Enter the run with its settings and final metrics in TensorBoard's table of runs. The metrics get tags
        ``final/<name>``, apart from the curves of the same names. Values that are no number or string are shown as
        text."""
        if not self._writer:
            return
        from torch.utils.tensorboard.summary import hparams

        config = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in flat_config.items()}
        final = {f"final/{name}": value for name, value in _floats(metrics).items()}
        # SummaryWriter.add_hparams would open a second event file, and TensorBoard stops following the first one.
        file_writer: Any = self._writer.file_writer
        for summary in hparams(config, final):
            file_writer.add_summary(summary)
        for tag, value in final.items():
            self._writer.add_scalar(tag, value, self._step)

    def flush(self) -> None:
        """Hand everything that was recorded to the operating system, so that it outlives this process."""
        self._file.flush()
        if self._writer:
            self._writer.flush()

    def close(self) -> None:
        """Flush and close all files."""
        self._file.close()
        if self._writer:
            self._writer.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


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


def _summary_writer(folder: Path, first_step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

    return SummaryWriter(str(folder), purge_step=first_step)


def _line(row: Mapping[str, float]) -> str:
    return json.dumps({name: value if math.isfinite(value) else None for name, value in row.items()}) + "\n"


def _floats(values: Mapping[str, Number]) -> dict[str, float]:
    """Plain numbers; a device is waited for once, not once per tensor."""
    tensors: dict[torch.device, dict[str, Tensor]] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            tensors.setdefault(value.device, {})[name] = value.detach().reshape(())
    fetched: dict[str, float] = {}
    for group in tensors.values():
        fetched |= zip(group, torch.stack(list(group.values())).tolist(), strict=True)
    return {name: float(fetched.get(name, value)) for name, value in values.items()}
