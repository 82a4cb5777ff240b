"""Time of a search step against its floor, a KD step, and the naive step that a DARTS port would take.

    python tools/bench_search.py                    # ResNet-56 → ResNet-20, 27 pathways, batch 128
    python tools/bench_search.py --transforms 1     # 9 pathways

Everything is measured in one process, in turn (A B C ... A B C ...), so that a drift of the machine's speed meets all
alike; medians over the rounds, printed as ratios and written as JSON. Random images and weights: time does not depend
on them. The floor is the sum of the passes that the mathematics needs, written in plain PyTorch and timed on their own:

    teacher forward; student and pathways forward and backward; student forward and backward on the validation batch;
    one forward-mode pass of the student; the optimiser's step.
"""

from __future__ import annotations

import argparse
import copy
import resource
from collections.abc import Callable

import torch
import torch.nn.functional as F
from benchmark import measure, medians, parser, save
from torch import nn

from distpro.batch import Batch
from distpro.hypergradient import ForwardMode
from distpro.models import build_model
from distpro.objective import Objective
from distpro.searcher import Searcher
from distpro.tangents import forward_mode
from distpro.trainer import Trainer
from distpro.weighting import BiasedSoftmax
from pathways import build_pathways

TRANSFORMS = ["conv1x1", "conv3x3", "attention"]


