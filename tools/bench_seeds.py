"""Several seeds of one KD training: one after the other, side by side in processes, or as one ensemble under vmap.

    python tools/bench_seeds.py                   # ResNet-56 → ResNet-20, two seeds
    python tools/bench_seeds.py --student resnet8 --seeds 4

Images per second of all seeds together, each with batches of its own; bfloat16, channels_last. `one after the other` is what
``--seeds N`` does; `side by side` shares the threads out to one process a seed; `vmap` gives the members one batched forward
and backward pass, and the teacher one large batch. Medians of rounds taken in turn; the processes of `side by
side` are started once and wait while the others are timed. Random images and weights.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F
from benchmark import measure, medians, parser, save
from torch.func import functional_call, stack_module_state, vmap

from distpro.batch import batch_of
from distpro.losses import build_loss
from distpro.models import build_model
from distpro.objective import Objective, Term


def random_batch(options: argparse.Namespace, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(count, 3, 32, 32, device=options.device).contiguous(memory_format=torch.channels_last)
    return x, torch.randint(100, (count,), device=options.device)


def network(options: argparse.Namespace, name: str) -> torch.nn.Module:
    return build_model(name, num_classes=100).to(options.device, memory_format=torch.channels_last)


def sgd(params: Any) -> torch.optim.SGD:
    return torch.optim.SGD(params, 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)


def alone(options: argparse.Namespace) -> Callable[[], None]:
    """``--steps`` steps of one seed."""
    x, y = random_batch(options, options.batch)
    kd = Term(build_loss("kd", [(100,)], [(100,)]), "kd")
    teacher, student = network(options, options.teacher).eval(), network(options, options.student)
    objective = Objective(teacher, student, [kd], x[:2], precision=torch.bfloat16)
    optimizer = sgd(objective.trainable_parameters())

    def run() -> None:
        for _ in range(options.steps):
            optimizer.zero_grad(set_to_none=True)
            objective.training_pass(batch_of(x, y), [1.0]).loss.backward()
            optimizer.step()

    return run


def worker(options: argparse.Namespace, threads: int, connection: Connection) -> None:
    torch.set_num_threads(threads)
    run = alone(options)
    while connection.recv():
        run()
        if options.device != "cpu":
            torch.cuda.synchronize()
        connection.send(True)


class SideBySide:
    """One process a seed."""

    def __init__(self, options: argparse.Namespace):
        context = multiprocessing.get_context("spawn")
        self.connections = []
        threads = max(options.threads // options.seeds, 1)
        for _ in range(options.seeds):
            ours, theirs = context.Pipe()
            context.Process(target=worker, args=(options, threads, theirs), daemon=True).start()
            self.connections.append(ours)

    def __call__(self) -> None:
        for connection in self.connections:
            connection.send(True)
        for connection in self.connections:
            connection.recv()

    def end(self) -> None:
        for connection in self.connections:
            connection.send(False)


def ensemble(options: argparse.Namespace) -> Callable[[], None]:
    """All seeds in one process under vmap. BatchNorm in the form that vmap allows: batch statistics only."""
    students = [network(options, options.student) for _ in range(options.seeds)]
    for student in students:
        for module in student.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.track_running_stats, module.running_mean, module.running_var = False, None, None
                module.num_batches_tracked = None
    parameters, _ = stack_module_state(students)
    optimizer = sgd(list(parameters.values()))
    teacher = Objective(network(options, options.teacher).eval(), students[0], [Term(build_loss("kd", [(100,)], [(100,)]), "kd")],
                        torch.zeros(2, 3, 32, 32, device=options.device), precision=torch.bfloat16)  # fmt: skip
    x, y = random_batch(options, options.seeds * options.batch)
    xs, ys = x.unflatten(0, (options.seeds, -1)), y.unflatten(0, (options.seeds, -1))

    def forward(values: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
        return functional_call(students[0], values, (images,))

    def run() -> None:
        for _ in range(options.steps):
            optimizer.zero_grad(set_to_none=True)
            taught = teacher.run_teacher(batch_of(x))["logits"].float().unflatten(0, (options.seeds, -1))
            with torch.autocast(x.device.type, torch.bfloat16):
                outputs = vmap(forward)(parameters, xs).float()
            kd = F.kl_div((outputs / 4).log_softmax(-1), (taught / 4).softmax(-1), reduction="sum") * 16 / options.batch
            (options.seeds * F.cross_entropy(outputs.flatten(0, 1), ys.flatten()) + kd).backward()
            optimizer.step()

    return run


def main() -> None:
    command = parser(__doc__, "bench_seeds")
    command.add_argument("--teacher", default="resnet56")
    command.add_argument("--student", default="resnet20")
    command.add_argument("--batch", type=int, default=128)
    command.add_argument("--seeds", type=int, default=2)
    command.add_argument("--steps", type=int, default=4, help="a round's steps of each seed")
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    members = [alone(options) for _ in range(options.seeds)]

    def one_after_the_other() -> None:
        for member in members:
            member()

    side_by_side = SideBySide(options)
    side_by_side()
    runs = {
        "one after the other": one_after_the_other,
        "side by side": side_by_side,
        "vmap": ensemble(options),
    }
    seconds = measure(runs, options.rounds, torch.device(options.device))
    side_by_side.end()
    print(f"{options.teacher} -> {options.student}, batch {options.batch}, {options.seeds} seeds, {options.device}, "
          f"{options.threads} threads in all; a run is {options.steps} steps of each seed\n")  # fmt: skip
    median = medians(seconds)
    images = options.seeds * options.steps * options.batch
    ratios = {name: median["one after the other"] / value for name, value in median.items()}
    print("\n  images/s   against one after the other")
    for name, value in median.items():
        print(f"  {images / value:8.0f}   {ratios[name]:5.2f}   {name}")
    save(options, seconds, ratios)


if __name__ == "__main__":
    main()
