"""The configs behind `distpro.distill`: from names and a folder of images to what `distpro train` and `distpro retrain` take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from distpro import build
from distpro.build.models import build_network
from distpro.config.reading import merge, read_config
from distpro.data import DATASETS
from distpro.data.classification import image_tree
from distpro.data.datasets import locate
from distpro.data.files import ImageFiles, Store, open_store
from distpro.data.statistics import Statistics, stated_by, stored_facts
from distpro.losses.usual import usual_weight
from distpro.models.loading import load_checkpoint, stored_metadata
from distpro.models.pretrained import Pretrained, pretrained
from pathways.registry import UserError, nearest

EPOCHS = 60
TEST_FRACTION = 0.2
SIDE = 224  # of images of several sizes, where no pretrained weights say another
LOOKED_AT = 100  # image files whose sizes are read
WARMUP = 0.1  # of the epochs
TRAINING: Mapping[str, Any] = {
    "optimizer": {"name": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    "clip_norm": 5.0,
}
SCRATCH, FINE = 0.05, 0.01  # learning rates for batches of 64, of random and of pretrained weights
SHARED = ("data", "device", "precision", "threads", "seed", "tracking", "compile", "channels_last")
"""Keys of overrides that the teacher's own training takes too, and these of `training`:"""
SHARED_TRAINING = ("batch_size", "max_steps", "drop_last")


@dataclass(frozen=True)
class Wish:
    """What a call of `distpro.distill` asks for; its docstring says what the attributes mean."""

    teacher: str | nn.Module
    student: str | nn.Module
    data: Any
    out: Path
    epochs: int = EPOCHS
    teacher_weights: str | Path | None = None
    teacher_pretrained: bool = False
    teacher_epochs: int | None = None
    student_pretrained: bool = False
    image_size: int | None = None
    losses: Sequence[str] = ("kd",)


@dataclass(frozen=True)
class Plan:
    """The configs of the teacher's own training (None where it has its weights) and of the student's, and the overrides of the
    former."""

    teacher: dict[str, Any] | None
    student: dict[str, Any]
    of_teacher: Sequence[str] = ()


