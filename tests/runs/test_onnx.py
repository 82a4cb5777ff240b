"""An ONNX file gives the numbers of the student that it was made of: a tiny one of each kind, in batches of another size than
that it was written with."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import distpro
from distpro.models import load_checkpoint
from distpro.runs.export import export
from pathways.containers import entries
from tests import own_models
from tests.onnx_files import ROUNDING, answers
from tests.runs.test_any_model import KINDS

pytestmark = pytest.mark.slow

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

HERE = "tests.runs.test_onnx"


class Two(nn.Module):
    """A tuple out, in another: features, and what the task reads."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.first, self.last = nn.Linear(192, 5), nn.Linear(5, num_classes)

    def forward(self, x):
        features = self.first(x.flatten(1)).relu()
        return (features,), self.last(features)


class OfTwo(distpro.tasks.Classification):
    """Reads the second of two."""

    def response(self, output):
        return output[1]

    def loss(self, output, batch):
        return super().loss(output[1], batch)

    def metrics(self):
        inner = super().metrics()
        update = inner.update
        inner.update = lambda output, batch: update(output[1], batch)
        return inner


def squares(folder):
    """8×8 images of three classes, as npz."""
    draw, y = np.random.default_rng(0), np.arange(12) % 3
    x = draw.integers(0, 255, (12, 8, 8, 3), np.uint8)
    np.savez(folder / "squares.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    return {"name": "npz", "root": str(folder / "squares.npz"), "augment": []}


def maps(folder, kind, values):
    """Images and maps of 32×48 pixels."""
    draw = np.random.default_rng(0)
    for part in ("train", "test"):
        for name, content in ((part, None), (f"{part}{kind}", values)):
            (folder / name).mkdir()
            for n in range(4):
                pixels = draw.integers(0, 255, (32, 48, 3), np.uint8) if content is None else content(draw)
                Image.fromarray(pixels).save(folder / name / f"{n}.png")
    return {"root": str(folder), "augment": []}


def labels(draw):
    return draw.integers(0, 3, (32, 48), np.uint8)


def millimetres(draw):
    return draw.integers(500, 3000, (32, 48)).astype(np.uint16)


def vit(folder):
    params = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3}
    return {"data": squares(folder), "student": {"model": "deit", "params": params}}


def two(folder):
    return {"data": squares(folder), "student": {"model": f"{HERE}:Two"}, "task": f"{HERE}:OfTwo"}


def segmenter(folder):
    parts = {"names": ["a", "b", "c"], "lists": None, "splits": {"train": "train", "validation": None, "test": "test"}}
    data = {"name": "segmentation", **maps(folder, "annot", labels), "params": parts}
    student = {"model": "pspnet", "params": {"encoder": "resnet10t", "width": 16}}
    return {"task": "segmentation", "data": data, "student": student}


def depths(folder):
    parts = {"images": "{split}/*.png", "depths": "{split}depth/*.png"}
    data = {"name": "depth", **maps(folder, "depth", millimetres), "params": parts}
    student = {"model": "encoder_decoder", "params": {"encoder": "timm:resnet10t", "width": 64}}
    return {"task": "depth", "data": data, "student": student}


def tagger(folder):
    return {name: KINDS["tagger"][name] for name in ("task", "data", "student")}


def ids():
    few = own_models.Texts(5, 3, per_token=True)
    return {"input_ids": few.ids, "attention_mask": few.mask}


@pytest.mark.parametrize(
    ("config", "inputs", "outputs"),
    [
        (vit, (3, 8, 8), ["logits"]),
        (two, (3, 8, 8), ["output_0.0", "logits"]),
        (segmenter, (3, 32, 48), ["logits", "aux"]),
        (depths, (3, 32, 48), ["depth"]),
        (tagger, None, ["hidden", "logits"]),
    ],
    ids=["vit", "tuple", "segmentation", "depth", "dict"],
)
def test_the_file_gives_the_student_s_numbers(config, inputs, outputs, tmp_path, monkeypatch):
    if config in (vit, segmenter, depths):
        pytest.importorskip("timm")
    students = []

    def load(student, *rest):
        students.append(student)
        return load_checkpoint(student, *rest)

    monkeypatch.setattr("distpro.runs.export.load_checkpoint", load)
    few = {"training": {"batch_size": 4, "max_steps": 1}, "tracking": {"tensorboard": False}}
    distpro.train({"threads": 1, "precision": "float32", **config(tmp_path), **few}, out=tmp_path / "run")
    large = config is two
    if large:
        monkeypatch.setattr("distpro.runs.export.ONE_FILE", 0)
    path = export(tmp_path / "run", "onnx")
    assert path.with_name("student.onnx.data").exists() == large
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [output.name for output in model.graph.output] == outputs
    facts = {entry.key: entry.value for entry in model.metadata_props}["distpro"]
    assert json.loads(facts) == json.loads((tmp_path / "run" / "data.json").read_text())
    torch.manual_seed(1)
    given = ids() if inputs is None else torch.randn(5, *inputs)
    found = answers(path, given)
    (student,) = students
    with torch.no_grad():
        said = entries(student(given) if inputs else student(**given)).values()
    for (name, ours), theirs in zip(found.items(), said, strict=True):
        assert theirs.std() > 0, name
        torch.testing.assert_close(ours, theirs, **ROUNDING)
