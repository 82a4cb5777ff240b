"""Promise 8: long and often: nothing grows, neither memory nor handles, threads, hooks or temporary files."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distpro
from distpro.train.trainer import Trainer
from torture.campaign import COMMON, TAUGHT, Campaign, fork, merged
from torture.subjects import prepare

SHORT = {"training": {"epochs": 1, "max_steps": 2}, "tracking": {"tensorboard": True}}
GROWTH = 24.0  # MB in the second half, over all: an allocator is never quite still


def attack(campaign: Campaign, most: int) -> None:
    """Many runs in one process, many steps in one run, many epochs of one step."""
    prepare(campaign.place)
    for case, _ in campaign.cases("long", min(most, len(LONG))):
        name, work = list(LONG.items())[case]
        child = fork(lambda w=work: _watched(w), limit=3600)
        try:
            facts = json.loads(child.said.splitlines()[-1])
        except (ValueError, IndexError):
            facts = {"grown": [child.said[-800:]]}
        campaign.end("long", case, name, child.status == 0 and not facts["grown"], **facts)


def _watched(work: Callable[[Callable[[], None]], None]) -> int:
    seen: list[dict[str, float]] = []
    folder = tempfile.mkdtemp(dir=".")
    tempfile.tempdir = folder
    work(lambda: seen.append(_now(folder)))
    middle, end = seen[len(seen) // 2], seen[-1]
    grown = [
        f"{key}: {middle[key]} to {end[key]}" for key in ("handles", "threads", "temporary") if end[key] > middle[key]
    ]
    if end["megabytes"] > middle["megabytes"] + GROWTH:
        grown.append(f"megabytes: {middle['megabytes']} to {end['megabytes']}")
    shutil.rmtree(folder)
    facts = {"count": len(seen), "grown": grown, "middle": middle, "end": end}
    sys.__stdout__.write("\n" + json.dumps(facts) + "\n")  # type: ignore[union-attr]
    return 0


def _now(folder: str) -> dict[str, float]:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "megabytes": round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1),
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "temporary": sum(1 for _ in Path(folder).rglob("*")),
    }


def _many_runs(look: Callable[[], None]) -> None:
    config = merged(merged(COMMON, TAUGHT), SHORT)
    for n in range(200):
        shutil.rmtree("often", ignore_errors=True)
        if n % 2:
            distpro.search(config, out="often")
        else:
            distpro.retrain(merged(config, {"retrain": {"weights": "constant"}}), out="often")
        look()


def _many_steps(look: Callable[[], None]) -> None:
    _look_at_steps(look, 50)
    config = {"training": {"epochs": 600}, "tracking": {"evaluate_every": 100, "checkpoint_every": 50}}
    shutil.rmtree("steps", ignore_errors=True)
    distpro.search(merged(merged(COMMON, TAUGHT), config), out="steps")


def _many_epochs(look: Callable[[], None]) -> None:
    _look_at_steps(look, 5)
    config = {"training": {"epochs": 500, "batch_size": 100, "drop_last": True}}
    shutil.rmtree("epochs", ignore_errors=True)
    distpro.train(merged(COMMON, config), out="epochs")


def _look_at_steps(look: Callable[[], None], every: int) -> None:
    original = Trainer.train_step

    def train_step(self: Trainer, *batches: Any) -> None:
        original(self, *batches)
        if self.step % every == 0:
            look()

    Trainer.train_step = train_step  # type: ignore[method-assign]


LONG: dict[str, Callable[[Callable[[], None]], None]] = {
    "200 runs in one process": _many_runs,
    "2,400 steps of a search": _many_steps,
    "500 epochs of one step": _many_epochs,
}
