"""Promise 6: no silent lie. A number that is none is caught within one log interval, with its source; what cannot be meant is
said."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from distpro.losses.kd import KD
from distpro.objective import Objective
from distpro.train.trainer import Trainer
from torture.campaign import COMMON, TAUGHT, Campaign, command, fork, merged

LOG_EVERY = 3
BEFORE = "not finite before the first step"  # of a search that measures its terms first, which names them


def attack(campaign: Campaign, most: int) -> None:
    """NaN and infinity in every place, and every warning."""
    os.chdir(campaign.place)
    _prepare()
    kinds = [*INJECTED, *WARNED]
    for case, draw in campaign.cases("lies", most):
        kind = kinds[case % len(kinds)]
        if kind in INJECTED:
            _inject(campaign, case, kind, draw)
        else:
            _warn(campaign, case, kind)


def _prepare() -> None:
    if Path("teacher.pt").exists():
        return
    draw = np.random.default_rng(0)
    y = np.arange(120) % 4
    x = (draw.integers(0, 90, (120, 8, 8, 3)) + 40 * y[:, None, None, None]).astype(np.uint8)
    np.savez("data.npz", x_train=x[:80], y_train=y[:80], x_test=x[80:], y_test=y[80:])
    np.savez("inside.npz", x_train=x[:80], y_train=y[:80], x_test=x[40:80], y_test=y[40:80])
    np.savez("lacks.npz", x_train=x[:80], y_train=y[:80], x_test=x[80:][y[80:] != 2], y_test=y[80:][y[80:] != 2])
    few = y[:80] != 1
    np.savez("untaught.npz", x_train=x[:80][few], y_train=y[:80][few], x_test=x[80:], y_test=y[80:])
    Path("teacher.yaml").write_text(yaml.safe_dump(_config("data", {"student": {"model": "resnet14"}}, taught=False)))
    child = fork(command("train", "teacher.yaml", "--out", "teacher"))
    assert child.status == 0, child.said
    os.replace("teacher/student.pt", "teacher.pt")


def _config(data: str, changes: dict[str, Any] | None = None, taught: bool = True) -> dict[str, Any]:
    own = {
        "data": {"name": "npz", "root": f"{data}.npz", "samples": None, "augment": []},
        "tracking": {"log_every": LOG_EVERY},
    }
    below = merged(merged(COMMON, TAUGHT) if taught else COMMON, own)
    below["data"]["params"] = {}
    return merged(below, changes or {})


# Numbers that are none


def _at(owner: Any, name: str, step: int, change: Callable[..., Any]) -> None:
    """Replace a method by ``change(original, *args)`` in one training step."""
    original = getattr(owner, name)

    def hooked(*args: Any, **kwargs: Any) -> Any:
        return change(original, *args, **kwargs) if NOW[0] == step else original(*args, **kwargs)

    setattr(owner, name, hooked)


NOW = [-1]


def _count() -> None:
    original = Trainer.train_step

    def train_step(self: Trainer, *batches: Any) -> None:
        NOW[0] = self.step
        original(self, *batches)
        NOW[0] = -1

    Trainer.train_step = train_step  # type: ignore[method-assign]


def _set(tensor: torch.Tensor, value: float) -> None:
    tensor[(0,) * tensor.dim()] = value


def _gradient(step: int, value: float) -> None:
    def update(original: Any, trainer: Trainer) -> None:
        _set(next(p.grad for p in trainer.objective.trainable_parameters() if p.grad is not None), value)
        original(trainer)

    _at(Trainer, "_update", step, update)


def _parameter(step: int, value: float) -> None:
    def update(original: Any, trainer: Trainer) -> None:
        original(trainer)
        with torch.no_grad():
            _set(list(trainer.objective.student.parameters())[-1], value)

    _at(Trainer, "_update", step, update)


def _buffer(step: int, value: float) -> None:
    def update(original: Any, trainer: Trainer) -> None:
        original(trainer)
        _set(next(b for b in trainer.objective.student.buffers() if b.is_floating_point()), value)

    _at(Trainer, "_update", step, update)


def _loss(step: int, value: float) -> None:
    _at(KD, "forward", step, lambda original, *a, **k: original(*a, **k) * value)


def _teacher(step: int, value: float) -> None:
    """The teacher answers so to the samples of that step, whenever it is asked."""
    original, wrong = Objective.run_teacher, set[int]()

    def run_teacher(self: Objective, batch: Any) -> Any:
        if NOW[0] == step:
            wrong.update(batch.index.tolist())
        found = original(self, batch)
        if batch.index is not None and wrong & set(batch.index.tolist()):
            found = {name: t.clone() for name, t in found.items()}
            _set(found["logits"], value)
        return found

    Objective.run_teacher = run_teacher  # type: ignore[method-assign]


def _feature(step: int, value: float) -> None:
    def run_student(original: Any, self: Any, batch: Any, *a: Any, **k: Any) -> Any:
        output, features = original(self, batch, *a, **k)
        name = next(name for name in features if name != "logits")
        return output, {**features, name: features[name] * value}

    _at(Objective, "run_student", step, run_student)


def _batch(step: int, value: float) -> None:
    """Of one sample of the data, whenever it is drawn."""
    from distpro.data.loader import Loader

    original = Loader.epoch

    def epoch(self: Loader, *args: Any, **kwargs: Any) -> Any:
        for batch in original(self, *args, **kwargs):
            if batch.index is not None and 7 in batch.index.tolist() and len(self.split) != 40:
                batch.inputs[batch.index.tolist().index(7)] = value
            yield batch

    Loader.epoch = epoch  # type: ignore[method-assign]


INJECTED: dict[str, tuple[Callable[[int, float], None], str]] = {
    "gradient": (_gradient, "not finite"),
    "parameter": (_parameter, "not finite"),
    "buffer": (_buffer, "running_mean"),
    "loss": (_loss, "the kd loss"),
    "teacher": (_teacher, "the teacher's 'logits'"),
    "feature": (_feature, "layer"),
    "batch": (_batch, "an input of that step's batch"),
}


def _inject(campaign: Campaign, case: int, kind: str, draw: random.Random) -> None:
    hook, source = INJECTED[kind]
    step, value = draw.randrange(0, 12), draw.choice((float("nan"), float("inf"), -float("inf")))
    value = abs(value) if kind == "teacher" else value  # an answer of minus infinity is a class that is masked
    which = draw.choice(("search", "retrain"))
    Path("lie.yaml").write_text(yaml.safe_dump(_config("data", {"retrain": {"weights": "constant"}})))
    out = "lie"
    shutil.rmtree(out, ignore_errors=True)

    def before() -> None:
        _count()
        hook(step, value)

    child = fork(command(which, "lie.yaml", "--out", out, before=before))
    lines = [line for line in child.said.splitlines() if line.startswith("distpro: ") and "note:" not in line]
    ok = (
        child.status == 2
        and len(lines) == 1
        and (source in lines[0] or BEFORE in lines[0])
        and not (Path(out) / "result.json").exists()
    )
    campaign.end(
        "lies",
        case,
        f"{kind} {value} at step {step + 1} of a {which}",
        ok,
        status=child.status,
        said=lines or child.said[-400:],
    )


# What cannot be meant


WARNED: dict[str, tuple[str, dict[str, Any], str]] = {
    "the test part inside the training part": ("inside", {}, "are in the training part"),
    "a class that the test part lacks": ("lacks", {}, "no test sample of class"),
    "a class that the training part lacks": ("untaught", {}, "no training sample of class"),
    "a student that does not move": ("data", {"training": {"optimizer": {"lr": 1e-30}}}, "has not moved"),
    "a teacher of other classes": ("data", {"teacher": {"checkpoint": "wrong.pt"}}, "the teacher is right in"),
    "a term without a gradient": (
        "data",
        {"student": {"model": "resnet8"}, "freeze": ["conv1", "bn1", "layer1"]},
        "has no gradient",
    ),
}


def _warn(campaign: Campaign, case: int, kind: str) -> None:
    data, changes, said = WARNED[kind]
    state = torch.load("teacher.pt", weights_only=True)
    torch.save({k: v.roll(1, 0) if k.startswith(("fc", "linear")) else v for k, v in state.items()}, "wrong.pt")
    config = _config(data, {"retrain": {"weights": "constant"}, **changes})
    if kind == "a term without a gradient":
        config["pathways"] = {"connect": [["layer1:pre_relu", "layer1"]], "transforms": ["identity"]}
        config["teacher"] = {"model": "resnet14", "checkpoint": "teacher.pt"}
    shutil.rmtree("warned", ignore_errors=True)
    Path("warned.yaml").write_text(yaml.safe_dump(config))
    child = fork(command("retrain", "warned.yaml", "--out", "warned"))
    ok = child.status == 0 and any(said in line for line in child.said.splitlines() if "note:" in line)
    campaign.end("lies", case, kind, ok, status=child.status, said="" if ok else child.said[-800:])
