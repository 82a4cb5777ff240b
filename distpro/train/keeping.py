"""Which student a training leaves: that of the last step, its moving average, the best on validation data, or a mean of the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from distpro.console import note
from distpro.objective import Objective
from distpro.train import distributed

BESIDE = ("ema_", "validation_")
"""How the names of metrics begin that are not the student's on the test set."""


def logged(name: str) -> str:
    """Under which name a metric of an evaluation is logged."""
    validation = "validation_" in name
    return f"{'validation' if validation else 'test'}/{name.replace('validation_', '')}"


Tensors = list[Tensor] | tuple[Tensor, ...]

Test = Callable[[Any], dict[str, float]]
"""From a loader to the metrics of the student as it is."""


class MovingAverage(AveragedModel):
    """An exponential moving average of a module after every step, PyTorch's `AveragedModel`: the first update copies, each
    later one is average ← d · average + (1 − d) · weights. Real and complex buffers (BatchNorm's statistics) are averaged
    as parameters are; whole numbers are copied.

    decay: d. warmup: d is min(decay, (1 + n) / (10 + n)) at update n (from 0), as TensorFlow's ExponentialMovingAverage: a
    short training is not held by where it began.
    """

    def __init__(self, module: nn.Module, decay: float, warmup: bool = True):
        with _without_graphs(module):
            super().__init__(module, multi_avg_fn=self._blend, use_buffers=True)
        self.decay, self.warmup = decay, warmup
        self.requires_grad_(False)

    def decay_at(self, update: int) -> float:
        """d of an update, counted from 0."""
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay

    @torch.no_grad()
    def _blend(self, averaged: Tensors, current: Tensors, _: Any) -> None:
        if averaged[0].is_floating_point() or averaged[0].is_complex():
            torch._foreach_lerp_(averaged, current, 1 - self.decay_at(int(self.n_averaged)))  # a count on the CPU
        else:
            torch._foreach_copy_(averaged, current)


