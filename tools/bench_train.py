"""Images per second of whole training steps, data included, against a plain reference step.

    python tools/bench_train.py                                        # ResNet-56 → ResNet-20, batch 128
    python tools/bench_train.py --teacher wrn_40_2 --student wrn_16_2

The reference is written here as the field's repositories write it: float32, NCHW, a DataLoader with workers, torchvision's
transforms on one PIL image at a time, the losses as loops over layers, SGD as it comes. Ours is what `distpro retrain`
runs: `distpro.train.trainer.Trainer` on `distpro.data.Loader`. Both see the same random uint8 images (crop, flip, normalise) and
random weights; time does not depend on them. All are timed in turn in one process; a round is ``--steps`` steps of each.
KD also runs in torchdistill's own DistillationBox, if that is installed (``pip install torchdistill``).

On a CPU it also says what bounds our steps: what they spend their time on (from a profile of one step), the speed of their convolutions,
and that of a matrix product. Convolutions are the same mathematics in both forms, so a step cannot become faster than they are.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from benchmark import hardware, measure, medians, parser, repeated, save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from distpro.data import Loader, Split
from distpro.losses import build_loss
from distpro.models import build_model
from distpro.objective import Objective, Term
from distpro.schedule import Schedule
from distpro.train.trainer import Trainer
from distpro.weights import replay
from pathways import build_pathways, probe_shapes, tap

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
METHODS = ("plain", "kd", "at", "crd", "review", "distpro")
SAMPLES = 4096


class PilImages(Dataset):
    """One PIL image at a time through torchvision's transforms, with the sample's number for CRD."""

    def __init__(self, images: np.ndarray, labels: Tensor):
        from torchvision import transforms as T

        self.images, self.labels = images, labels
        self.transform = T.Compose(
            [T.RandomCrop(32, padding=4), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, n: int) -> tuple[Tensor, int, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[n])), int(self.labels[n]), n


class _Pairs(Dataset):
    """Image and label alone."""

    def __init__(self, images: PilImages):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, n: int) -> tuple[Tensor, int]:
        return self.images[n][:2]


def attention(f: Tensor) -> Tensor:
    return F.normalize(f.pow(2).mean(1).view(f.size(0), -1))


def hcl(students: list[Tensor], teachers: list[Tensor]) -> Tensor:
    """ReviewKD's loss as its code computes it: each level pools both maps anew."""
    total = torch.zeros(())
    for s, t in zip(students, teachers, strict=True):
        loss, weight, sum_of_weights = F.mse_loss(s, t), 1.0, 1.0
        for size in (4, 2, 1):
            if size < s.shape[2]:
                weight /= 2
                pooled = (F.adaptive_avg_pool2d(f, (size, size)) for f in (s, t))
                loss = loss + F.mse_loss(*pooled) * weight
                sum_of_weights += weight
        total = total + loss / sum_of_weights
    return total


