"""Promise 7: a process that dies, hangs or fails ends all of them in bounded time, with the first cause; another number of
processes goes on."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from distpro.train.trainer import Trainer
from torture.campaign import Campaign, Child, command, fork
from torture.subjects import arguments, prepare

PATIENCE = 8  # seconds, in place of the minutes that a rank waits for the others
BOUND = 90.0  # seconds from the first fault to the last end


def attack(campaign: Campaign, most: int) -> None:
    """Two processes that train together, one of which is killed, stalls or raises at a random step."""
    prepare(campaign.place)
    for case, draw in campaign.cases("ranks", most):
        name = draw.choice(("search", "retrain", "train"))
        out, rank, step = "ranks", draw.randrange(2), draw.randrange(0, 11)
        how = draw.choice(("SIGKILL", "stall", "exception", "SIGTERM"))
        shutil.rmtree(out, ignore_errors=True)
        start = time.monotonic()
        faults: list[Callable[[], None]] = [lambda: None, lambda: None]
        faults[rank] = lambda h=how, s=step: _fault(h, s)  # type: ignore[misc]
        children = together(name, out, faults)
        statuses, said = [child.status for child in children], "".join(child.said for child in children)
        seconds = time.monotonic() - start
        traces = said.count("Traceback")
        named = how != "exception" or "the fault of one rank" in said
        ended = None not in statuses and any(statuses) and seconds < BOUND
        again = fork(command(*arguments(name, out)))
        ok = ended and named and not traces and again.status == 0
        facts = {"statuses": statuses, "seconds": round(seconds, 1), "again": again.status}
        campaign.end(
            "ranks",
            case,
            f"{how} of rank {rank} in {name}",
            ok,
            said=said[-900:] + ("" if ok else again.said[-300:]),
            **facts,
        )


def together(
    name: str,
    out: str,
    before: Sequence[Callable[[], None]],
    meanwhile: Callable[[Sequence[int]], None] = lambda pids: None,
    patience: float = PATIENCE,
) -> list[Child]:
    """A run by two processes, until the end of both. ``before``: what each calls first; ``meanwhile`` gets their numbers;
    ``patience``: seconds that one waits for the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def rank(number: int) -> Callable[[], int]:
        def begin() -> None:
            world = {
                "RANK": number,
                "LOCAL_RANK": number,
                "WORLD_SIZE": 2,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            os.environ |= {key: str(value) for key, value in world.items()}
            original = dist.init_process_group

            def patient(backend: str, timeout: Any = None) -> None:
                original(backend, timeout=timedelta(seconds=patience))

            dist.init_process_group = patient  # type: ignore[assignment]
            before[number]()

        return command(*words, before=begin)

    words, second = arguments(name, out), []

    def start_second(first: int) -> None:  # it is started, and waited for, while the first one runs
        second.append(fork(rank(1), lambda pid: meanwhile([first, pid])))

    return [fork(rank(0), start_second), *second]


def _fault(how: str, step: int) -> None:
    original = Trainer.train_step

    def train_step(self: Trainer, *batches: Any) -> None:
        if self.step == step:
            if how == "stall":
                time.sleep(4 * PATIENCE)
            elif how == "exception":
                raise RuntimeError("the fault of one rank")
            else:
                os.kill(os.getpid(), getattr(signal, how))
        original(self, *batches)

    Trainer.train_step = train_step  # type: ignore[method-assign]