@dataclass
class Keeper:
    """Watches the evaluations of a training, and at its end leaves in the student what is to be kept.

    What is averaged and kept are parameters and buffers of the student, and of terms that answer in its place (SimKD's).

    Args:
        objective: whose student it is.
        ema: makes the moving average of a module; None: there is none.
        validation: loader of the data to choose by; None: nothing is chosen.
        keep: ``last``; ``best`` evaluation; ``average`` of the weights of the ``average_of`` best ones, with BatchNorm's
            statistics computed anew on ``train``. Where there is a moving average, ``last`` is that of the last step, and an
            evaluation's candidate is the better on ``validation`` of student and average.
        patience: evaluations without a better one after which `stops` is true.
        headline, higher_is_better: see `distpro.task.Task`.
    """

    objective: Objective
    headline: str
    higher_is_better: bool
    ema: Callable[[nn.Module], MovingAverage] | None = None
    validation: Any = None
    keep: str = "last"
    average_of: int = 10
    patience: int | None = None
    train: Any = None
    best: dict[str, Any] = field(default_factory=dict)  # value, epoch and averaged of the best candidate
    since_best: int = 0

    def __post_init__(self) -> None:
        deployed = [term for term in self.objective.terms if term.deploys]
        self.whole = nn.ModuleList([self.objective.student.model, *deployed])
        self.average = None if self.ema is None else self.ema(self.whole)
        self._kept: list[dict[str, Any]] = []  # best first: value, epoch, averaged, weights
        self.facts: dict[str, float] = {}  # of the one evaluation that is kept, for the result

    @property
    def stops(self) -> bool:
        """Whether the training is to end early."""
        return self.patience is not None and self.since_best >= self.patience

    def after_step(self) -> None:
        """Take the student of this step into the moving average."""
        if self.average is not None:
            self.average.update_parameters(self.whole)

    def share(self) -> None:
        """The moving average's statistics as means over the ranks, as the student's are."""
        if self.average is not None:
            distributed.average(b for b in self.average.module.buffers() if b.is_floating_point())

    def evaluate(self, epoch: float, test: Test, loader: Any) -> dict[str, float]:
        """Metrics of the moving average on ``loader`` (``ema_...``), and of both on the validation part (``validation_...``,
        ``ema_validation_...``); the choice is made by those."""
        found: dict[str, float] = {}
        candidates = []
        for name, weights in (("", None), ("ema_", self._averaged())):
            if name and weights is None:
                continue
            with self._wearing(weights):
                if name:
                    found |= {f"ema_{key}": value for key, value in test(loader).items()}
                if self.validation is not None:
                    metrics = test(self.validation)
                    found |= {f"{name}validation_{key}": value for key, value in metrics.items()}
                    candidates.append({"value": metrics[self.headline], "epoch": epoch, "averaged": bool(name)})
        if candidates:
            self._choose(max(candidates, key=self._worth))
        return found

    def _worth(self, candidate: Mapping[str, Any]) -> float:
        value = candidate["value"] * (1 if self.higher_is_better else -1)
        return -math.inf if math.isnan(value) else float(value)

    def _choose(self, candidate: dict[str, Any]) -> None:
        better = not self.best or self._worth(candidate) > self._worth(self.best)
        self.best, self.since_best = (dict(candidate), 0) if better else (self.best, self.since_best + 1)
        room = {"last": 0, "best": 1, "average": self.average_of}[self.keep]
        if room and (len(self._kept) < room or self._worth(candidate) > self._worth(self._kept[-1])):
            weights = self._averaged() if candidate["averaged"] else _tensors(self.whole)
            assert weights is not None
            candidate["weights"] = {name: tensor.clone() for name, tensor in weights.items()}
            self._kept = sorted([*self._kept, candidate], key=self._worth, reverse=True)[
                :room
            ]  # stable: the earlier first

    def leave(self) -> bool:
        """Conclude, say what was done, and whether the student is another than that of the last step."""
        said = [self.why_it_stopped()] if self.stops else []
        kept = self.conclude()
        if distributed.is_main():
            for line in (*said, *([kept] if kept else [])):
                note(line)
        return bool(kept)

    def conclude(self) -> str:
        """Put what is kept into the student, and say in words what that is; "" where it is the student of the last step."""
        if self._kept:
            first, whole = self._kept[0], {True: " of the moving average", False: ""}
            if self.keep == "best":
                self.facts = {"kept_epoch": first["epoch"], "kept_ema": int(first["averaged"])}
                _put(self.whole, first["weights"])
                return f"kept: epoch {first['epoch']:g}{whole[first['averaged']]}, validation {self._said(first)}"
            _put(self.whole, _mean([one["weights"] for one in self._kept]))
            refresh_statistics(self.objective, self.train)
            epochs = ", ".join(f"{one['epoch']:g}" + " (moving average)" * one["averaged"] for one in self._kept)
            return f"kept: the mean of epochs {epochs}, the best on validation data"
        if self.average is not None:
            weights = self._averaged()
            assert weights is not None
            _put(self.whole, weights)
            return f"kept: the moving average (decay {self.average.decay:g}) of the last step"
        return ""

    def why_it_stopped(self) -> str:
        """In words."""
        return (
            f"early stopping: no better validation {self.headline} in {self.since_best} evaluations than {self._said(self.best)} "
            f"of epoch {self.best['epoch']:g}"
        )

    def _said(self, candidate: Mapping[str, Any]) -> str:
        return f"{self.headline} {candidate['value']:.4g}"

    def _averaged(self) -> dict[str, Tensor] | None:
        return None if self.average is None else _tensors(self.average.module)

    @contextmanager
    def _wearing(self, weights: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Inside, the student has these weights; None: its own."""
        if weights is None:
            yield
            return
        own = {name: tensor.clone() for name, tensor in _tensors(self.whole).items()}
        _put(self.whole, weights)
        try:
            yield
        finally:
            _put(self.whole, own)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs."""
        average = {} if self.average is None else self.average.state_dict()
        return {"average": average, "best": self.best, "since_best": self.since_best, "kept": self._kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Back to a state from `state_dict`."""
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.best, self.since_best = dict(state["best"]), state["since_best"]
        device = self.objective.device
        self._kept = [
            {**one, "weights": {name: tensor.to(device) for name, tensor in one["weights"].items()}}
            for one in state["kept"]
        ]


@contextmanager
def _without_graphs(module: nn.Module) -> Iterator[None]:
    """Inside, the tensors that modules have as plain attributes are leaves, for others cannot be copied: what pruning and the old
    ``weight_norm`` compute from parameters before each pass."""
    found = [
        (vars(m), k, v) for m in module.modules() for k, v in vars(m).items() if isinstance(v, Tensor) and not v.is_leaf
    ]
    for attributes, name, value in found:
        attributes[name] = value.detach()
    try:
        yield
    finally:
        for attributes, name, value in found:
            attributes[name] = value


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}


@torch.no_grad()
def _put(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, tensor in _tensors(module).items():
        tensor.copy_(weights[name])


def _mean(several: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each tensor; of whole numbers the first's."""
    wide = {False: torch.double, True: torch.cdouble}
    return {
        name: torch.stack([w[name].to(wide[first.is_complex()]) for w in several]).mean(0)
        if first.is_floating_point() or first.is_complex()
        else first
        for name, first in several[0].items()
    }


@torch.no_grad()
def refresh_statistics(objective: Objective, loader: Any) -> None:
    """BatchNorm's running statistics of the student as means over one epoch of a loader and all ranks: those of averaged
    weights are not the average of statistics (Izmailov et al., UAI 2018; `torch.optim.swa_utils.update_bn`). Frozen layers and
    students without any are left as they are."""
    was_training, model = objective.training, objective.student.model
    objective.train()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean
    for batch in loader.epoch(0) if norms else ():
        if batch.samples:
            with objective.autocast():
                objective.task.call(batch, True).run(model)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    distributed.average(b for norm in norms for b in norm.buffers() if b.is_floating_point())
    objective.train(was_training)
