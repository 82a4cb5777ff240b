"""Peak memory of a search against pathways, horizon and what is kept of it; and whether a long one grows.

    python tools/bench_memory.py                  # ResNet-56 → ResNet-20, batch 64: a table
    python tools/bench_memory.py --soak 10000     # so many steps of a tiny search and a tiny retrain: the memory as they go on

Each row is the peak of a process of its own, which takes a window of steps, and how much that is above a KD step's process; beside
it what `--dry-run` says that such a horizon keeps. On a CPU a peak is the resident set's (VmHWM), with what the allocator wastes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any

import torch
from bench_search import VARIANTS, Setup
from benchmark import parser, resident, save

from distpro.search.estimators.replay import Room

SWEEP = {"transforms": 1, "estimator": "sweep"}
CASES: dict[str, dict[str, Any]] = {
    "KD step": {},
    "one step ahead, 9 pathways": VARIANTS["9 pathways"],
    "one step ahead, 27 pathways": VARIANTS["27 pathways"],
    "one step ahead, 81 pathways": VARIANTS["81 pathways"],
    **{f"horizon of {n} steps, all kept": {**SWEEP, "params": {"steps": n}, "every": n} for n in (4, 16, 64)},
    "horizon of 64 steps, every 8th kept": {**SWEEP, "params": {"steps": 64, "stretch": 8}, "every": 64},
    "horizon of 64 steps, all kept, 27 pathways": {**SWEEP, "transforms": 3, "params": {"steps": 64}, "every": 64},
}


def print_case(options: argparse.Namespace) -> None:
    """Peak MiB of one case, and the MiB that its horizon is said to keep."""
    case = CASES[options.case]
    setup = Setup(options, None, **case)
    step = setup.kd_step() if options.case == "KD step" else setup.search_step
    for _ in range(setup.every + 1):
        step()
    said = 0.0
    if case.get("estimator") == "sweep":
        params = case["params"]
        room = Room.of(setup.objective, options.batch, setup.train)
        said = room.takes(params["steps"], params.get("stretch", 1)) / 2**20
    peak = torch.cuda.max_memory_allocated() / 2**20 if setup.device.type == "cuda" else resident("VmHWM")
    print(peak, said)


def peaks(options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """(peak, said) in MiB of each case."""
    found = {}
    for name in CASES:
        command = [sys.executable, __file__, "--case", name]
        for key in ("teacher", "student", "batch", "threads", "device"):
            command += [f"--{key}", str(getattr(options, key))]
        peak, said = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        found[name] = peak, said
        above = peak - found["KD step"][0]
        print(f"  {peak:7.0f} MiB  {above:+7.0f}  {f'said to keep {said:.0f}' if said else '':18s}  {name}", flush=True)
    return found


def soak(options: argparse.Namespace) -> dict[str, list[float]]:
    """MiB of this process after each tenth of the steps of a search over a horizon, of a one-step search, and of KD steps."""
    tiny = argparse.Namespace(**{**vars(options), "teacher": "resnet8x4", "student": "resnet8", "batch": 4, "size": 8})
    found: dict[str, list[float]] = {}
    for name, case in {
        "horizon of 12 steps": {**SWEEP, "params": {"steps": 12}, "every": 12},
        "one step ahead": {"transforms": 1},
        "KD step": None,
    }.items():
        setup = Setup(tiny, None, **(case or {}))
        step = setup.search_step if case else setup.kd_step()
        found[name] = []
        for n in range(1, options.soak + 1):
            step()
            if n % setup.trainer.log_every == 0:
                setup.trainer._row.begin()  # as the log does
            if n % max(1, options.soak // 10) == 0:
                found[name].append(resident("VmRSS"))
        said = " ".join(f"{size:.1f}" for size in found[name])
        print(f"{name}: MiB after each tenth of {options.soak} steps: {said}; "
              f"in the last nine {found[name][-1] - found[name][0]:+.1f}", flush=True)  # fmt: skip
    return found


def main() -> None:
    command = parser(__doc__, "bench_memory")
    command.add_argument("--teacher", default="resnet56")
    command.add_argument("--student", default="resnet20")
    command.add_argument("--batch", type=int, default=64)
    command.add_argument("--soak", type=int, default=0, metavar="STEPS")
    command.add_argument("--case", choices=CASES, help="print one case's peak, and end")
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    if options.case:
        return print_case(options)
    if options.soak:
        return save(options, soak(options), {})
    print(
        f"{options.teacher} -> {options.student}, batch {options.batch}, float32, {options.device}, torch {torch.__version__}"
    )
    save(options, {}, {}, mib=peaks(options))


if __name__ == "__main__":
    main()
