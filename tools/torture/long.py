"""Promise 8: long and often: nothing grows, neither memory nor handles, threads, hooks or temporary files."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules import module

import distpro
from distpro.train.trainer import Trainer
from torture.campaign import COMMON, TAUGHT, Campaign, Child, apart, command, fork, merged
from torture.subjects import SUBJECTS, arguments, prepare

SHORT = {"training": {"epochs": 1, "max_steps": 2}, "tracking": {"tensorboard": True}}
GROWING = ("handles", "threads", "temporary", "hooks", "modules")
SIDE_BY_SIDE = 50
GROWTH = 24.0  # MB in the second half, over all: an allocator is never quite still


def attack(campaign: Campaign, most: int) -> None:
    """Many runs in one process, many steps in one run, many epochs of one step, many runs side by side."""
    prepare(campaign.place)
    for case, _ in campaign.cases("long", min(most, len(LONG))):
        name, work = list(LONG.items())[case]
        if work is None:
            campaign.end("long", case, name, **_side_by_side())
            continue
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
    grown = [f"{key}: {middle[key]} to {end[key]}" for key in GROWING if end[key] > middle[key]]
    if end["megabytes"] > middle["megabytes"] + GROWTH:
        grown.append(f"megabytes: {middle['megabytes']} to {end['megabytes']}")
    shutil.rmtree(folder)
    facts = {"looks": len(seen), "grown": grown, "middle": middle, "end": end}
    sys.__stdout__.write("\n" + json.dumps(facts) + "\n")  # type: ignore[union-attr]
    return 0


def _now(folder: str) -> dict[str, float]:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "megabytes": round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1),
        "handles": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "hooks": sum(
            len(value) for name, value in vars(module).items() if name.startswith("_global_") and "hooks" in name
        ),
        "modules": sum(isinstance(each, torch.nn.Module) for each in gc.get_objects()),
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
        if n % 10 == 9:
            look()


def _many_steps(look: Callable[[], None]) -> None:
    _look_at_steps(look, 500)
    tracking = {"log_every": 50, "evaluate_every": 250, "checkpoint_every": 250}
    config = merged(SUBJECTS["search by two processes"].config, {"training": {"epochs": 2500}, "tracking": tracking})
    shutil.rmtree("steps", ignore_errors=True)
    distpro.search(config, out="steps")


def _many_epochs(look: Callable[[], None]) -> None:
    _look_at_steps(look, 25)
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


def _side_by_side() -> dict[str, Any]:
    """The same search in many folders at once: all end, and with the same bytes."""
    name, folders = "search over a horizon", [f"side_{n}" for n in range(SIDE_BY_SIDE)]
    children: list[Child] = []
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)

    def start(n: int) -> None:
        if n < len(folders):
            work = command(*arguments(name, folders[n]))
            children.append(fork(work, lambda pid: start(n + 1), limit=3600))

    start(0)
    ended = all(child.status == 0 for child in children)
    different = [d for folder in folders for d in apart(Path(folder), Path(folders[0]))] if ended else ["not all ended"]
    left = [path.name for path in Path().glob("side_*/.*")]
    facts = {"different": different[:5], "left": left, "statuses": sorted({str(child.status) for child in children})}
    return {"ok": not different and not left, "count": len(folders), **facts}


LONG: dict[str, Callable[[Callable[[], None]], None] | None] = {
    "200 runs in one process": _many_runs,
    "10,000 steps of a search": _many_steps,
    "500 epochs of one step": _many_epochs,
    f"{SIDE_BY_SIDE} searches side by side": None,
}
