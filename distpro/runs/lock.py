"""One run at a time in a folder. The lock is the kernel's (flock): it ends with its process, however that ends."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from pathways.registry import UserError

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def locked(folder: Path, shared: bool = False, alone: bool = False) -> Iterator[bool]:
    """Hold a run's folder, which is made if absent and removed again if nothing was written to it.

    ``shared``: with other holders that share it, as the processes of a tuning do; ``alone``: and ask whether there are others,
    which is False where nothing tells. Where the file system knows no locks of folders (some network file systems), nothing is held.

    Raises UserError if another process holds it.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.ExitStack() as stack:
            if fcntl is not None:
                handle = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, handle)
                alone = alone and _alone(handle)
                _lock(folder, handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            yield alone and fcntl is not None
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in new:
                path.rmdir()


def _alone(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _lock(folder: Path, handle: int, kind: int) -> None:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UserError(
                f"{folder}: another process is running in this folder; wait for its end, or choose another --out"
            ) from None
