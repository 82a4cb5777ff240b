"""Time of a search step against its floor, a KD step, and the naive step that a DARTS port would take.

    python tools/bench_search.py                    # ResNet-56 → ResNet-20, batch 128
    python tools/bench_search.py --teacher wrn_40_2 --student wrn_16_2

With 27 pathways: the step in float32 and bfloat16 against floor, KD step and naive step; then, in bfloat16, 9 and 81
pathways (81: every block of the student against every stage of the teacher), the other estimators, and a hypergradient in
every fourth step only. Peak memory is that of a process that does nothing else.

Everything is measured in one process, in turn (A B C ... A B C ...), so that a drift of the machine's speed meets all
alike; medians over the rounds, printed as ratios and written as JSON. Random images and weights: time does not depend
on them. The floor is the sum of the passes that the mathematics needs, written in plain PyTorch and timed on their own:

    teacher forward; student and pathways forward and backward; student forward and backward on the validation batch;
    one forward-mode pass of the student; the optimiser's step.

A last table sets the search's whole cost against a retrain's, by their steps: 40 epochs on 80 % of the images, 240 on all.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from bench_train import hcl
from benchmark import measure, medians, parser, repeated, resident, save
from torch import nn

from distpro.batch import batch_of
from distpro.losses import build_loss
from distpro.models import build_model
from distpro.objective import Objective, Term
from distpro.search.estimators.base import ESTIMATORS
from distpro.search.estimators.tangents import forward_mode
from distpro.search.searcher import Searcher
from distpro.search.weighting import BiasedSoftmax
from distpro.train.trainer import Trainer
from pathways import build_pathways, tap

TRANSFORMS = ["conv1x1", "conv3x3", "attention"]
VARIANTS: dict[str, dict[str, Any]] = {
    "27 pathways": {},
    "9 pathways": {"transforms": 1},
    "81 pathways": {"blocks": True},
    "finite_difference": {"estimator": "finite_difference"},
    "unrolled, 1 step": {"estimator": "unrolled"},
    "forward_mode in float32": {"estimator": "forward_mode", "params": {"precision": "float32"}},
    "hypergradient every 4 steps": {"every": 4},
}


class Setup:
    """Models, batches and the searched objective in one precision and memory layout."""

    def __init__(
        self,
        options: argparse.Namespace,
        precision: torch.dtype | None = torch.bfloat16,
        channels_last: bool = True,
        transforms: int = 3,
        blocks: bool = False,
        estimator: str = "forward_mode",
        params: Mapping[str, Any] = {},  # noqa: B006  (never written to)
        every: int = 1,
    ):
        torch.manual_seed(0)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.device = torch.device(options.device)
        self.teacher = build_model(options.teacher, num_classes=100).eval().to(self.device, memory_format=layout)
        self.student = build_model(options.student, num_classes=100).to(self.device, memory_format=layout)
        batch, size = options.batch, getattr(options, "size", 32)
        self.every = every
        self.train, self.validation = (
            batch_of(
                torch.randn(batch, 3, size, size, device=self.device).contiguous(memory_format=layout),
                torch.randint(100, (batch,), device=self.device),
            )
            for _ in range(2)
        )
        taps = list(self.student.stage_taps.post)
        if blocks:
            taps = [f"{stage}.{n}" for stage in taps for n in range(len(self.student.get_submodule(stage)))]
        space = build_pathways(
            self.teacher, self.student, self.train.inputs, self.teacher.stage_taps.pre, taps, transforms=TRANSFORMS[:transforms]
        )  # fmt: skip
        self.objective = Objective(self.teacher, self.student, space, self.train.inputs, precision=precision)
        self.optimizer = self._sgd(self.objective.trainable_parameters())
        searcher = Searcher(
            self.objective, ESTIMATORS.build(estimator, self.objective, self.optimizer, **params), BiasedSoftmax(),
            lambda start: iter(lambda: self.validation, None), 10_000, every=every,
        )  # fmt: skip
        loader = [self.train] * 10_000
        self.trainer = Trainer(self.objective, None, self.optimizer, searcher, loader, [], epochs=1)
        self.weights = torch.full((len(space),), 1 / (len(space) + 1), device=self.device)

    @staticmethod
    def _sgd(params: list[nn.Parameter]) -> torch.optim.SGD:
        return torch.optim.SGD(params, 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)

    def search_step(self) -> None:
        """Our step, as training takes it."""
        self.trainer.train_step(self.train)

    # The floor's passes

    def teacher_pass(self) -> None:
        self.objective.run_teacher(self.train)

    def training_pass(self) -> Callable[[], None]:
        teacher = self.objective.run_teacher(self.train)

        def run() -> None:
            self.optimizer.zero_grad(set_to_none=True)
            with self.objective.autocast():
                output, features = self.objective.student(self.train.inputs)
                losses = [p(features[p.student_taps[0]], teacher[p.teacher_taps[0]]) for p in self.objective.terms]
            loss = F.cross_entropy(output.float(), self.train.target) + (self.weights * torch.stack(losses)).sum()
            loss.backward()

        return run

    def validation_pass(self) -> None:
        with self.objective.autocast():
            output = self.student(self.validation.inputs)
        loss = F.cross_entropy(output.float(), self.validation.target)
        torch.autograd.grad(loss, list(self.student.parameters()))

    def tangent_pass(self) -> Callable[[], None]:
        values = {name: p.detach() for name, p in self.student.named_parameters()}
        direction = {name: torch.randn_like(p) for name, p in values.items()}
        return lambda: forward_mode(self.student, values, direction, self.train.inputs, self.objective.precision)

    def optimizer_step(self) -> Callable[[], None]:
        self.training_pass()()
        return lambda: self.optimizer.step()

    # What people do otherwise

    def kd_step(self) -> Callable[[], None]:
        """Our own step of plain knowledge distillation: teacher, student, KL at T = 4."""
        optimizer = self._sgd(list(self.student.parameters()))
        kd = Term(build_loss("kd", [(100,)], [(100,)]), "kd")
        objective = Objective(self.teacher, self.student, [kd], self.train.inputs, precision=self.objective.precision)

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            objective.training_pass(self.train, [1.0]).loss.backward()
            optimizer.step()

        return run

    def naive_step(self) -> Callable[[], None]:
        """The unfused step of a DARTS port in plain PyTorch: every pass runs teacher, student and all pathways anew.

        A virtual step on a copy of the model, L_val there, the loss at θ ± εv differentiated by α, then the real step.
        """
        alpha = torch.ones(len(self.objective.terms), device=self.device, requires_grad=True)
        model = nn.ModuleList([copy.deepcopy(self.student), copy.deepcopy(self.objective.terms)])
        params = list(model.parameters())
        optimizer = self._sgd(params)
        alpha_optimizer = torch.optim.Adam([alpha], 0.05, betas=(0.5, 0.999))
        weighting = BiasedSoftmax()

        def training_loss() -> torch.Tensor:
            student, pathways = model
            with torch.no_grad(), tap(self.teacher, self.teacher.stage_taps.pre) as theirs:
                self.teacher(self.train.inputs)
            with tap(student, self.student.stage_taps.post) as ours:
                output = student(self.train.inputs)
            losses = [hcl([p.transform(ours[p.student_taps[0]])], [theirs[p.teacher_taps[0]]]) for p in pathways]
            return F.cross_entropy(output, self.train.target) + (weighting(alpha) * torch.stack(losses)).sum()

        def run() -> None:
            virtual = copy.deepcopy(model)
            gradients = torch.autograd.grad(training_loss(), params)
            with torch.no_grad():
                for p, g in zip(virtual.parameters(), gradients, strict=True):
                    p -= 0.01 * (g + 5e-4 * p)
            validation_loss = F.cross_entropy(virtual[0](self.validation.inputs), self.validation.target)
            v = torch.autograd.grad(validation_loss, list(virtual.parameters()), allow_unused=True)
            epsilon = 0.01 / torch.cat([g.flatten() for g in v if g is not None]).norm()
            at = []
            for sign in (1, -2, 1):
                with torch.no_grad():
                    for p, g in zip(params, v, strict=True):
                        if g is not None:
                            p += sign * epsilon * g
                if len(at) < 2:
                    at.append(torch.autograd.grad(training_loss(), alpha)[0])
            alpha.grad = -0.01 * (at[0] - at[1]) / (2 * epsilon)
            alpha_optimizer.step()
            optimizer.zero_grad()
            training_loss().backward()
            optimizer.step()

        return run


def peak_memory(options: argparse.Namespace, variant: str) -> float:
    """MiB of a process that does only this variant's steps."""
    command = [sys.executable, __file__, "--memory-of", variant]
    for name in ("teacher", "student", "batch", "threads", "device"):
        command += [f"--{name}", str(getattr(options, name))]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak_memory(options: argparse.Namespace) -> None:
    setup = Setup(options, **VARIANTS.get(options.memory_of, {}))
    step = setup.kd_step() if options.memory_of == "KD step" else setup.search_step
    for _ in range(3):
        step()
    if setup.device.type == "cuda":
        print(torch.cuda.max_memory_allocated() / 2**20)
    else:
        print(resident("VmHWM"))