def compose(wish: Wish, overrides: Sequence[str] = ()) -> Plan:
    """The configs of a wish. Nothing is trained, fetched or written. Raises UserError for what no run could do."""
    _check(wish)
    taught = _pretrained("teacher", wish.teacher, wish.teacher_pretrained)
    learner = _pretrained("student", wish.student, wish.student_pretrained)
    section, samples = _data(wish, taught or learner)
    of_teacher, of_student = _statistics(wish, taught), learner and _stated(learner)
    images = of_student or of_teacher
    common = merge({"training": TRAINING}, {"data": section})
    common["training"]["batch_size"] = min(64, max(8, samples // 10)) if samples else 64

    config = _trained(common, wish.student, learner, wish.epochs, images, fine=learner is not None)
    config["terms"] = [{"loss": name, "weight": 1.0 if name == "kd" else usual_weight(name)} for name in wish.losses]
    epochs = _teacher_epochs(wish)
    config["teacher"] = _model(wish.teacher, None if epochs else taught)
    in_files = isinstance(wish.data, (str, Path))  # objects may be normalised already, which nothing says
    if of_teacher is not None and (in_files or of_teacher != images):  # whatever data.mean and std become
        config["teacher"]["input"] = {"mean": list(of_teacher.mean), "std": list(of_teacher.std)}
    checkpoint = wish.out / "teacher" / "student.pt" if epochs else wish.teacher_weights
    if checkpoint is not None and isinstance(wish.teacher, str):
        config["teacher"]["checkpoint"] = str(checkpoint)
    own, taken = None, of_both(overrides)
    if of_teacher is not None and in_files:
        taken = [said for said in taken if said.partition("=")[0] not in ("data.mean", "data.std")]
    if epochs:
        fine = taught is not None or wish.teacher_weights is not None or isinstance(wish.teacher, nn.Module)
        own = _trained(common, wish.teacher, taught, epochs, of_teacher or images, fine)
        if wish.teacher_weights is not None:
            own["student"]["checkpoint"] = str(wish.teacher_weights)
        read_config(own, taken)
    _check_pair(config, overrides, wish.teacher_weights)
    return Plan(own, config, taken)


def of_both(overrides: Sequence[str]) -> list[str]:
    """Those overrides of the student's run that its teacher's training takes too."""
    taken = []
    for said in overrides:
        key, _, value = said.partition("=")
        first, _, rest = key.partition(".")
        if first in SHARED or (first == "training" and rest in SHARED_TRAINING):
            taken.append(said)
        elif key.startswith("teacher.params"):
            taken.append(f"student.{rest}={value}")
    return taken


def _check(wish: Wish) -> None:
    for name, least in (("epochs", 1), ("teacher_epochs", 0), ("image_size", 1)):
        number = getattr(wish, name)
        if number is not None and number < least:
            raise UserError(f"{name} is {number}: expected {least} or more")
    if not wish.losses:
        raise UserError("losses: expected one or more (distpro list losses)")
    if wish.teacher_weights is not None:
        if wish.teacher_pretrained or isinstance(wish.teacher, nn.Module):
            other = "pretrained ones of the library" if wish.teacher_pretrained else "those that the module has"
            raise UserError(f"teacher_weights: the teacher's weights are {other}, or those of a file, not both")
        locate("teacher_weights", wish.teacher_weights)
    known = wish.teacher_weights is not None or wish.teacher_pretrained or isinstance(wish.teacher, nn.Module)
    if wish.teacher_epochs == 0 and not known:
        raise UserError(
            "a teacher with random weights teaches nothing: teacher_weights (a file of them), teacher_pretrained, or "
            "teacher_epochs above 0, which trains it on the data"
        )


def _teacher_epochs(wish: Wish) -> int:
    if wish.teacher_epochs is not None:
        return wish.teacher_epochs
    return 0 if wish.teacher_weights is not None or isinstance(wish.teacher, nn.Module) else wish.epochs


def _pretrained(role: str, model: str | nn.Module, wanted: bool) -> Pretrained | None:
    if not wanted:
        return None
    if isinstance(model, nn.Module):
        raise UserError(f"{role}_pretrained: the {role} is a module, which has its weights")
    return pretrained(model)


def _model(model: str | nn.Module, weights: Pretrained | None) -> dict[str, Any]:
    name = model if isinstance(model, str) else f"{build.given.OBJECT}{type(model).__name__}"
    return {"model": name, **({} if weights is None else {"params": dict(weights.params)})}


def _trained(
    common: Mapping[str, Any],
    model: str | nn.Module,
    weights: Pretrained | None,
    epochs: int,
    images: Statistics | None,
    fine: bool,
) -> dict[str, Any]:
    """The config of a training: a warm-up and a cosine to the end."""
    rate = (FINE if fine else SCRATCH) * common["training"]["batch_size"] / 64
    training = {
        "epochs": epochs,
        "optimizer": {"lr": float(f"{rate:.3g}")},
        "learning_rate": {"name": "cosine", "warmup_epochs": round(WARMUP * epochs, 2)},
    }
    data = {} if images is None else {"mean": list(images.mean), "std": list(images.std)}
    own = {"training": training, "data": data, "tracking": {"evaluate_every": max(1, epochs // 20)}}
    return {**merge(common, own, clears=False), "student": _model(model, weights)}


def _stated(weights: Pretrained) -> Statistics | None:
    return Statistics(weights.mean, weights.std) if weights.mean and weights.std else None


def _statistics(wish: Wish, taught: Pretrained | None) -> Statistics | None:
    """The normalisation that a teacher's weights want, where the library or the file says it."""
    if taught is not None:
        return _stated(taught)
    if wish.teacher_weights is None:
        return None
    file = locate("teacher_weights", wish.teacher_weights)
    return stated_by(stored_metadata(file)) or stated_by(stored_facts(file.parent))


def _data(wish: Wish, weights: Pretrained | None) -> tuple[dict[str, Any], int | None]:
    """The config's data section, and the number of training samples where it is known."""
    if not isinstance(wish.data, (str, Path)):
        return {}, None
    name = str(wish.data)
    if name in DATASETS and not Path(name).exists():
        return {"name": name, "augment": ["crop", "flip"] if name.startswith("cifar") else []}, None
    try:
        path = locate("data", name)
    except UserError as error:
        near = nearest(name, list(DATASETS))
        raise UserError(f"{error}{near}") from None
    if path.suffix == ".npz":
        return {"name": "npz", "root": name}, None
    store = open_store(path)
    tree = image_tree(store, whole=True)
    classes = sorted({of.name for of, _ in tree["train"]})
    if len(classes) < 2:
        raise UserError(f"{path}: only one class: {classes[0]}")
    parted = "test" in tree or "val" in tree
    size, resize = _sizes(store, [file for part in tree.values() for _, file in part], wish.image_size, weights)
    params: dict[str, Any] = {} if parted else {"test_fraction": TEST_FRACTION}
    params |= {} if size is None else {"image_size": size, **({"resize": resize} if resize else {})}
    height, width = (size, size) if size else _size_of(store, tree["train"][0][1])
    section = {
        "name": "folder",
        "root": name,
        "params": params,
        "augment": [{"crop": {"padding": max(1, min(height, width) // 8)}}, "flip"],
        "num_classes": len(classes),
        "image_shape": [3, height, width],
    }
    return section, round(len(tree["train"]) * (1 if parted else 1 - TEST_FRACTION))


def _sizes(
    store: Store, files: Sequence[str], stated: int | None, weights: Pretrained | None
) -> tuple[int | None, int | None]:
    """(image_size, resize) of the folder's images: None as they are."""
    if stated is not None:
        return stated, None
    if weights is not None and weights.size is not None:
        return weights.size, weights.resize
    some = files[:: max(1, len(files) // LOOKED_AT)]
    found = {_size_of(store, file) for file in some}
    as_they_are = len(found) == 1 and max(side for size in found for side in size) <= SIDE
    return None if as_they_are else SIDE, None


def _size_of(store: Store, file: str) -> tuple[int, int]:
    """(height, width)"""
    width, height = ImageFiles(store, [file], (0, 0), None).open(0).size
    return height, width


def _check_pair(config: Mapping[str, Any], overrides: Sequence[str], weights: str | Path | None = None) -> None:
    """Build the pair with random weights where the data's shapes are known, or its mistakes would show only when its teacher has
    been trained; and load ``weights``, the teacher's file, into the teacher."""
    checked = read_config(config, overrides)
    build.check_names(checked)
    objects = any(m and m.model.startswith(build.given.OBJECT) for m in (checked.teacher, checked.student))
    unknown = checked.data.num_classes is None or checked.data.image_shape is None
    if objects or (unknown and weights is None):
        return
    for member in (checked.teacher, checked.student):
        for key in ("pretrained", "weights"):  # of which nothing is fetched for a look
            member.params.pop(key, None)  # type: ignore[union-attr]
    data, _ = build.blank_data(checked)
    build.compose(checked, data, load=False)
    if weights is not None and checked.teacher is not None:
        network = build_network(checked.teacher, build.build_task(checked).model_arguments(data), load=False)
        load_checkpoint(network, locate("teacher_weights", weights), weights=checked.teacher.weights)
