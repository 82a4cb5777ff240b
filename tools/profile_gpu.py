"""Where a training step on a GPU waits for the device, and what it spends its time on.

    python tools/profile_gpu.py [--methods plain kd review distpro search]

Of each step: milliseconds of the host and of the device (a host that takes longer is what bounds it: launches), the operations
that take the host's time, and every place that makes the host wait (``torch.cuda.set_sync_debug_mode``), by its line in
distpro or pathways. The step is that of `distpro retrain`, as in tools/bench_train.py, and of `distpro search`, as in
tools/bench_search.py. Random images and weights.
"""

from __future__ import annotations

import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable

import torch
from bench_search import Setup
from bench_train import SAMPLES, Ours
from benchmark import parser, repeated
from torch.profiler import ProfilerActivity, profile

METHODS = ("plain", "kd", "review", "distpro", "search")


def waits(step: Callable[[], None], steps: int) -> Counter[str]:
    """How often the host waits in ``steps`` steps, by the innermost line of our own."""
    found: Counter[str] = Counter()

    def note(*_: object, **__: object) -> None:
        ours = [f for f in traceback.extract_stack() if "/distpro/" in f.filename or "/pathways/" in f.filename]
        found[f"{'/'.join(ours[-1].filename.split('/')[-3:])}:{ours[-1].lineno} {ours[-1].line}" if ours else "?"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        repeated(step, steps)()
        torch.cuda.set_sync_debug_mode("default")
    return found


def main() -> None:
    command = parser(__doc__, "profile_gpu")
    command.add_argument("--teacher", default="resnet56")
    command.add_argument("--student", default="resnet20")
    command.add_argument("--batch", type=int, default=128)
    command.add_argument("--steps", type=int, default=20)
    command.add_argument("--kept", type=int, default=3)
    command.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    command.add_argument("--compile")
    command.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    cuda = options.device != "cpu"
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (SAMPLES, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(100, (SAMPLES,), generator=generator)
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    for method in options.methods:
        precision = None if options.precision == "float32" else torch.bfloat16
        step = (
            Setup(options, precision).search_step if method == "search" else Ours(options, method, images, labels).step
        )
        repeated(step, 5)()
        start = time.perf_counter()
        repeated(step, options.steps)()
        host = time.perf_counter() - start
        if cuda:
            torch.cuda.synchronize()
        both = time.perf_counter() - start
        with profile(activities=kinds) as found:
            repeated(step, 3)()
            if cuda:
                torch.cuda.synchronize()
        table = found.key_averages()
        device = sum(event.self_device_time_total for event in table) / 3e3
        launches = sum(event.count for event in table if event.key in ("cudaLaunchKernel", "cudaLaunchKernelExC")) / 3
        print(
            f"\n{method}, {options.precision}: {1e3 * both / options.steps:.2f} ms a step, of the host {1e3 * host / options.steps:.2f}, "
            f"the device busy for {device:.2f}, {launches:.0f} launches"
        )
        print(table.table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=44))
        if cuda:
            for place, count in waits(step, 3).most_common(12):
                print(f"  waits {count / 3:5.1f} times a step: {place}")


if __name__ == "__main__":
    main()
