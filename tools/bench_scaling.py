"""How the cost of a search step and of a KD step grows: with pathways, batch, student, image size, and processes.

    python tools/bench_scaling.py

Medians of paired rounds; an exponent is the slope of log seconds by log size (1: proportional). Two processes share the
batch as `torchrun` runs them, with half of the threads each. Last, where the time goes, from torch.profiler. Random images
and weights; bfloat16, channels_last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_search import Setup
from benchmark import measure, medians, parser, save
from torch.profiler import ProfilerActivity, profile

PATHWAYS = {
    9: {"transforms": 1},
    18: {"transforms": 2},
    27: {},
    54: {"transforms": 2, "blocks": True},
    81: {"blocks": True},
}
BATCHES = (32, 64, 128, 256)
STUDENTS = {
    "resnet8": 12.5,
    "resnet14": 26.8,
    "resnet20": 41.0,
    "resnet32": 69.4,
}  # million multiply-accumulates an image
SIZES = (16, 32, 64)
KINDS = {
    "convolution backward": ("convolution_backward",),
    "convolution": ("mkldnn_convolution", "cudnn_convolution", "_convolution_pointwise"),
    "BatchNorm": ("native_batch_norm", "native_batch_norm_backward", "cudnn_batch_norm", "cudnn_batch_norm_backward"),
    "ReLU": ("clamp_min", "clamp_min_", "threshold_backward"),
    "resizing and pooling": ("upsample", "avg_pool"),
}


def steps_of(options: argparse.Namespace, **changes: Any) -> Setup:
    """A set-up with other teacher, student, batch or image size, or another number of pathways."""
    named = {"batch": options.batch, "student": options.student, "teacher": options.teacher, "size": 32}
    own = {key: changes.pop(key) for key in list(changes) if key in named}
    return Setup(argparse.Namespace(**{**vars(options), **named, **own}), **changes)


def exponent(sizes: list[float], seconds: list[float]) -> float:
    """Slope of log seconds by log size, least squares."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def processes(options: argparse.Namespace, count: int) -> float:
    """Seconds of a search step on the whole batch by ``count`` processes, the median that the first one found."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "seconds.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        command += [__file__, "--as-one-of", str(count), "--json", str(result), "--device", options.device]
        for name in ("rounds", "batch", "student", "teacher"):
            command += [f"--{name}", str(getattr(options, name))]
        command += ["--threads", str(max(options.threads // count, 1))]
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(options.threads // count, 1))}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        return statistics.median(json.loads(result.read_text()))


def as_one_of(options: argparse.Namespace) -> None:
    """What each process of `processes` does."""
    from distpro.train import distributed

    with distributed.started(options.device):
        setup = steps_of(options, batch=options.batch // options.as_one_of)
        seconds = []
        for _ in range(options.rounds + 1):
            start = time.perf_counter()
            setup.search_step()
            if setup.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        if distributed.is_main():
            options.json.write_text(json.dumps(seconds[1:]))


def profiled(run: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Share of the time by kind of operation."""
    run()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as recorded:
        run()
    spent: Counter[str] = Counter()
    for event in recorded.key_averages():
        seconds = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        name = event.key.removeprefix("aten::").removeprefix("mkldnn::")
        kind = next((k for k, parts in KINDS.items() if name in parts), None)
        kind = kind or next((k for k, parts in KINDS.items() if any(p in name for p in parts)), "the rest")
        spent[kind] += seconds
    return {kind: value / spent.total() for kind, value in spent.most_common()}


def main() -> None:
    command = parser(__doc__, "bench_scaling")
    command.add_argument("--teacher", default="resnet56")
    command.add_argument("--student", default="resnet20")
    command.add_argument("--batch", type=int, default=128)
    command.add_argument("--as-one-of", type=int, help=argparse.SUPPRESS)
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    if options.as_one_of:
        return as_one_of(options)

    tables: dict[str, dict[float, Setup]] = {
        "pathways": {n: steps_of(options, **how) for n, how in PATHWAYS.items()},
        "batch": {n: steps_of(options, batch=n) for n in BATCHES},
        "student, MMAC an image": {macs: steps_of(options, student=name) for name, macs in STUDENTS.items()},
        "image side": {n: steps_of(options, size=n, batch=options.batch // 2) for n in SIZES},
    }
    runs: dict[str, Callable[[], None]] = {}
    for what, setups in tables.items():
        for size, setup in setups.items():
            runs[f"{what} {size}: search step"] = setup.search_step
            if what != "pathways":
                runs[f"{what} {size}: KD step"] = setup.kd_step()
    device = torch.device(options.device)
    seconds = measure(runs, options.rounds, device)
    print(
        f"{options.teacher} -> {options.student}, batch {options.batch}, {options.device}, {options.threads} threads\n"
    )
    median = medians(seconds)
    found: dict[str, Any] = {"exponents": {}}
    print("\n  exponent of cost")
    for what, setups in tables.items():
        for step in ("search step", "KD step"):
            values = [median.get(f"{what} {size}: {step}", 0.0) for size in setups]
            if all(values):
                found["exponents"][f"{step} by {what}"] = exponent(list(setups), values)
                print(f"  {found['exponents'][f'{step} by {what}']:8.2f}   {step} by {what}")
    if device.type == "cpu" or torch.cuda.device_count() > 1:
        one, two = processes(options, 1), processes(options, 2)
        found["processes"] = {"1": one, "2": two}
        print(
            f"\n  {one / two:8.2f}   search step, 1 process of {options.threads} threads / 2 processes of half of them"
        )
    found["profile"] = {}
    for name, run in {
        "search step": tables["batch"][128].search_step,
        "KD step": tables["batch"][128].kd_step(),
    }.items():
        found["profile"][name] = profiled(run, device)
        print(f"\n  where a {name} spends its time")
        for kind, share in found["profile"][name].items():
            print(f"  {100 * share:7.1f} %   {kind}")
    save(options, seconds, found)


if __name__ == "__main__":
    main()