class Reference:
    """The field's training step."""

    def __init__(self, options: argparse.Namespace, method: str, images: Tensor, labels: Tensor):
        torch.manual_seed(0)
        self.method, self.device = method, torch.device(options.device)
        self.teacher, self.student = (
            build_model(n, num_classes=100).to(self.device) for n in (options.teacher, options.student)
        )
        self.teacher.eval()
        x = torch.zeros(2, 3, 32, 32, device=self.device)
        self.loss = modules(method, self.teacher, self.student, x, len(labels))
        params = [*self.student.parameters(), *(self.loss.parameters() if self.loss is not None else ())]
        self.optimizer = torch.optim.SGD(params, 0.05, momentum=0.9, weight_decay=5e-4)
        dataset = PilImages(images.permute(0, 2, 3, 1).contiguous().numpy(), labels)
        loader = DataLoader(dataset, options.batch, shuffle=True, drop_last=True, num_workers=options.workers)
        self.batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def step(self) -> None:
        x, y, index = (part.to(self.device) for part in next(self.batches))
        self.student.train()
        taps = self.student.stage_taps.post
        with tap(self.student, [*taps, self.student.stage_taps.embedding]) as s:
            output = self.student(x)
        loss = F.cross_entropy(output, y)
        if self.method != "plain":
            pre = self.teacher.stage_taps.pre if self.method == "review" else self.teacher.stage_taps.post
            with torch.no_grad(), tap(self.teacher, [*pre, self.teacher.stage_taps.embedding]) as t:
                taught = self.teacher(x)
            ours, theirs = [s[n] for n in taps], [t[n] for n in pre]
            if self.method == "kd":
                loss = (
                    loss + F.kl_div(F.log_softmax(output / 4, 1), F.softmax(taught / 4, 1), reduction="batchmean") * 16
                )
            elif self.method == "at":
                loss = loss + 1000 * sum(
                    (attention(a) - attention(b)).pow(2).mean() for a, b in zip(ours, theirs, strict=True)
                )
            elif self.method == "crd":
                embeddings = (f[model.stage_taps.embedding] for f, model in ((s, self.student), (t, self.teacher)))
                loss = loss + 0.8 * self.loss(*embeddings, target=y, index=index)
            else:
                assert self.loss is not None
                ours.append(s[self.student.stage_taps.embedding][:, :, None, None])
                theirs.append(t[self.teacher.stage_taps.embedding][:, :, None, None])
                loss = loss + hcl(self.loss.outputs(ours, [f.shape[2:] for f in theirs]), theirs)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def modules(method: str, teacher: nn.Module, student: nn.Module, x: Tensor, samples: int) -> nn.Module | None:
    """The trainable part of a method, the same in reference and ours."""
    if method not in ("crd", "review"):
        return None
    sides = []
    for model, stages in ((student, student.stage_taps.post), (teacher, teacher.stage_taps.pre)):  # type: ignore[union-attr]
        names = [*(stages if method == "review" else ()), model.stage_taps.embedding]  # type: ignore[union-attr]
        sides.append([probe_shapes(model, names, x)[n] for n in names])
    params = {"n_data": samples} if method == "crd" else {}
    return build_loss(method, *sides, **params).to(x.device)


class Torchdistill:
    """torchdistill's KD, as its sample configs set it up. Raises ImportError where it is not installed."""

    def __init__(self, options: argparse.Namespace, images: Tensor, labels: Tensor):
        from torchdistill.core.distillation import get_distillation_box

        torch.manual_seed(0)
        teacher, student = (build_model(n, num_classes=100) for n in (options.teacher, options.student))
        dataset = PilImages(images.permute(0, 2, 3, 1).contiguous().numpy(), labels)
        loader = {
            "dataset_id": "train", "sampler": {"class_or_func": torch.utils.data.RandomSampler, "kwargs": {}},
            "kwargs": {"batch_size": options.batch, "num_workers": options.workers, "drop_last": True},
        }  # fmt: skip
        whole = {
            "student_module_path": ".",
            "student_module_io": "output",
            "teacher_module_path": ".",
            "teacher_module_io": "output",
        }
        kd = {"key": "KDLoss", "kwargs": {**whole, "temperature": 4.0, "alpha": 0.5, "reduction": "batchmean"}}
        config = {
            "num_epochs": 1, "train_data_loader": loader, "val_data_loader": {},
            "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
            "student": {"forward_proc": "forward_batch_only"},
            "optimizer": {"key": "SGD", "kwargs": {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}},
            "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": {"criterion": kd, "weight": 1.0}}}},
        }  # fmt: skip
        self.box = get_distillation_box(
            teacher, student, {"train": _Pairs(dataset)}, config, torch.device(options.device), None, False, 1
        )
        self.box.pre_epoch_process(epoch=0)
        self.batches = itertools.chain.from_iterable(itertools.repeat(self.box.train_data_loader))

    def step(self) -> None:
        x, y, more = next(self.batches)
        device = self.box.device
        self.box.pre_forward_process()
        loss = self.box.forward_process(x.to(device), y.to(device), more)
        self.box.post_forward_process(loss)