class Setup:
    """Models, batches and the searched objective in one precision and memory layout."""

    def __init__(self, options: argparse.Namespace, precision: torch.dtype | None, channels_last: bool):
        torch.manual_seed(0)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.device = torch.device(options.device)
        self.teacher = build_model(options.teacher, num_classes=100).eval().to(self.device, memory_format=layout)
        self.student = build_model(options.student, num_classes=100).to(self.device, memory_format=layout)
        batch = options.batch
        self.train, self.validation = (
            Batch(
                torch.randn(batch, 3, 32, 32, device=self.device).contiguous(memory_format=layout),
                torch.randint(100, (batch,), device=self.device),
            )
            for _ in range(2)
        )
        taps = self.student.stage_taps.post
        space = build_pathways(
            self.teacher, self.student, self.train.x, self.teacher.stage_taps.pre, taps, transforms=TRANSFORMS[: options.transforms]
        )  # fmt: skip
        self.objective = Objective(self.teacher, self.student, space, self.train.x, precision=precision)
        self.optimizer = self._sgd(self.objective.trainable_parameters())
        estimator = ForwardMode(self.objective, self.optimizer)
        searcher = Searcher(
            self.objective, estimator, BiasedSoftmax(), lambda start: iter(lambda: self.validation, None), 10_000
        )
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
        self.objective.teach(self.train.x)

    def training_pass(self) -> Callable[[], None]:
        teacher = self.objective.teach(self.train.x)

        def run() -> None:
            self.optimizer.zero_grad(set_to_none=True)
            with self.objective.autocast():
                output, features = self.objective.student(self.train.x)
                losses = [p(features[p.student_taps[0]], teacher[p.teacher_taps[0]]) for p in self.objective.terms]
            loss = F.cross_entropy(output.float(), self.train.y) + (self.weights * torch.stack(losses)).sum()
            loss.backward()

        return run

    def validation_pass(self) -> None:
        with self.objective.autocast():
            output = self.student(self.validation.x)
        loss = F.cross_entropy(output.float(), self.validation.y)
        torch.autograd.grad(loss, list(self.student.parameters()))

    def tangent_pass(self) -> Callable[[], None]:
        values = {name: p.detach() for name, p in self.student.named_parameters()}
        direction = {name: torch.randn_like(p) for name, p in values.items()}
        return lambda: forward_mode(self.student, values, direction, self.train.x)

    def optimizer_step(self) -> Callable[[], None]:
        self.training_pass()()
        return lambda: self.optimizer.step()

    # What people do otherwise

    def kd_step(self) -> Callable[[], None]:
        """Plain knowledge distillation with our parts: teacher, student, KL at T = 4."""
        optimizer = self._sgd(list(self.student.parameters()))

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            with self.objective.autocast():
                with torch.no_grad():
                    teacher = self.teacher(self.train.x)
                output = self.student(self.train.x)
            output, teacher = output.float(), teacher.float()
            kd = F.kl_div((output / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="batchmean") * 16
            (F.cross_entropy(output, self.train.y) + kd).backward()
            optimizer.step()

        return run

    def naive_step(self) -> Callable[[], None]:
        """The unfused step of a DARTS port: every pass runs teacher, student and all pathways, each on its own.

        A virtual step on a copy of the model, L_val there, the loss at θ ± εv differentiated by α, then the real step.
        """
        alpha = torch.ones(len(self.objective.terms), device=self.device, requires_grad=True)
        student, terms = copy.deepcopy(self.student), copy.deepcopy(self.objective.terms)
        model = Objective(self.teacher, student, list(terms), self.train.x, precision=self.objective.precision)
        params = model.trainable_parameters()
        optimizer = self._sgd(params)
        alpha_optimizer = torch.optim.Adam([alpha], 0.05, betas=(0.5, 0.999))
        weighting = BiasedSoftmax()

        def training_loss(of: Objective) -> torch.Tensor:
            return of.evaluate(*self.train, weights=weighting(alpha)).loss

        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            virtual = copy.deepcopy(model)
            gradients = torch.autograd.grad(training_loss(model), params)
            with torch.no_grad():
                for p, g in zip(virtual.trainable_parameters(), gradients, strict=True):
                    p -= 0.01 * (g + 5e-4 * p)
            v = torch.autograd.grad(
                training_loss_on(virtual, self.validation), virtual.trainable_parameters(), allow_unused=True
            )
            epsilon = 0.01 / torch.cat([g.flatten() for g in v if g is not None]).norm()
            at = []
            for sign in (1, -2, 1):
                with torch.no_grad():
                    for p, g in zip(params, v, strict=True):
                        if g is not None:
                            p += sign * epsilon * g
                if len(at) < 2:
                    at.append(torch.autograd.grad(training_loss(model), alpha)[0])
            alpha.grad = -0.01 * (at[0] - at[1]) / (2 * epsilon)
            alpha_optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            training_loss(model).backward()
            optimizer.step()

        def training_loss_on(of: Objective, batch: Batch) -> torch.Tensor:
            output, _ = of.study(batch.x)
            return of.task_loss_of(output, batch.y)

        return run


def main() -> None:
    command = parser(__doc__, "bench_search")
    command.add_argument("--teacher", default="resnet56")
    command.add_argument("--student", default="resnet20")
    command.add_argument("--batch", type=int, default=128)
    command.add_argument("--transforms", type=int, choices=(1, 2, 3), default=3, help="9 pathways each")
    options = command.parse_args()
    torch.set_num_threads(options.threads)

    plain = Setup(options, None, channels_last=False)
    fast = {"float32": Setup(options, None, True), "bfloat16": Setup(options, torch.bfloat16, True)}
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
    seconds = measure(runs, options.rounds, plain.device)
    ratios = {}
    print(f"{len(plain.objective.terms)} pathways, {options.teacher} -> {options.student}, batch {options.batch}, {options.device}, "
          f"{options.threads} threads, torch {torch.__version__}, {options.rounds} rounds\n")  # fmt: skip
    median = medians(seconds)
    naive = median["naive, float32 NCHW"]
    for name in fast:
        passes = [v for k, v in median.items() if k.startswith(f"{name}: ") and "step" not in k]
        step, floor, kd = median[f"{name}: search step"], sum(passes), median[f"{name}: KD step"]
        ratios[name] = {"step / floor": step / floor, "step / KD step": step / kd, "naive / step": naive / step}
        print(f"\n{name}, channels_last: floor {1000 * floor:.1f} ms")
        for what, ratio in ratios[name].items():
            print(f"  {ratio:6.2f}   {what}")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if plain.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**20
    print(f"\npeak memory of the whole benchmark: {memory:.0f} MiB")
    save(options, seconds, ratios, peak_mib=memory)


if __name__ == "__main__":
    main()
