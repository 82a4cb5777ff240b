"""Several processes that do the same work on one machine, and stop when they are told to."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from distpro.console import fail
from distpro.train.trainer import Interrupted
from pathways.registry import UserError

LOOK = 0.2  # seconds


def run_workers(work: Callable[..., None], arguments: Sequence[Any], count: int) -> list[int]:
    """Call ``work`` in ``count`` new processes, each with its share of this one's threads, and wait for all of them. Returns
    the exit status of those that have failed; minus n where signal n has ended one.

    Raises `distpro.train.trainer.Interrupted` after a signal to this process, which all of them have got.
    """
    processes, threads = multiprocessing.get_context("spawn"), max(1, torch.get_num_threads() // count)
    team = [processes.Process(target=_run, args=(work, tuple(arguments), threads)) for _ in range(count)]
    told: list[int] = []

    def tell(number: int, frame: Any = None) -> None:
        told.append(number)
        for process in team:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    main = threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, tell) for n in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        for process in team:
            process.start()
        while any([process.is_alive() for process in team]):  # all are asked: that is what buries the dead
            time.sleep(LOOK)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        tell(signal.SIGTERM)
        raise UserError(f"workers: what was handed over cannot go to another process ({error})") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if told:
        raise Interrupted(told[0], 0, 0)
    return [process.exitcode for process in team if process.exitcode]


def _run(work: Callable[..., None], arguments: tuple[Any, ...], threads: int) -> None:
    if os.name == "posix":
        os.setpgrp()  # a terminal's Ctrl-C reaches the first process, which tells the others once
    os.environ["TERM"] = "dumb"  # lines, where several bars would overwrite each other
    torch.set_num_threads(threads)
    _end_with_parent()
    try:
        work(*arguments)
    except KeyboardInterrupt:  # between two trainings
        sys.exit(130)
    except Interrupted as error:
        sys.exit(128 + error.signal_number)
    except UserError as error:
        fail(str(error))
        sys.exit(2)


def _end_with_parent() -> None:
    """Stop, as after a signal, when the first process is no more."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
