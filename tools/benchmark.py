"""What the benchmarks share: measuring in turn, and a JSON file that says on what it was measured."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from distpro.build.device import native_precisions


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """A command line with what every benchmark takes: rounds, threads, device, and the JSON file's path."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--json", type=Path, default=Path(f"runs/{name}.json"))
    return made


def hardware(device: torch.device) -> str:
    """The card, or the processor's instruction set as PyTorch uses it, and the precisions that run in hardware."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return f"{name}, native: {', '.join(native_precisions(device))}"


def resident(key: str) -> float:
    """MiB of this process in memory; ``VmHWM``: at most since it began, ``VmRSS``: now. Linux tells."""
    return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]


def measure(runs: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each run in each round, taken in turn (A B C ... A B C ...) after one warm-up round, so that a drift
    of the machine's speed meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def repeated(step: Callable[[], Any], count: int) -> Callable[[], None]:
    """A run of ``count`` steps."""

    def run() -> None:
        for _ in range(count):
            step()

    return run


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Median of each run over the rounds, printed with its range in milliseconds."""
    found = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in found.items():
        values = seconds[name]
        print(f"  {1000 * value:9.1f} ms   {name}   [{1000 * min(values):.0f} - {1000 * max(values):.0f}]")
    return found


def save(options: argparse.Namespace, seconds: Mapping[str, list[float]], ratios: Any, **more: Any) -> None:
    """Write seconds, ratios, settings, machine and versions to ``--json``."""
    content = {
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "hardware": hardware(torch.device(options.device)),
        "gpu": torch.cuda.get_device_name() if options.device != "cpu" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": options.threads,
        "settings": {name: str(value) for name, value in vars(options).items()},
        "seconds": seconds,
        "ratios": ratios,
        **more,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(content, indent=1) + "\n")
