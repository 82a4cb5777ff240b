"""The runs that are killed: their commands and configs, each a few seconds long."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from torture import tiny
from torture.campaign import COMMON, TAUGHT, command, fork, merged


@dataclass(frozen=True)
class Subject:
    """A command of distpro.

    Args:
        kind: train, search, retrain or tune.
        config: of the run.
        processes: that run it together.
    """

    kind: str
    config: Mapping[str, Any] = field(repr=False)
    processes: int = 1


STAGES = [{"name": "one", "training": {"epochs": 1}}, {"name": "two", "training": {"epochs": 1}}]
TUNED = {"families": ["single"], "methods": ["kd", "at"], "trials": 3, "pruner": "none"}
KEPT = {"ema": {"decay": 0.8}, "keep": "best", "validation_fraction": 0.2, "patience": 2}
MEANT = {"keep": "average", "average_of": 2, "validation_fraction": 0.2, "accumulate": 2}
SHORT: dict[str, Any] = {"training": {"epochs": 1}}


def _small(task: str, model: str, data: Mapping[str, Any], *changes: Mapping[str, Any]) -> dict[str, Any]:
    """Of a model of `tiny`, with a teacher that is wider, and a pathway between their bodies."""
    models = {"model": f"torture.tiny:{model}", "taps": ["body"]}
    config = {
        **{key: COMMON[key] for key in ("threads", "device", "precision", "tracking")},
        "task": task,
        "data": data,
        "teacher": {**models, "params": {"width": 8}, "checkpoint": f"{model}.pt"},
        "student": models,
        "pathways": {"connect": "same", "transforms": ["conv1x1"], "distance": "l2"},
        "search": {"horizon": 2, "trials": 0},
        "training": {"epochs": 3, "batch_size": 4, "optimizer": {"lr": 0.01, "momentum": 0.9}},
    }
    for change in changes:
        config = merged(config, change)
    return config


def _digits(*changes: Mapping[str, Any]) -> dict[str, Any]:
    """Digits by `tiny.Images`."""
    own = {"training": {"batch_size": 20}, "pathways": {"distance": "hcl"}, "terms": [{"loss": "kd"}]}
    return _small("classification", "Images", COMMON["data"], own, *changes)


SEGMENTATION = _small(
    "segmentation",
    "Maps",
    {
        "name": "segmentation",
        "root": "data/maps",
        "params": {"names": ["a", "b", "c"], "lists": None},
        "augment": ["flip"],
    },
    {"terms": [{"loss": "kd"}, {"loss": "cwd"}]},
)
DEPTH = _small("depth", "Depths", {"name": "depth", "root": "data/depths"}, {"terms": [{"loss": "l1"}]})
TEXT = _small(
    "text",
    "Texts",
    {
        "name": "text",
        "root": "data/texts",
        "params": {
            "files": {part: f"{part}.tsv" for part in ("train", "validation", "test")},
            "tokenizer": {"train": {"size": 100}},
            "bucket": 2,
        },
    },
    {"pathways": {"transforms": ["tokens"]}, "terms": [{"loss": "kd"}]},
)
DETECTION = _small(
    "detection", "Boxes", {"name": "boxes_csv", "root": "data/boxes", "params": {"test": 4, "validation": 4}}
)
WHOLE: dict[str, Any] = {"search": {"horizon": "whole"}}
STRETCHES: dict[str, Any] = {"search": {"horizon": "whole", "memory": 0.00025}}
ROUNDS: dict[str, Any] = {"search": {"horizon": "whole", "rounds": 2, "knots": 2, "trials": 3}}
CONSTANT: dict[str, Any] = {"retrain": {"weights": "constant"}}

SUBJECTS: dict[str, Subject] = {
    "train": Subject("train", COMMON),
    "search": Subject("search", merged(COMMON, TAUGHT)),
    "retrain": Subject("retrain", merged(COMMON, {**TAUGHT, "retrain": {"schedule": "alpha.pt"}})),
    "stages": Subject("retrain", merged(COMMON, {**TAUGHT, **CONSTANT, "stages": STAGES})),
    "tune": Subject("tune", merged(COMMON, merged(TAUGHT, {**SHORT, "tune": TUNED}))),
    "the best of a moving average": Subject("train", merged(COMMON, {"training": KEPT})),
    "the mean of the best": Subject("train", merged(COMMON, {"training": MEANT})),
    "search over a horizon": Subject("search", _digits({"search": {"horizon": 6}})),
    "search over the whole training": Subject("search", _digits(WHOLE)),
    "search in stretches": Subject("search", _digits(STRETCHES)),
    "search with trials": Subject("search", _digits(WHOLE, {"search": {"trials": 6}})),
    "search in rounds": Subject("search", _digits(ROUNDS, SHORT)),
    "segmentation": Subject("search", SEGMENTATION),
    "depth": Subject("search", DEPTH),
    "text": Subject("search", TEXT),
    "detection": Subject("search", DETECTION),
    "detection, retrained": Subject("retrain", merged(DETECTION, CONSTANT)),
    "train by two processes": Subject("train", COMMON, processes=2),
    "search by two processes": Subject("search", _digits({"search": {"horizon": 1}}), processes=2),
    "horizon by two processes": Subject("search", _digits(), processes=2),
}


def prepare(place: Path) -> None:
    """Teachers, data and a schedule for the subjects, in a folder that becomes this process's."""
    (place / "teacher.yaml").write_text(yaml.safe_dump(merged(COMMON, {"student": {"model": "resnet14"}})))
    (place / "search.yaml").write_text(yaml.safe_dump(merged(COMMON, TAUGHT)))
    os.chdir(place)
    for made in place.parent.glob("*/alpha.pt"):  # by another part
        if (made.parent / "teacher.pt").exists() and (made.parent / "teacher.yaml").exists():
            for name in ("teacher.pt", "alpha.pt"):
                if not (place / name).exists():
                    shutil.copy(made.parent / name, name)
    if not (place / "teacher.pt").exists():
        assert fork(command("train", "teacher.yaml", "--out", "teacher")).status == 0
        shutil.copy("teacher/student.pt", "teacher.pt")
        assert fork(command("search", "search.yaml", "--out", "searched")).status == 0
        shutil.copy("searched/alpha.pt", "alpha.pt")
    if not (place / "data").exists():
        tiny.make_data(place / "data")
        for model, classes in ((tiny.Images, 10), (tiny.Maps, 3), (tiny.Depths, 1), (tiny.Texts, 2), (tiny.Boxes, 3)):
            torch.manual_seed(0)
            torch.save(model(classes, width=8).state_dict(), f"{model.__name__}.pt")


def arguments(name: str, out: str) -> list[str]:
    """The command line of a subject, which goes on where its folder holds a run."""
    path = Path(f"{folder_of(name)}.yaml")
    text = yaml.safe_dump(dict(SUBJECTS[name].config))
    if not path.exists() or path.read_text() != text:  # another run may be reading it
        path.write_text(text)
    begun = (Path(out) / "config.yaml").is_file()
    return [SUBJECTS[name].kind, str(path), "--out", out, *(["--resume"] if begun else [])]


def folder_of(name: str) -> str:
    return name.replace(" ", "_").replace(",", "")
