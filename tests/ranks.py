"""Commands in two processes that need not import anything: forked from a server which has."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])


def run_in_two(*arguments: object) -> tuple[list[int | None], str]:
    """What `distpro` with these arguments ends with in each of two processes, and what they print. They are what torchrun would
    start but for their start: the same variables, the working directory, and its modules."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            CONTEXT.Process(target=_rank, args=(n, port, [str(a) for a in arguments], os.getcwd(), f"{folder}/{n}"))
            for n in range(2)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(300)
            rank.kill()
        return [rank.exitcode for rank in ranks], "".join(Path(folder, str(n)).read_text() for n in range(2))


def _rank(number: int, port: int, arguments: list[str], folder: str, output: str) -> None:
    with open(output, "w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    os.chdir(folder)
    sys.path.insert(0, folder)
    from distpro.cli import main

    status = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(status)