def main() -> None:
    command = parser(__doc__, "bench_search")
    command.add_argument("--teacher", default="resnet56")
    command.add_argument("--student", default="resnet20")
    command.add_argument("--batch", type=int, default=128)
    command.add_argument("--memory-of", choices=[*VARIANTS, "KD step"], help="print one variant's peak memory, and end")
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        return print_peak_memory(options)

    plain = Setup(options, None, channels_last=False)
    fast = {"float32": Setup(options, None), "bfloat16": Setup(options)}
    runs: dict[str, Callable[[], None]] = {"naive, float32 NCHW": plain.naive_step()}
    for name, setup in fast.items():
        runs |= {
            f"{name}: search step": setup.search_step,
            f"{name}: teacher forward": setup.teacher_pass,
            f"{name}: student and pathways forward, backward": setup.training_pass(),
            f"{name}: student forward, backward (validation)": setup.validation_pass,
            f"{name}: student forward-mode": setup.tangent_pass(),
            f"{name}: optimiser": setup.optimizer_step(),
            f"{name}: KD step": setup.kd_step(),
        }
    variants = {name: Setup(options, **how) for name, how in VARIANTS.items() if how}
    runs |= {f"search step, {name}": repeated(setup.search_step, setup.every) for name, setup in variants.items()}
    seconds = measure(runs, options.rounds, plain.device)
    for name, setup in variants.items():
        seconds[f"search step, {name}"] = [s / setup.every for s in seconds[f"search step, {name}"]]
    print(f"{options.teacher} -> {options.student}, batch {options.batch}, {options.device}, "
          f"{options.threads} threads, torch {torch.__version__}, {options.rounds} rounds\n")  # fmt: skip
    median = medians(seconds)
    ratios: dict[str, Any] = {}
    naive, kd = median["naive, float32 NCHW"], median["bfloat16: KD step"]
    for name in fast:
        passes = [v for k, v in median.items() if k.startswith(f"{name}: ") and "step" not in k]
        step, floor, own_kd = median[f"{name}: search step"], sum(passes), median[f"{name}: KD step"]
        ratios[name] = {"step / floor": step / floor, "step / KD step": step / own_kd, "naive / step": naive / step}
        print(f"\n{name}, channels_last, 27 pathways: floor {1000 * floor:.1f} ms")
        for what, ratio in ratios[name].items():
            print(f"  {ratio:6.2f}   {what}")
    steps = {"27 pathways": median["bfloat16: search step"]}
    steps |= {name: median[f"search step, {name}"] for name in variants}
    memory = {name: peak_memory(options, name) for name in ["KD step", *VARIANTS]}
    print("\nbfloat16: step / KD step, whole search / whole KD retrain, peak MiB")
    for name, step in steps.items():
        whole = step * 40 * 0.8 / (kd * 240)
        ratios[name] = {"step / KD step": step / kd, "search / KD retrain": whole, "MiB": memory[name]}
        print(f"  {step / kd:6.2f}  {100 * whole:5.1f} %  {memory[name]:7.0f}   {name}")
    print(f"  {1:6.2f}           {memory['KD step']:7.0f}   KD step")
    save(options, seconds, ratios, peak_mib=memory)


if __name__ == "__main__":
    main()
