"""A run says its mean and std once: whoever uses its student later gives it images as it has learnt them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import distpro
from distpro.config.reading import merge
from distpro.data import load_data
from distpro.files import load_safely
from distpro.models import build_model
from distpro.runs.export import export
from distpro.schedule import Schedule
from pathways import UserError
from tests.digits import settings
from tests.onnx_files import ROUNDING, answers

pytestmark = pytest.mark.slow


def npz(path, seed, lift):
    """Digits of noise, brighter by ``lift``."""
    rng, y = np.random.default_rng(seed), np.arange(60) % 3
    x = (rng.integers(0, 60, (60, 8, 8, 3)) + lift + 30 * y[:, None, None, None]).astype(np.uint8)
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run, whose data lie in here.npz; another set is in there.npz."""
    folder = tmp_path_factory.mktemp("normalisation")
    for name, lift in (("here", 0), ("there", 100)):
        npz(folder / f"{name}.npz", lift, lift)
    distpro.train(config(folder), out=folder / "run")
    return folder


def config(folder, changes=None):
    data = {"name": "npz", "root": str(folder / "here.npz"), "samples": 30, "augment": [], "params": None}
    return settings(changes=merge({"data": data}, changes or {}))


def accuracy_and_loss(model, images, labels, mean, std):
    """By hand, in float64."""
    m, s = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (mean, std))
    with torch.no_grad():
        z = model.double().eval()((images.double() / 255 - m) / s)
    return {
        "accuracy": 100 * (z.argmax(1) == labels).double().mean().item(),
        "loss": nn.functional.cross_entropy(z, labels).item(),
    }


def test_the_folder_says_them(place):
    facts, data = json.loads((place / "run" / "data.json").read_text()), load_data("npz", place / "here.npz")
    assert (facts["mean"], facts["std"]) == (list(data.mean), list(data.std))


@pytest.mark.parametrize("bare", [False, True])
def test_evaluate_on_other_data_uses_those_of_the_run(bare, place):
    here, there = (load_data("npz", place / f"{name}.npz") for name in ("here", "there"))
    target = place / "run" / "student.pt" if bare else place / "run"
    recorded = place / "run" / "config.yaml" if bare else None
    found = distpro.evaluate(target, [f"data.root={place / 'there.npz'}"], config=recorded)
    student = build_model("resnet8", num_classes=3)
    student.load_state_dict(load_safely(place / "run" / "student.pt"))
    truth = accuracy_and_loss(student, there.test.images, there.test.labels, here.mean, here.std)
    assert {name: found[name] for name in truth} == pytest.approx(truth, rel=1e-4)
    said = distpro.evaluate(
        target,
        [f"data.root={place / 'there.npz'}", "data.mean=[0.5,0.5,0.5]", "data.std=[0.2,0.2,0.2]"],
        config=recorded,
    )
    other = accuracy_and_loss(student, there.test.images, there.test.labels, [0.5] * 3, [0.2] * 3)
    assert {name: said[name] for name in other} == pytest.approx(other, rel=1e-4)


def test_a_teachers_own_normalisation_is_used_where_it_is_evaluated(place, tmp_path):
    here = load_data("npz", place / "here.npz")
    taught = config(place, {"teacher": {"model": "resnet8", "checkpoint": str(place / "run" / "student.pt")}})
    taught |= {"terms": [{"loss": "kd"}], "data": {**taught["data"], "mean": [0.5] * 3, "std": [0.25] * 3}}
    taught["teacher"]["input"] = {"mean": list(here.mean), "std": list(here.std)}
    (tmp_path / "c.yaml").write_text(json.dumps(taught))
    expected = distpro.evaluate(place / "run")
    assert distpro.evaluate(tmp_path / "c.yaml") == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("stated", "said"), [(False, True), (True, False)])
def test_a_teacher_of_another_normalisation_is_said(stated, said, place, capsys):
    here = load_data("npz", place / "here.npz")
    teacher = {"model": "resnet8", "checkpoint": str(place / "run" / "student.pt")}
    if stated:
        teacher["input"] = {"mean": list(here.mean), "std": list(here.std)}
    changes = {"teacher": teacher, "terms": [{"loss": "kd", "weight": 1}], "training": {"max_steps": 1}}
    changes["retrain"] = {"weights": "constant"}
    distpro.retrain(config(place, {**changes, "data": {"mean": [0.5] * 3, "std": [0.25] * 3}}))
    lines = [line for line in capsys.readouterr().err.splitlines() if "teacher.input with its mean" in line]
    assert len(lines) == said
    distpro.retrain(config(place, changes))
    assert "teacher.input with its mean" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "given", [{"mean": [123.7], "std": [58.4]}, {"mean": [0.5], "std": [0.0]}, {"mean": [0.5], "std": [0.2, 0.2]}]
)
def test_a_teachers_normalisation_is_checked(given, place):
    teacher = {"model": "resnet8", "checkpoint": str(place / "run" / "student.pt"), "input": given}
    with pytest.raises(UserError, match="'teacher.input': mean and std"):
        distpro.retrain(config(place, {"teacher": teacher, "terms": [{"loss": "kd", "weight": 1}]}))


