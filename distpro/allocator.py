"""Keep freed memory instead of handing it back to the system and asking for it again in every step.

A training step frees and allocates the same large tensors over and over. glibc returns them to the kernel, and the
page faults of getting them back cost 10-20 % of a CPU step (`tools/bench_search.py --allocator` shows both).
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # from glibc's malloc.h


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep what is freed. Returns whether it took effect; other systems are left alone."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # a C library without mallopt
        return False
    return all([mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1), mallopt(_M_TOP_PAD, 64 << 20)])
