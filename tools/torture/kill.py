"""Promise 1: killed anywhere, a run goes on to the same bytes. Told to stop, it writes a checkpoint first."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from distpro import files
from distpro.train.trainer import Trainer
from torture.campaign import COMMON, TAUGHT, Campaign, Child, apart, command, fork, merged

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "train": ("train", {}),
    "search": ("search", TAUGHT),
    "search over a horizon": ("search", merged(TAUGHT, {"search": {"horizon": 6, "trials": 0}})),
    "search with trials": (
        "search",
        merged(TAUGHT, {"search": {"horizon": "whole", "trials": 6}, "training": {"epochs": 1}}),
    ),
    "retrain": ("retrain", {**TAUGHT, "retrain": {"schedule": "alpha.pt"}}),
    "stages": (
        "retrain",
        {
            **TAUGHT,
            "retrain": {"weights": "constant"},
            "stages": [{"name": "one", "training": {"epochs": 1}}, {"name": "two", "training": {"epochs": 1}}],
        },
    ),
    "tune": (
        "tune",
        merged(
            TAUGHT,
            {
                "training": {"epochs": 1},
                "tune": {"families": ["single"], "methods": ["kd", "at"], "trials": 3, "pruner": "none"},
            },
        ),
    ),
}
MOMENTS = ("open", "fsync", "replace", "link", "unlink", "step", "evaluation")


def prepare(place: Path) -> None:
    """A teacher and a schedule for the runs."""
    (place / "teacher.yaml").write_text(yaml.safe_dump(merged(COMMON, {"student": {"model": "resnet14"}})))
    (place / "search.yaml").write_text(yaml.safe_dump(merged(COMMON, TAUGHT)))
    os.chdir(place)
    for made in place.parent.glob("*/alpha.pt"):  # by another part
        if (made.parent / "teacher.pt").exists() and (made.parent / "teacher.yaml").exists():
            for name in ("teacher.pt", "alpha.pt"):
                if not (place / name).exists():
                    shutil.copy(made.parent / name, name)
    if not (place / "teacher.pt").exists():
        assert fork(command("train", "teacher.yaml", "--out", "teacher")).status == 0
        shutil.copy("teacher/student.pt", "teacher.pt")
        assert fork(command("search", "search.yaml", "--out", "searched")).status == 0
        shutil.copy("searched/alpha.pt", "alpha.pt")


def attack(campaign: Campaign, most: int) -> None:
    """Kill runs at random moments, often several times each, go on, and compare."""
    prepare(campaign.place)
    for case, draw in campaign.cases("kill", most):
        name = list(RUNS)[case % len(RUNS)]
        seconds = whole(name)
        truth, out = folder_of(name), f"{folder_of(name)}_cut"
        shutil.rmtree(out, ignore_errors=True)
        log, kills = [], 0
        said = ""
        for attempt in range(draw.choice((1, 1, 2, 4))):
            how, child = _once(name, out, draw, seconds)
            log.append(f"{how}: {child.status}")
            said = child.said
            kills += child.status == -signal.SIGKILL
            if child.status not in (0, -signal.SIGKILL) or _wrong_end(how, child):
                break
            del attempt
        last = fork(command(*arguments(name, out)))
        different = apart(Path(out), Path(truth)) if last.status == 0 else [last.said[-600:]]
        bad = last.status != 0 or bool(different)
        campaign.end("kill", case, name, not bad, log=log, count=len(log), kills=kills, different=different[:5])
        if bad:
            keep = Path(f"{out}_{campaign.seed}_{case}")
            shutil.rmtree(keep, ignore_errors=True)
            shutil.copytree(out, keep) if Path(out).exists() else keep.mkdir()
            (keep / "said.txt").write_text(said + last.said)


def tell(campaign: Campaign, most: int) -> None:
    """Tell runs to stop, by SIGTERM, SIGINT or SIGUSR1, at random moments: the status names the signal, the checkpoint is of the
    step that was running, and the run goes on to the same bytes. A second signal ends it at once."""
    prepare(campaign.place)
    names = ["train", "search", "search over a horizon", "retrain", "stages"]
    for case, draw in campaign.cases("tell", most):
        name, number = names[case % len(names)], draw.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
        whole(name)
        truth, out, twice = folder_of(name), f"{folder_of(name)}_told", draw.random() < 0.2
        shutil.rmtree(out, ignore_errors=True)
        at, where = draw.randrange(1, 14), draw.choice(("step", "evaluation"))
        child = fork(
            command(*arguments(name, out), before=lambda a=at, w=where, n=number, t=twice: _signal_at(w, a, n, t))
        )
        steps = [line for line in child.said.splitlines() if line.startswith("distpro: stopped")]
        told = child.status == (130 if twice else 128 + number) and len(steps) == 1
        finished = child.status == 0
        different: list[str] = []
        if told or finished:
            last = fork(command(*arguments(name, out)))
            different = apart(Path(out), Path(truth)) if last.status == 0 else [last.said[-600:]]
        ok = (told or finished) and not different
        facts = {"status": child.status, "said": steps[:1] if ok else child.said[-800:], "different": different[:5]}
        campaign.end("tell", case, f"{signal.Signals(number).name} in {name}{', twice' if twice else ''}", ok, **facts)


def _once(name: str, out: str, draw: random.Random, whole: float) -> tuple[str, Child]:
    if draw.random() < 0.4:
        after = draw.uniform(0, whole * 1.1)
        return f"after {after:.2f} s", fork(command(*arguments(name, out)), lambda pid: _kill_after(pid, after))
    moment, at = draw.choice(MOMENTS), draw.choice((1, 2, 3, draw.randrange(4, 40)))
    half = draw.random() < 0.5
    hook = lambda: _kill_at(moment, at, half)  # noqa: E731
    return f"{'before' if half else 'after'} {moment} {at}", fork(command(*arguments(name, out), before=hook))


def _wrong_end(how: str, child: Child) -> bool:
    return child.status is None


def arguments(name: str, out: str) -> list[str]:
    kind, changes = RUNS[name]
    path = Path(f"{folder_of(name)}.yaml")
    if not path.exists():
        path.write_text(yaml.safe_dump(merged(COMMON, changes)))
    begun = (Path(out) / "config.yaml").is_file()
    return [kind, str(path), "--out", out, *(["--resume"] if begun else [])]


def folder_of(name: str) -> str:
    return name.replace(" ", "_")


WHOLE: dict[str, float] = {}


def whole(name: str) -> float:
    """Seconds of the run that nobody interrupts, made once in this folder."""
    key = str(Path(folder_of(name)).resolve())
    if key not in WHOLE:
        shutil.rmtree(key, ignore_errors=True)
        child = fork(command(*arguments(name, folder_of(name))))
        assert child.status == 0, child.said
        WHOLE[key] = child.seconds
    return WHOLE[key]


def _kill_after(pid: int, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)


def _signal_at(where: str, at: int, number: int, twice: bool) -> None:
    def act() -> None:
        os.kill(os.getpid(), number)
        if twice:
            os.kill(os.getpid(), number)

    _hook(where, at, act, before=True)


def _kill_at(moment: str, at: int, before: bool) -> None:
    _hook(moment, at, lambda: os.kill(os.getpid(), signal.SIGKILL), before)


def _hook(moment: str, at: int, act: Callable[[], None], before: bool) -> None:
    """Let this process act at the n-th such moment: before it, or after it."""
    owner, name = {
        "step": (Trainer, "train_step"),
        "evaluation": (Trainer, "test"),
        "open": (files, "open"),
    }.get(moment, (os, moment))
    original = open if moment == "open" else getattr(owner, name)
    count = 0

    def hooked(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == at and before:
            act()
        result = original(*args, **kwargs)
        if count == at and not before:
            act()
        return result

    setattr(owner, name, hooked)
