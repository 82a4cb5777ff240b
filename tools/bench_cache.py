"""Time of a training epoch that reads the teacher's outputs from the cache, against one that runs the teacher.

    python tools/bench_cache.py                        # ResNet-56 → ResNet-20, KD and attention transfer
    python tools/bench_cache.py --teacher wrn_40_2 --student wrn_16_2 --losses kd review --precision bfloat16

Random images, cropped and flipped anew in every epoch, so that each epoch has rows of its own in the cache. Four
trainings from one initial state take each epoch in turn:

    teacher     runs the teacher on every batch
    filling     likewise, and writes what it gave
    cached      reads that from the folder
    memory      has the teacher's tensors in memory already: the floor

They have to agree in every loss and in the final parameters to the last bit, or the benchmark fails. What has just been
written is still in the system's memory when it is read. torchdistill reports epochs that are 1.23-2.11 times faster
with its cache (Matsubara 2021).
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile

import torch
from benchmark import measure, medians, parser, save

from distpro.batch import batch_of
from distpro.build.reading import Reading
from distpro.data import Loader, Split
from distpro.losses import LOSSES, build_loss
from distpro.models import build_model
from distpro.objective import Features, Objective, Term
from distpro.process import Clock
from distpro.train.cache import TeacherCache, digest
from pathways import probe_shapes

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
CLASSES, SIDE = 100, 32


class Setup:
    """Models, data and one term; trainings from one initial state."""

    def __init__(self, options: argparse.Namespace, loss: str):
        torch.manual_seed(0)
        self.device, self.precision = torch.device(options.device), PRECISIONS[options.precision]
        models = [build_model(name, num_classes=CLASSES) for name in (options.teacher, options.student)]
        self.teacher, self.student = (m.to(self.device, memory_format=torch.channels_last) for m in models)
        images = torch.randint(256, (options.samples, 3, SIDE, SIDE), dtype=torch.uint8)
        self.split = Split.of(images, torch.randint(CLASSES, (options.samples,)))
        self.loader = Loader(
            self.split,
            options.batch,
            mean=[0.5] * 3,
            std=[0.25] * 3,
            augment=[{"crop": {"padding": 4}}, "flip"],
            shuffle=True,
            drop_last=True,
            device=self.device,
            channels_last=True,
        )
        self.epochs = options.rounds + 1  # and the one that warms up
        example = next(self.loader.epoch(0)).inputs[:2]
        self.term = self._term(loss, example)
        self.taps = self.objective().run_teacher(batch_of(example))

    def _term(self, loss: str, x: torch.Tensor) -> Term:
        kind = LOSSES[loss]
        taps, shapes = [], []
        for model, pre in ((self.student, kind.before_relu == "both"), (self.teacher, kind.before_relu != "neither")):
            places = model.stage_taps
            taps.append(Reading(places.post, places.pre, places.embedding).taps(kind.taps, pre))
            probed = probe_shapes(model, taps[-1], x)
            shapes.append([probed[tap] for tap in taps[-1]])
        term = Term(build_loss(loss, *shapes), loss, *taps, weight=1.0)
        return term.to(self.device)

    def objective(self, cache: TeacherCache | None = None) -> Objective:
        student, term = copy.deepcopy((self.student, self.term))
        clock = Clock(self.epochs * len(self.loader), len(self.loader))
        return Objective(self.teacher, student, [term], precision=self.precision, cache=cache, clock=clock)

    def cache(self, folder: str) -> TeacherCache:
        fingerprint = {"teacher weights": digest(self.teacher)}
        return TeacherCache(folder, self.split.index, self.epochs, self.taps, fingerprint, device=self.device)


class Training:
    """Epochs, one after the other. ``gives`` receives the teacher's tensors of each batch; ``takes`` has them."""

    def __init__(
        self,
        setup: Setup,
        cache: TeacherCache | None = None,
        gives: list[Features] | None = None,
        takes: list[Features] | None = None,
    ):
        self.loader, self.objective = setup.loader, setup.objective(cache)
        self.gives, self.takes = gives, takes
        params = self.objective.trainable_parameters()
        self.optimizer = torch.optim.SGD(params, 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
        self.losses: list[float] = []

    def epoch(self) -> None:
        for batch in self.loader.epoch(len(self.losses) // len(self.loader)):
            self.objective.at(len(self.losses))
            known = self.takes.pop(0) if self.takes is not None else None
            self.optimizer.zero_grad(set_to_none=True)
            done = self.objective.training_pass(batch, self.objective.weights_at(len(self.losses)), teacher=known)
            done.loss.backward()
            self.optimizer.step()
            self.losses.append(done.loss.item())
            if self.gives is not None:
                self.gives.append(done.teacher)

    def agrees(self, other: Training) -> bool:
        """Whether all losses and the parameters are the same bits."""
        pairs = zip(self.objective.trainable_parameters(), other.objective.trainable_parameters(), strict=True)
        return self.losses == other.losses and all(torch.equal(a, b) for a, b in pairs)


def main() -> int:
    command = parser(__doc__, "bench_cache")
    command.add_argument("--teacher", default="resnet56")
    command.add_argument("--student", default="resnet20")
    command.add_argument("--losses", nargs="+", default=["kd", "at"])
    command.add_argument("--samples", type=int, default=1024)
    command.add_argument("--batch", type=int, default=128)
    command.add_argument("--precision", choices=PRECISIONS, default="float32")
    command.add_argument(
        "--folder", default=None, help="where the caches are made; default: the system's for such files"
    )
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"{options.teacher} -> {options.student}, {options.samples} images, batch {options.batch}, {options.precision}, "
        f"{options.device}, {options.threads} threads, torch {torch.__version__}, {options.rounds} epochs\n"
    )
    seconds: dict[str, list[float]] = {}
    ratios, sizes, identical = {}, {}, True
    for loss in options.losses:
        setup = Setup(options, loss)
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            known: list[Features] = []
            cache = setup.cache(f"{folder}/cache")
            trainings = {
                "teacher": Training(setup),
                "filling": Training(setup, cache, gives=known),
                "cached": Training(setup, setup.cache(f"{folder}/cache")),
                "memory": Training(setup, takes=known),
            }
            taken = measure({name: t.epoch for name, t in trainings.items()}, options.rounds, setup.device)
            print(f"{loss}, an epoch:")
            median = medians(taken)
            same = all(trainings["teacher"].agrees(t) for t in trainings.values())
            identical &= same
            ratios[loss] = {
                "teacher / cached": median["teacher"] / median["cached"],
                "teacher / memory": median["teacher"] / median["memory"],
                "filling / teacher": median["filling"] / median["teacher"],
            }
            for name, ratio in ratios[loss].items():
                print(f"  {ratio:9.2f}      {name}")
            sizes[loss] = cache.bytes // (setup.epochs * options.samples)
            steps = len(trainings["teacher"].losses)
            print(f"  {sizes[loss]:9,} B    on disk per sample and epoch; {cache.describe()}")
            print(f"  {steps:9}      losses and the parameters {'identical' if same else 'NOT identical'}\n")
            seconds |= {f"{loss}: {name}": values for name, values in taken.items()}
    save(options, seconds, ratios, bytes_per_row=sizes, losses_identical=identical)
    return 0 if identical else 1


if __name__ == "__main__":
    sys.exit(main())
