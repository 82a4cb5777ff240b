"""What the exact gradient over a horizon costs, in trainings: a window of training steps with its backward sweep, against
the same steps without it, in turns in one process.

    python tools/bench_horizon.py [--teacher resnet56 --student resnet20 --batch 64 --steps 4 --repeats 5]

The floor is 3 where all states are kept (the training, and about two more for one Hessian-vector product a step).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from bench_search import Setup

from distpro.search.estimators.sweep import Sweep
from distpro.search.searcher import Searcher

WAYS = {"forward over reverse": True, "double backward": False}


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--teacher", default="resnet56")
    command.add_argument("--student", default="resnet20")
    command.add_argument("--batch", type=int, default=64)
    command.add_argument("--steps", type=int, default=4)
    command.add_argument("--repeats", type=int, default=5)
    command.add_argument("--transforms", type=int, default=1, help="1: nine pathways, 3: all 27")
    command.add_argument("--device", default="cpu")
    command.add_argument("--threads", type=int, default=1)
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    windows: dict[str, Callable[[], None]] = {}
    for way, over_reverse in WAYS.items():
        windows[way] = window(options, over_reverse)
    plain = Setup(options, None, transforms=options.transforms)
    update = plain.optimizer_step()

    def training() -> None:
        for _ in range(options.steps):
            plain.training_pass()()  # with the teacher's pass
            update()

    windows["training alone"] = training
    times: dict[str, list[float]] = {name: [] for name in windows}
    for repeat in range(options.repeats + 1):
        for name, run in windows.items():
            start = time.perf_counter()
            run()
            if options.device != "cpu":
                torch.cuda.synchronize()
            if repeat:  # the first warms up
                times[name].append(time.perf_counter() - start)
    floor = statistics.median(times["training alone"])
    print(f"{options.teacher} -> {options.student}, batches of {options.batch}, {options.steps} steps, float32, {options.device}, "
          f"{torch.backends.cpu.get_cpu_capability()}, {options.threads} threads")  # fmt: skip
    for name, found in times.items():
        middle = statistics.median(found)
        print(f"{name:22s} {1e3 * middle / options.steps:8.1f} ms a step  {middle / floor:5.2f} x "
              f"({min(found) / floor:.2f} to {max(found) / floor:.2f})")  # fmt: skip


def window(options: argparse.Namespace, over_reverse: bool) -> Callable[[], None]:
    """Some training steps and the sweep back through them."""
    setup = Setup(
        options, None, transforms=options.transforms, estimator="sweep", params={"steps": options.steps}, every=options.steps
    )  # fmt: skip
    searcher = setup.trainer.weights
    assert isinstance(searcher, Searcher) and isinstance(searcher.estimator, Sweep)
    searcher.estimator.over_reverse = over_reverse

    def run() -> None:
        for _ in range(options.steps):
            setup.search_step()

    return run


if __name__ == "__main__":
    main()
