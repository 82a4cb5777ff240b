"""What it costs to make sure that traced code is the model, and what traced code saves.

    python tools/bench_taps.py

For each network, as a frozen teacher and as a student that trains, read at its stages: a pass of traced code, the
looks that it takes in every pass (is the model what was traced; are the folded weights what they were), and the same
network by hooks, as one of somebody's own class runs. Then what a search keeps of such a student before each step that
counts, to be able to do the step's pass again: its buffers, and of somebody's own class its attributes as well.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torchvision
from benchmark import measure, medians, parser, repeated, save
from torch import nn

from distpro.models import build_model
from distpro.objective import Objective
from distpro.search.estimators.start import Start
from pathways import Tapped, find_stages
from pathways.fusing import foldable
from pathways.trust import Unchanged

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-56": (lambda: build_model("resnet56", num_classes=100), (128, 3, 32, 32)),
    "ResNet-50": (lambda: torchvision.models.resnet50(), (16, 3, 224, 224)),
    "ViT-S/16": (lambda: torchvision.models.VisionTransformer(224, 16, 12, 6, 384, 1536), (16, 3, 224, 224)),
}


def somebodys(model: nn.Module) -> nn.Module:
    """The same network under a class that nobody knows."""
    model = copy.deepcopy(model)
    model.__class__ = type("Own", (type(model),), {"__module__": "own"})
    return model


def same_values(model: nn.Module) -> Callable[[], bool]:
    """The comparison of the values of all tensors of a model, as folded code makes it in every pass."""
    kept = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    return lambda: all(torch.equal(t, copy) for t, copy in kept)


def train_step(tapped: Tapped, x: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        output, taps = tapped(x)
        (output.square().mean() + sum(t.square().mean() for t in taps.values())).backward()

    return step


@torch.no_grad()
def without_gradients(tapped: nn.Module, x: torch.Tensor) -> Any:
    return tapped(x)


def main() -> int:
    command = parser(__doc__, "bench_taps")
    command.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    ratios: dict[str, float] = {}
    seconds: dict[str, list[float]] = {}
    for name in options.networks:
        build, shape = NETWORKS[name]
        torch.manual_seed(0)
        student = build().to(device, memory_format=torch.channels_last)
        teacher, x = copy.deepcopy(student).eval().requires_grad_(False), torch.randn(shape, device=device)
        x = x.contiguous(memory_format=torch.channels_last)
        stages = find_stages(teacher, x[:2])
        forms = {
            "teacher, traced": Tapped(teacher, stages, x[:2], frozen=True).eval(),
            "teacher, hooks": Tapped(somebodys(teacher), stages, x[:2], frozen=True).eval(),
        }
        trained = {
            "student, traced": Tapped(student, stages, x[:2]),
            "student, hooks": Tapped(somebodys(student), stages, x[:2]),
        }
        searched = {
            "known class": Objective(None, copy.deepcopy(student), example_input=x[:2]),
            "own class": Objective(None, somebodys(student), example_input=x[:2]),
        }
        runs: dict[str, Callable[[], Any]] = {
            form: lambda tapped=tapped, x=x: without_gradients(tapped, x)  # type: ignore[misc]
            for form, tapped in forms.items()
        }
        runs |= {form: train_step(tapped, x) for form, tapped in trained.items()}
        runs |= {f"10 starts, {kind}": repeated(partial(Start, o), 10) for kind, o in searched.items()}
        runs |= {"100 looks at the model": repeated(Unchanged(teacher), 100)}
        if foldable(teacher) and forms["teacher, traced"].traced:
            runs |= {"10 looks at the weights": repeated(same_values(teacher), 10)}
        found = measure({f"{name}: {form}": run for form, run in runs.items()}, options.rounds, device)
        median = {key.removeprefix(f"{name}: "): value for key, value in medians(found).items()}
        seconds |= found
        for who in ("teacher", "student"):
            traced = median[f"{who}, traced"]
            looks = median["100 looks at the model"] / 100
            if who == "teacher":
                looks += median.get("10 looks at the weights", 0.0) / 10
            ratios[f"{name}, {who}: looks / traced pass"] = looks / traced
            ratios[f"{name}, {who}: hooks / traced"] = median[f"{who}, hooks"] / traced
        for kind in searched:
            ratios[f"{name}, {kind}: kept for a search / student's traced step"] = (
                median[f"10 starts, {kind}"] / 10 / median["student, traced"]
            )
        print(
            f"  {name}: teacher traced {forms['teacher, traced'].traced}, student {trained['student, traced'].traced}\n"
        )
    for key, value in ratios.items():
        print(f"  {value:8.4f}   {key}")
    save(options, seconds, ratios)
    return 0


if __name__ == "__main__":
    sys.exit(main())
