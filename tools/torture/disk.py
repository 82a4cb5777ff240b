"""Promises 2 and 3: a checkpoint is whole or not there, what goes wrong with a disk is said, and a folder has one run."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from distpro import files
from distpro.train.checkpoint import CHECKPOINT, PREVIOUS, read_checkpoint
from distpro.train.trainer import Trainer
from pathways.registry import UserError
from torture.campaign import Campaign, Child, apart, command, fork
from torture.kill import whole
from torture.mutations import mutate_bytes
from torture.subjects import arguments, folder_of, prepare

FAULTS = {"fsync": (errno.ENOSPC, errno.EDQUOT, errno.EIO), "replace": (errno.EIO, errno.ESTALE, errno.EACCES), "open": (errno.EROFS, errno.EACCES, errno.EMFILE)}  # fmt: skip


def damaged(campaign: Campaign, most: int) -> None:
    """Checkpoints that are cut at every kilobyte, flipped, empty, or of something else: refused by name, with the one before."""
    prepare(campaign.place)
    for name in ("train", "search"):
        whole(name)
    for case, draw in campaign.cases("damaged", most):
        name, out = draw.choice(("train", "search")), Path("damaged")
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(folder_of(name), out)
        data = (out / CHECKPOINT).read_bytes()
        how = draw.choice(("cut", "flip", "bytes", "empty", "version", "other"))
        if how == "cut":
            new = data[: case * 1024 % len(data)]
        elif how == "flip":
            at = draw.randrange(len(data))
            new = data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]
        elif how == "bytes":
            new = mutate_bytes(data, draw)
        elif how == "empty":
            new = b""
        else:
            state = torch.load(out / CHECKPOINT, weights_only=True)
            changed = {**state, "version": 99} if how == "version" else {"step": 3, "student": {}}
            torch.save(changed, "x.pt")
            new = Path("x.pt").read_bytes()
        (out / CHECKPOINT).write_bytes(new)
        child = fork(command(*arguments(name, str(out))))
        lines = [line for line in child.said.splitlines() if line.startswith("distpro: ") and "note:" not in line]
        refused = child.status == 2 and len(lines) == 1 and CHECKPOINT in lines[0] and "Traceback" not in child.said
        offered = not refused or how in ("version", "other") or PREVIOUS in lines[0]
        # a flip may hit what nothing reads: padding between the members
        same = child.status == 0 and not apart(out, Path(folder_of(name)))
        gone_on: list[str] = []
        if refused and draw.random() < 0.2:
            os.replace(out / PREVIOUS, out / CHECKPOINT)
            again = fork(command(*arguments(name, str(out))))
            gone_on = apart(out, Path(folder_of(name))) if again.status == 0 else [again.said[-300:]]
        ok = ((refused and offered) or same) and not gone_on
        facts = {"status": child.status, "said": lines[:1] if ok else child.said[-500:], "different": gone_on[:3]}
        campaign.end("damaged", case, f"{how} in {name}", ok, **facts)


def full(campaign: Campaign, most: int) -> None:
    """Writes that fail: a full disk (a small tmpfs where this user may mount one), a limit, an error of any call."""
    prepare(campaign.place)
    for case, draw in campaign.cases("disk", most):
        name, out = draw.choice(("train", "search", "stages", "retrain")), "disk/run"
        whole(name)
        shutil.rmtree("disk", ignore_errors=True)
        Path("disk").mkdir()
        kind = draw.choice(("call", "call", "limit", "tmpfs"))
        if kind == "tmpfs":
            how, child = f"tmpfs of {(size := draw.randrange(40, 3000))} kB", _in_tmpfs(name, out, size)
        elif kind == "limit":
            size = draw.randrange(1, 1200) * 1024
            how = f"files of {size} bytes at most"
            child = fork(command(*arguments(name, out), before=lambda s=size: _limit(s)))
        else:
            call, at = draw.choice(list(FAULTS)), draw.randrange(1, 16)
            code = draw.choice(FAULTS[call])
            how = f"{call} {at}: {errno.errorcode[code]}"
            child = fork(command(*arguments(name, out), before=lambda c=call, n=at, e=code: _fail_at(c, n, e)))
        lines = [line for line in child.said.splitlines() if line.startswith("distpro: ") and "note:" not in line]
        said = child.status == 2 and len(lines) == 1 and "Traceback" not in child.said
        kept = _readable(Path(out))
        again = fork(command(*arguments(name, out)))
        different = apart(Path(out), Path(folder_of(name))) if again.status == 0 else [again.said[-300:]]
        ok = (said or child.status == 0) and not kept and not different
        facts = {
            "status": child.status,
            "said": lines[:1] if ok else child.said[-700:],
            "different": (kept + different)[:3],
        }
        campaign.end("disk", case, f"{how}, in {name}", ok, **facts)


def _readable(out: Path) -> list[str]:
    wrong = []
    for path in out.rglob(CHECKPOINT):
        try:
            read_checkpoint(path)
        except UserError as error:
            wrong.append(str(error))
    return wrong


def _limit(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def _fail_at(call: str, at: int, code: int) -> None:
    original: Callable[..., Any] = open if call == "open" else getattr(os, call)
    count = 0

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count >= at:
            raise OSError(code, os.strerror(code))
        return original(*args, **kwargs)

    setattr(files if call == "open" else os, call, failing)


def _in_tmpfs(name: str, out: str, kilobytes: int) -> Child:
    """The run in a file system of so many kilobytes; what it left is copied out of it."""
    with _mounted("disk", kilobytes) as mounted:
        if not mounted:
            return fork(command(*arguments(name, out), before=lambda: _limit(kilobytes * 512)))
        child = fork(command(*arguments(name, out)))
        shutil.copytree("disk", "kept", dirs_exist_ok=True)
    shutil.rmtree("disk", ignore_errors=True)
    os.replace("kept", "disk")
    return child


@contextmanager
def _mounted(folder: str, kilobytes: int) -> Iterator[bool]:
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder]
    mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)


def lock(campaign: Campaign, most: int) -> None:
    """A second run in a folder is refused while the first lives, and is not when the first was killed."""
    prepare(campaign.place)
    for case, draw in campaign.cases("lock", most):
        name = draw.choice(("train", "search", "stages", "retrain", "search with trials"))
        out = Path("locked")
        shutil.rmtree(out, ignore_errors=True)
        held: list[Child] = []

        def meanwhile(pid: int, name: str = name, held: list[Child] = held) -> None:
            until = time.monotonic() + 60
            while not Path("waits").exists() and time.monotonic() < until:
                time.sleep(0.02)
            held.append(fork(command(*arguments(name, "locked"))))
            os.kill(pid, signal.SIGKILL)

        Path("waits").unlink(missing_ok=True)
        at = draw.randrange(1, 8)
        first = fork(command(*arguments(name, "locked"), before=lambda a=at: _wait_at(a)), meanwhile)
        after = fork(command(*arguments(name, "locked")))
        refused = held[0].status == 2 and "another process is running in this folder" in held[0].said
        ok = first.status == -signal.SIGKILL and refused and after.status == 0
        campaign.end(
            "lock", case, name, ok, statuses=[first.status, held[0].status, after.status], said=held[0].said[-300:]
        )


def _wait_at(step: int) -> None:
    original, random_wait = Trainer.train_step, random.Random(step)

    def train_step(self: Trainer, *batches: Any) -> None:
        original(self, *batches)
        if self.step == step % 2 + 1:
            Path("waits").touch()
            time.sleep(60 + random_wait.random())

    Trainer.train_step = train_step  # type: ignore[method-assign]
