"""Promise 1: killed anywhere, a run goes on to the same bytes. Told to stop, it writes a checkpoint first."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from distpro import files
from distpro.search.estimators.replay import Replay
from distpro.search.estimators.sweep import Sweep
from distpro.train.trainer import Trainer
from torture.campaign import Campaign, Child, apart, command, fork
from torture.ranks import together
from torture.subjects import SUBJECTS, arguments, folder_of, prepare

MOMENTS: dict[str, tuple[Any, str]] = {
    "open": (files, "open"),
    "fsync": (os, "fsync"),
    "replace": (os, "replace"),
    "link": (os, "link"),
    "unlink": (os, "unlink"),
    "step": (Trainer, "train_step"),
    "evaluation": (Trainer, "test"),
    "step back": (Sweep, "_back"),
    "stretch again": (Replay, "fill"),
    "checkpoint": (Trainer, "save"),
}
"""Functions before and after which a run is killed."""


def attack(campaign: Campaign, most: int) -> None:
    """Kill runs at random moments, often several times each, go on, and compare."""
    prepare(campaign.place)
    for case, draw in campaign.cases("kill", most):
        name = list(SUBJECTS)[case % len(SUBJECTS)]
        whole(name)
        truth, out = folder_of(name), f"{folder_of(name)}_cut"
        shutil.rmtree(out, ignore_errors=True)
        log, kills, said = [], 0, ""
        for _ in range(draw.choice((1, 1, 2, 4))):
            how, children = _once(name, out, draw)
            statuses = [child.status for child in children]
            killed = -signal.SIGKILL in statuses
            log.append(f"{how}: {statuses}")
            said = "".join(child.said for child in children)
            kills += killed
            if None in statuses or not killed:  # it has come to its end
                break
        last = _started(name, out)
        ended = not any(child.status for child in last)
        different = apart(Path(out), Path(truth)) if ended else ["".join(child.said for child in last)[-600:]]
        campaign.end("kill", case, name, not different, log=log, count=len(log), kills=kills, different=different[:5])
        if different:
            keep = Path(f"{out}_{campaign.seed}_{case}")
            shutil.rmtree(keep, ignore_errors=True)
            shutil.copytree(out, keep) if Path(out).exists() else keep.mkdir()
            (keep / "said.txt").write_text(said + "".join(child.said for child in last))


def tell(campaign: Campaign, most: int) -> None:
    """Tell runs to stop, by SIGTERM, SIGINT or SIGUSR1, at random moments: the status names the signal, the checkpoint is of the
    step that was running, and the run goes on to the same bytes. A second signal ends it at once."""
    prepare(campaign.place)
    names = [name for name, subject in SUBJECTS.items() if subject.processes == 1]
    for case, draw in campaign.cases("tell", most):
        name, number = names[case % len(names)], draw.choice((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))
        truth, out, twice = folder_of(name), f"{folder_of(name)}_told", draw.random() < 0.2
        shutil.rmtree(out, ignore_errors=True)
        where = draw.choice(("step", "evaluation"))
        at = draw.randrange(whole(name)[1][0][where]) + 1
        (child,) = _started(name, out, lambda a=at, w=where, n=number, t=twice: _signal_at(w, a, n, t))
        steps = [line for line in child.said.splitlines() if line.startswith("distpro: stopped")]
        told = child.status == (130 if twice else 128 + number) and len(steps) == 1
        finished = child.status == 0
        different: list[str] = []
        if told or finished:
            (last,) = _started(name, out)
            different = apart(Path(out), Path(truth)) if last.status == 0 else [last.said[-600:]]
        ok = (told or finished) and not different
        facts = {"status": child.status, "said": steps[:1] if ok else child.said[-800:], "different": different[:5]}
        campaign.end("tell", case, f"{signal.Signals(number).name} in {name}{', twice' if twice else ''}", ok, **facts)


def _once(name: str, out: str, draw: random.Random) -> tuple[str, list[Child]]:
    """A run that is killed: one of its processes, or by time sometimes all."""
    seconds, counts = whole(name)
    rank = draw.randrange(len(counts))
    if draw.random() < 0.3:
        after, victims = draw.uniform(0, seconds), draw.choice((slice(None), slice(rank, rank + 1)))
        children = _started(name, out, meanwhile=lambda pids: _kill_after(pids, pids[victims], after))
        return f"after {after:.2f} s", children
    moment = draw.choice(sorted(counts[rank]))
    at, before = draw.randrange(counts[rank][moment]) + 1, draw.random() < 0.5
    children = _started(name, out, lambda: _kill_at(moment, at, before), rank=rank)
    return f"{'before' if before else 'after'} {moment} {at}{f' of rank {rank}' if len(counts) > 1 else ''}", children


def _started(
    name: str,
    out: str,
    before: Callable[[], None] = lambda: None,
    meanwhile: Callable[[Sequence[int]], None] = lambda pids: None,
    rank: int = 0,
) -> list[Child]:
    """A run until its end, going on where there is one; ``before`` is called in the process of a rank first."""

    def begin(own: bool) -> None:
        SummaryWriter.add_figure = lambda *_, **__: None  # a third of a search's time, for nothing that is compared
        if own:
            before()

    if SUBJECTS[name].processes == 1:
        return [fork(command(*arguments(name, out), before=lambda: begin(True)), lambda pid: meanwhile([pid]))]
    return together(name, out, [lambda n=n: begin(n == rank) for n in range(2)], meanwhile, patience=60)


WHOLE: dict[str, tuple[float, list[Counter[str]]]] = {}


def whole(name: str) -> tuple[float, list[Counter[str]]]:
    """Seconds of the run that nobody interrupts, made once in this folder, and how often it comes to each of the moments, by
    process."""
    key = str(Path(folder_of(name)).resolve())
    if key not in WHOLE:
        shutil.rmtree(key, ignore_errors=True)
        counts = []
        for rank in range(SUBJECTS[name].processes):  # a run counts one of its processes
            shutil.rmtree(key, ignore_errors=True)
            seen = Path(f"{key}.moments")
            seen.write_text("")
            children = _started(name, folder_of(name), lambda s=seen: _note_moments(s), rank=rank)
            assert not any(child.status for child in children), children
            counts.append(Counter(seen.read_text().splitlines()))
        WHOLE[key] = children[0].seconds, counts
    return WHOLE[key]


def _note_moments(file: Path) -> None:
    def note(moment: str) -> None:
        with open(file, "a", encoding="utf-8") as lines:
            lines.write(f"{moment}\n")

    for moment in MOMENTS:
        _hook(moment, lambda count, before, m=moment: note(m) if before else None)


def _kill_after(pids: Sequence[int], victims: Sequence[int], seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if all(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None for pid in pids):
            return
        time.sleep(0.002)
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _signal_at(where: str, at: int, number: int, twice: bool) -> None:
    def act(count: int, before: bool) -> None:
        if count == at and before:
            os.kill(os.getpid(), number)
            if twice:
                os.kill(os.getpid(), number)

    _hook(where, act)


def _kill_at(moment: str, at: int, before: bool) -> None:
    _hook(moment, lambda count, b: os.kill(os.getpid(), signal.SIGKILL) if (count, b) == (at, before) else None)


def _hook(moment: str, act: Callable[[int, bool], None]) -> None:
    """Let this process act before (True) and after (False) the n-th such moment."""
    owner, name = MOMENTS[moment]
    original = getattr(owner, name, open)
    count = 0

    def hooked(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        n = count
        act(n, True)
        result = original(*args, **kwargs)
        act(n, False)
        return result

    setattr(owner, name, hooked)