class Ours:
    """What `distpro retrain` runs."""

    def __init__(self, options: argparse.Namespace, method: str, images: Tensor, labels: Tensor):
        torch.manual_seed(0)
        device = torch.device(options.device)
        teacher, student = (
            build_model(n, num_classes=100).to(device, memory_format=torch.channels_last)
            for n in (options.teacher, options.student)
        )
        x = torch.zeros(2, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
        terms = list(self.terms(method, teacher.eval(), student, x, len(labels)))
        self.objective = Objective(
            teacher if terms else None, student, terms, x, precision=None if options.precision == "float32" else getattr(torch, options.precision),
            compile=options.compile,
        )  # fmt: skip
        if method != "distpro":
            how = replay(self.objective, "constant", 10_000)
        else:
            count = len(terms)
            weights = torch.full((2, count), 1 / (count + 1))
            kept = torch.arange(count) < options.kept  # what a threshold has dropped costs nothing
            schedule = Schedule(
                tuple(t.key for t in terms), torch.tensor([t.level for t in terms]), kept.float().expand(2, -1), weights,
                tuple(t.transform_name for t in terms),
            )  # fmt: skip
            how = replay(self.objective, "searched", 10_000, schedule, threshold=0.5)
        params = self.objective.trainable_parameters()
        optimizer = torch.optim.SGD(params, 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
        loader = Loader(
            Split.of(images, labels), options.batch, mean=MEAN, std=STD, augment=["crop", "flip"], shuffle=True,
            drop_last=True, device=device, channels_last=True,
        )  # fmt: skip
        self.trainer = Trainer(self.objective, None, optimizer, how, loader, [], epochs=10_000)
        self.batches = loader.endless()

    @staticmethod
    def terms(method: str, teacher: nn.Module, student: nn.Module, x: Tensor, samples: int) -> Iterator[nn.Module]:
        post, pre = list(student.stage_taps.post), list(teacher.stage_taps.pre)  # type: ignore[union-attr]
        embeddings = [[m.stage_taps.embedding] for m in (student, teacher)]  # type: ignore[union-attr]
        if method == "kd":
            yield Term(build_loss("kd", [(100,)], [(100,)]), "kd", weight=1.0)
        elif method == "at":
            yield Term(build_loss("at"), "at", post, teacher.stage_taps.post, 1000.0)  # type: ignore[union-attr]
        elif method == "crd":
            yield Term(modules(method, teacher, student, x, samples), "crd", *embeddings, weight=0.8)  # type: ignore[arg-type]
        elif method == "review":
            loss = modules(method, teacher, student, x, samples)
            yield Term(loss, "review", [*post, *embeddings[0]], [*pre, *embeddings[1]], 1.0)  # type: ignore[arg-type]
        elif method == "distpro":
            yield from build_pathways(teacher, student, x, pre, post, transforms=["conv1x1", "conv3x3", "attention"])

    def step(self) -> None:
        self.trainer.train_step(next(self.batches))


KINDS = {"convolutions": ("conv",), "BatchNorm": ("batch_norm",), "ReLU": ("threshold_backward", "clamp_min", "relu")}


def profiled(step: Callable[[], None]) -> tuple[dict[str, float], float]:
    """Seconds of one step's operations by kind, forward and backward (the folded teacher's convolutions have BatchNorm and
    ReLU in them), and of all of them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    times = {event.key.lower(): event.self_cpu_time_total / 1e6 for event in profile.key_averages()}
    rest, kinds = dict(times), {}
    for kind, parts in KINDS.items():
        kinds[kind] = sum(rest.pop(name) for name in list(rest) if any(part in name for part in parts))
    return kinds, sum(times.values())


def operations(model: nn.Module, batch: int) -> int:
    """Floating-point operations of the convolutions of one forward pass, a multiplication and an addition counted as two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(batch, 3, 32, 32))
    return sum(n for name, n in counter.get_flop_counts()["Global"].items() if "conv" in str(name))


def bounds(
    made: Mapping[str, Ours], ratios: Mapping[str, float], options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """What our steps spend their time on, the speed of their convolutions beside that of a matrix product, and the ratios that
    nothing but faster convolutions could exceed, printed."""
    forward = {
        name: operations(build_model(name, num_classes=100), options.batch)
        for name in (options.teacher, options.student)
    }
    a = torch.randn(2048, 2048, dtype=getattr(torch, options.precision))
    a @ a  # the first one also starts threads
    start = time.perf_counter()
    for _ in range(5):
        a @ a
    product = 5 * 2 * 2048**3 / (time.perf_counter() - start) / 1e9
    print(f"\n  a matrix product of 2048²: {product:.0f} GFLOP/s")
    found = {}
    for method, ours in made.items():
        kinds, everything = min((profiled(ours.step) for _ in range(3)), key=lambda pair: pair[1])
        shares = {kind: seconds / everything for kind, seconds in kinds.items()}
        alone = ratios[method] / shares["convolutions"]
        found[method] = {**shares, "product": product, "convolutions_alone": alone}
        said = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
        if method in ("plain", "kd", "at"):  # the others' terms have convolutions too
            passes = 3 * forward[options.student] + (0 if method == "plain" else forward[options.teacher])
            found[method]["gflops"] = passes / kinds["convolutions"] / 1e9
            said += f"; convolutions at {found[method]['gflops']:.0f} GFLOP/s"
        print(f"  {method}: {said}; convolutions alone would give a ratio of {alone:.2f}")
    return found


def main() -> None:
    command = parser(__doc__, "bench_train")
    command.add_argument("--teacher", default="resnet56")
    command.add_argument("--student", default="resnet20")
    command.add_argument("--batch", type=int, default=128)
    command.add_argument("--steps", type=int, default=2, help="a round's steps of each")
    command.add_argument("--workers", type=int, default=2, help="of the reference's DataLoader")
    command.add_argument("--kept", type=int, default=3, help="pathways that the threshold has left of 27")
    command.add_argument("--precision", default="bfloat16", choices=("float32", "bfloat16"))
    command.add_argument("--compile", help="a backend of torch.compile for ours, such as inductor")
    command.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    options = command.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (SAMPLES, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(100, (SAMPLES,), generator=generator)
    runs: dict[str, Callable[[], None]] = {}
    ours_of: dict[str, Ours] = {}
    for method in options.methods:
        made = {"ours": Ours(options, method, images, labels)}
        if method != "distpro":
            made = {"reference": Reference(options, method, images, labels), **made}  # type: ignore[dict-item]
        if method == "kd":
            try:
                made["torchdistill"] = Torchdistill(options, images, labels)  # type: ignore[assignment]
            except ImportError as error:
                print(f"without torchdistill, which is not installed here ({error})")
        ours_of[method] = made["ours"]
        for who, setup in made.items():
            runs[f"{method}: {who}"] = repeated(setup.step, options.steps)
    seconds = measure(runs, options.rounds, torch.device(options.device))
    print(f"{options.teacher} -> {options.student}, batch {options.batch}, {options.device}, {options.threads} threads, "
          f"{options.precision} ({hardware(torch.device(options.device))}); a run is {options.steps} steps\n")  # fmt: skip
    median = medians(seconds)
    speed = {name: options.steps * options.batch / value for name, value in median.items()}
    ratios = {}
    print("\n  images/s   reference      ours   ratio")
    for method in options.methods:
        own, reference = speed[f"{method}: ours"], speed.get(f"{method}: reference", speed.get("kd: reference"))
        if reference is None:
            continue
        ratios[method] = own / reference
        note = " (reference: KD)" if method == "distpro" else ""
        print(f"  {method:10} {reference:9.0f} {own:9.0f} {own / reference:7.2f}{note}")
    if "kd: torchdistill" in speed:
        ratios["kd against torchdistill"] = speed["kd: ours"] / speed["kd: torchdistill"]
        print(
            f"  torchdistill's KD {speed['kd: torchdistill']:.0f}, ours {ratios['kd against torchdistill']:.2f} times that"
        )
    bound = {}
    if options.device == "cpu" and not options.compile:
        bound = bounds({method: ours for method, ours in ours_of.items() if method in ratios}, ratios, options)
    save(options, seconds, ratios, images_per_second=speed, bounds=bound)


if __name__ == "__main__":
    main()
