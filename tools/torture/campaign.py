"""What all attacks share: seeded cases, their results as JSON lines, and runs in processes that are forked from this one."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distpro.cli import main
from distpro.files import is_leftover, load_safely
from distpro.train.tracking import read_metrics

LIMIT = 120.0  # seconds of a child, after which it counts as hung

COMMON: dict[str, Any] = {
    "threads": 1,
    "device": "cpu",
    "precision": "float32",
    "data": {
        "name": "digits",
        "samples": 100,
        "params": {"image_size": 8},
        "augment": [{"crop": {"padding": 1}}, "flip"],
    },
    "student": {"model": "resnet8"},
    "training": {
        "epochs": 3,
        "batch_size": 20,
        "optimizer": {"lr": 0.05, "momentum": 0.9},
        "learning_rate": {"name": "cosine"},
    },
    "tracking": {"log_every": 1},
}
TAUGHT: dict[str, Any] = {
    "teacher": {"model": "resnet14", "checkpoint": "teacher.pt"},
    "pathways": {"connect": "same", "transforms": ["conv1x1"]},
    "terms": [{"loss": "kd"}],
}


@dataclass
class Child:
    """How a child ended: its exit status, minus n where signal n has ended it, None where it was still running after
    `LIMIT`; what it wrote to stdout and stderr; its seconds; the largest memory that it held, in MB."""

    status: int | None
    said: str
    seconds: float
    megabytes: float


def fork(work: Callable[[], int], meanwhile: Callable[[int], None] = lambda pid: None, limit: float = LIMIT) -> Child:
    """Run ``work`` in a child of this process, which must not have started any thread; ``meanwhile`` gets its number."""
    with tempfile.TemporaryFile("w+b") as said:
        sys.stdout.flush()
        sys.stderr.flush()
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                os.setpgrp()
                status = work()
            except SystemExit as error:
                status = error.code if isinstance(error.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(status)
        meanwhile(pid)
        status, usage = _wait(pid, start + limit)
        said.seek(0)
        text = said.read().decode(errors="replace")
        return Child(status, text, time.monotonic() - start, usage)


def _wait(pid: int, until: float) -> tuple[int | None, float]:
    while time.monotonic() < until:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss / 1024
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    _, _, usage = os.wait4(pid, 0)
    return None, usage.ru_maxrss / 1024


def import_all() -> None:
    """What the commands import when they run, once for all children."""
    import matplotlib.backends.backend_agg  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import optuna  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import sympy  # noqa: F401
    import tensorboard.backend.event_processing.event_accumulator  # noqa: F401
    import torch._decomp.decompositions_for_jvp  # noqa: F401
    import torch._dynamo  # noqa: F401
    import torch.distributed.fsdp  # noqa: F401
    import torchmetrics.detection.mean_ap  # noqa: F401
    import torchvision.models.detection  # noqa: F401
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    from transformers import PreTrainedTokenizerFast  # noqa: F401

    import distpro.report.plots  # noqa: F401
    import distpro.runs.commands  # noqa: F401

    assert threading.active_count() == 1


def command(*arguments: str, before: Callable[[], None] = lambda: None) -> Callable[[], int]:
    """A command line of distpro, to be forked; ``before`` is called first."""

    def work() -> int:
        before()
        return main(list(arguments))

    return work


# The same run?


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Where two nested states differ, bit for bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return [] if alike and one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes() else [path]
    if isinstance(one, (dict, list)) and isinstance(other, type(one)):
        if len(one) != len(other) or (isinstance(one, dict) and one.keys() != other.keys()):
            return [path]
        keys = one if isinstance(one, dict) else range(len(one))
        return [d for key in keys for d in differences(one[key], other[key], f"{path}.{key}")]
    return [] if one == other or (one != one and other != other) else [path]


def apart(run: Path, truth: Path) -> list[str]:
    """In what the files of two finished runs differ, but for times, dates and speeds."""
    found = [f"{name} is missing" for name in _names(truth) - _names(run)]
    found += [f"{name} is left over" for name in _names(run) - _names(truth)]
    for name in sorted(_names(truth) & _names(run)):
        ours, theirs = _content(run / name), _content(truth / name)
        found += [f"{name}{where}" for where in differences(ours, theirs)[:3]]
    return found


def _names(folder: Path) -> set[str]:
    kept = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    timed = ("events.out", "environment.json", "log.txt", ".previous.pt", "trials.journal", ".png", "leaderboard.md")
    kept = {name for name in kept if not any(word in name for word in timed)}
    if (folder / "trials.journal").exists():  # several processes may write there: temporary files stay for an hour
        kept = {name for name in kept if not is_leftover(name.rsplit("/", 1)[-1])}
    return kept | ({"tensorboard"} if list(folder.glob("events.out*")) else set())


def _content(path: Path) -> Any:
    if path.name == "tensorboard":
        return curves(path.parent)
    if path.name == "metrics.jsonl":
        return [{k: v for k, v in row.items() if "per_second" not in k} for row in read_metrics(path.parent)]
    if path.suffix == ".pt":
        return _untimed(load_safely(path))
    if path.suffix == ".json":
        return _untimed(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [_untimed(json.loads(line)) for line in path.read_text().splitlines()]
    return path.read_text().replace(str(path.parent.resolve()), "HERE")


def _untimed(content: Any) -> Any:
    if isinstance(content, dict):
        return {
            k: _untimed(v) for k, v in content.items() if k not in ("seconds", "created", "search_seconds", "revision")
        }
    return [_untimed(v) for v in content] if isinstance(content, list) else content


def curves(folder: Path) -> dict[str, Any]:
    """TensorBoard's scalars as it shows them: values by tag and step, of all event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=True)
    read.Reload()
    tags = [tag for tag in read.Tags()["scalars"] if "per_second" not in tag and "seconds" not in tag]
    return {tag: {event.step: event.value for event in read.Scalars(tag)} for tag in tags}


# The campaign


@dataclass
class Campaign:
    """Cases of a part, from a seed: each has a number, is tried once, and leaves a row.

    Args:
        results: the file of rows; cases that it holds are not tried again.
        until: `time.monotonic` after which no new case is begun.
        place: where the runs are.
        only: the one case that is tried, also where there is a row of it.
    """

    results: Path
    seed: int
    until: float
    place: Path
    only: int | None = None
    done: set[tuple[str, int, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        for row in rows(self.results):
            self.done.add((row["part"], row["seed"], row["case"]))

    def cases(self, part: str, most: int) -> Iterator[tuple[int, random.Random]]:
        """Numbers and draws of the cases that are left, as long as there is time."""
        for case in range(most):
            if time.monotonic() > self.until:
                return
            if case == self.only or (self.only is None and (part, self.seed, case) not in self.done):
                yield case, random.Random(f"{part} {self.seed} {case}")

    def end(self, part: str, case: int, attack: str, ok: bool, **facts: Any) -> None:
        """Write a case's row: what was done, and whether the promise held. ``count``: of attacks in it, default 1."""
        row = {"part": part, "seed": self.seed, "case": case, "attack": attack, "ok": ok, **facts}
        with open(self.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if not ok:
            print(f"{part} {case}: {attack}: {facts}", flush=True)


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of results; one that was cut off is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    from distpro.config.reading import merge

    return merge(copy.deepcopy(dict(below)), copy.deepcopy(dict(above)))