def test_a_retrain_by_the_schedule_alone_uses_those_of_the_search(place, tmp_path):
    teacher = {"model": "resnet8", "checkpoint": str(place / "run" / "student.pt")}
    changes = {"teacher": teacher, "terms": [{"loss": "kd"}, {"loss": "at"}]}
    distpro.search(config(place, changes), out=tmp_path / "search")
    schedule = Schedule.load(tmp_path / "search" / "alpha.pt")
    facts = json.loads((tmp_path / "search" / "data.json").read_text())
    assert (schedule.meta["data"]["mean"], schedule.meta["data"]["std"]) == (facts["mean"], facts["std"])
    npz(place / "here.npz", 0, 40)  # the file has been replaced
    try:
        distpro.retrain(schedule=schedule, out=tmp_path / "retrain", overrides=["training.max_steps=1"])
    finally:
        npz(place / "here.npz", 0, 0)
    kept = json.loads((tmp_path / "retrain" / "data.json").read_text())
    assert (kept["mean"], kept["std"]) == (facts["mean"], facts["std"])


def test_stages_leave_them_in_the_runs_folder(place, tmp_path):
    distpro.retrain(
        config(
            place,
            {"retrain": {"weights": "none"}, "stages": [{"name": "one"}, {"name": "two"}], "training": {"epochs": 1}},
        ),
        out=tmp_path / "run",
    )
    kept, whole = (json.loads((folder / "data.json").read_text()) for folder in (tmp_path / "run", place / "run"))
    assert (kept["mean"], kept["std"]) == (whole["mean"], whole["std"])


# Export


@pytest.mark.parametrize("format", ["safetensors", "pt2", "onnx"])
def test_an_exported_file_says_them(format, place, tmp_path):
    pytest.importorskip({"safetensors": "safetensors", "pt2": "torch", "onnx": "onnxscript"}[format])
    path, facts = (
        export(place / "run", format, tmp_path / f"s.{format}"),
        json.loads((place / "run" / "data.json").read_text()),
    )
    if format == "safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            found = file.metadata()["distpro"]
    elif format == "pt2":
        files = {"data.json": ""}
        torch.export.load(path, extra_files=files)
        found = files["data.json"]
    else:
        import onnx

        model = onnx.load(path)
        found = {entry.key: entry.value for entry in model.metadata_props}["distpro"]
        assert [output.name for output in model.graph.output] == ["logits"]
        onnx.checker.check_model(model, full_check=True)
        images = load_data("npz", place / "here.npz").test.images[:7].double()
        mean, std = (torch.tensor(facts[name], dtype=torch.float64).view(1, 3, 1, 1) for name in ("mean", "std"))
        student = build_model("resnet8", num_classes=3).eval()
        student.load_state_dict(load_safely(place / "run" / "student.pt"))
        given = (images / 255 - mean) / std  # as somebody does who has read the file's metadata
        with torch.no_grad():
            truth = student.double()(given).float()
        torch.testing.assert_close(answers(path, given.float())["logits"], truth, **ROUNDING)
    assert json.loads(found) == facts
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode  # as the umask says


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self, num_classes=3):
        super().__init__()
        self.first, self.second = nn.Linear(192, 192, bias=False), nn.Linear(192, 192, bias=False)
        self.second.weight = self.first.weight
        self.last = nn.Linear(192, num_classes)

    def forward(self, x):
        return self.last(self.second(self.first(x.flatten(1)).relu()).relu())


@pytest.mark.parametrize("format", ["safetensors", "pt2", "onnx"])
def test_tied_weights_are_exported(format, place, tmp_path, capsys):
    pytest.importorskip({"safetensors": "safetensors", "pt2": "torch", "onnx": "onnxscript"}[format])
    name = f"{__name__}:Tied"
    distpro.train(config(place, {"student": {"model": name}, "training": {"epochs": 1}}), out=tmp_path / "run")
    student = Tied()
    distpro.models.load_checkpoint(student, tmp_path / "run" / "student.pt")
    assert student.first.weight is student.second.weight
    capsys.readouterr()
    path = export(tmp_path / "run", format)
    x = torch.rand(5, 3, 8, 8)
    if format == "safetensors":
        from safetensors.torch import load_file

        assert "first.weight and second.weight are one tensor in the student" in capsys.readouterr().err
        again, state = Tied(), load_file(path)
        again.load_state_dict(state)
        assert torch.equal(again(x), student(x)) and torch.equal(state["first.weight"], state["second.weight"])
        fresh = Tied()
        assert distpro.models.load_checkpoint(fresh, path).ok and torch.equal(fresh(x), student(x))
    elif format == "pt2":
        program = torch.export.load(path)
        torch.testing.assert_close(program.module()(x), student(x))
        first, second = (program.state_dict[name] for name in ("first.weight", "second.weight"))
        assert first.data_ptr() == second.data_ptr()
    else:
        torch.testing.assert_close(answers(path, x)["logits"], student(x).detach(), **ROUNDING)
