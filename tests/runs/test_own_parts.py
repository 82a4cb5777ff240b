"""Data, task, metric, models and optimiser of somebody's own, as objects in Python."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import yaml

import distpro
from distpro.cli import main
from distpro.files import load_safely
from distpro.runs.export import export
from distpro.schedule import Schedule
from distpro.train.tracking import read_metrics
from distpro.train.trainer import Interrupted
from pathways import UserError
from tests.own_parts import module_of, plain, student_of, teacher_of
from tests.runs.test_resume import differences, stop_after


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parts", "loaders"])
def test_objects_through_every_command(kind, own, tmp_path, monkeypatch):
    module = module_of(own, monkeypatch, tmp_path)
    data, task = getattr(module, kind)(), module.Margin(0.5)
    objects = {"data": data, "teacher": teacher_of(module), "task": task}
    schedule = distpro.search(plain(), out="search", student=student_of(module), **objects)
    assert len(schedule) == 12 and schedule.keys == ("kd", "l2")

    student = student_of(module)
    result = distpro.retrain(plain(), schedule="search/alpha.pt", out="retrain", student=student, **objects)
    assert result.metrics["step"] == 12
    assert differences(load_safely(tmp_path / "retrain" / "student.pt"), student.state_dict()) == []
    found = distpro.evaluate("retrain", data=data, student=module.Net(), task=task)
    assert found == {"hinge": pytest.approx(result.metrics["hinge"])}

    alone = plain({"teacher": None, "terms": []})
    trained = distpro.train(alone, out="alone", data=data, student=student_of(module), task=task)
    assert trained.metrics["step"] == 12 and (tmp_path / "alone" / "student.pt").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parts", "loaders"])
def test_objects_through_a_search_over_a_horizon(kind, own, tmp_path, monkeypatch, capsys):
    """Each trial begins from the student's weights as they were handed over; judged by the headline, there is no loss."""
    module = module_of(own, monkeypatch, tmp_path)
    student, task = student_of(module), module.Soft()
    before = copy.deepcopy(student.state_dict())
    objects = {"data": getattr(module, kind)(), "teacher": teacher_of(module), "task": task, "student": student}
    config = plain({"search": {"horizon": 4, "trials": 7}})
    schedule = distpro.search(config, out="search", **objects)
    assert "a retrain of 12 steps takes about" in capsys.readouterr().out  # 3 epochs of 40 samples in batches of 10
    assert schedule.start == 1 and differences(student.state_dict(), before) == []
    found = {p.parent.name: json.loads(p.read_text()) for p in (tmp_path / "search" / "trials").glob("*/result.json")}
    best = min(found, key=lambda name: found[name]["hinge"])
    assert len(found) >= 4 and (best.startswith("equal") == (schedule.weights[-1, 0] == schedule.weights[-1, 1]).item())
    again = distpro.search(config, **{**objects, "data": getattr(module, kind)()})
    assert torch.equal(again.weights, schedule.weights)


def test_a_loss_without_a_second_derivative_is_named(own, tmp_path, monkeypatch):
    module = module_of(own, monkeypatch, tmp_path)
    objects = {
        "data": module.parts(),
        "teacher": teacher_of(module),
        "task": module.Margin(),
        "student": student_of(module),
    }
    with pytest.raises(
        UserError, match=r"search.horizon: multi_margin_loss has no second derivative .* search.horizon=1"
    ):
        distpro.search(plain({"search": {"horizon": 4}}), out="search", **objects)
    assert not (tmp_path / "search").exists()


def test_a_student_is_a_student_whatever_its_length(own, tmp_path, monkeypatch):
    module = module_of(own, monkeypatch, tmp_path)

    class Empty(module.Net):
        def __len__(self):
            return 0

    objects = {"data": module.parts(), "teacher": teacher_of(module), "task": module.Soft()}
    assert distpro.retrain(plain({"retrain": {"weights": "equal"}}), student=Empty(), **objects).metrics["step"] == 12


def test_a_student_that_cannot_be_copied_is_said(own, tmp_path, monkeypatch):
    module = module_of(own, monkeypatch, tmp_path)
    student = student_of(module)
    student.kept = torch.ones(2, requires_grad=True) * 2  # no leaf, as the old weight_norm keeps one
    objects = {"data": module.parts(), "teacher": teacher_of(module), "task": module.Soft()}
    with pytest.raises(UserError, match="student: Net cannot be copied, which a search does"):
        distpro.search(plain(), student=student, **objects)


def test_lower_is_better(own, tmp_path, monkeypatch):
    """The best of the headline is its minimum. A learning rate of 3 makes a training go up and down."""
    module = module_of(own, monkeypatch, tmp_path)
    config = plain({"teacher": None, "terms": [], "training": {"epochs": 8, "optimizer": {"lr": 3.0}}})
    result = distpro.train(config, out="run", data=module.parts(), student=student_of(module), task=module.Margin())
    hinges = [row["test/hinge"] for row in read_metrics("run") if "test/hinge" in row]
    assert len(hinges) == 8 and min(hinges) < hinges[-1]
    assert result.metrics["best_hinge"] == min(hinges) and result.metrics["hinge"] == hinges[-1]


@pytest.mark.slow
def test_the_recorded_config_says_that_they_were_objects(own, tmp_path, monkeypatch):
    module = module_of(own, monkeypatch, tmp_path)
    objects = {"data": module.parts(), "student": student_of(module), "teacher": teacher_of(module)}
    objects["task"] = module.Margin()
    distpro.search(plain({"training": {"max_steps": 2}}), out="search", **objects)
    recorded = yaml.safe_load((tmp_path / "search" / "config.yaml").read_text())
    assert recorded["student"]["model"] == recorded["teacher"]["model"] == "object:Net"
    assert recorded["task"] == "object:Margin" and recorded["data"]["name"] == "object:ForeignDataset"
    for missing, message in (
        ("task", r"task 'object:Margin' was handed over as an object: hand it over again \(task=...\)"),
        ("data", r"data 'object:ForeignDataset' was handed over as an object: hand it over again \(data=...\)"),
        ("student", r"student 'object:Net' was handed over as an object: hand it over again \(student=...\)"),
        ("teacher", r"teacher 'object:Net' was handed over as an object: hand it over again \(teacher=...\)"),
    ):
        others = {name: thing for name, thing in objects.items() if name != missing}
        with pytest.raises(distpro.UserError, match=message):
            distpro.search("search/config.yaml", **others)
    again = distpro.search("search/config.yaml", **{**objects, "student": student_of(module)})
    assert torch.equal(again.weights, Schedule.load("search/alpha.pt").weights)


def test_the_weights_of_objects_can_be_exported(own, tmp_path, monkeypatch):
    files = pytest.importorskip("safetensors.torch")
    module = module_of(own, monkeypatch, tmp_path)
    student = student_of(module)
    alone = plain({"teacher": None, "terms": []})
    distpro.train(alone, out="run", data=module.parts(), student=student, task=module.Margin())
    path = export("run", "safetensors")
    assert differences(files.load_file(path), load_safely(tmp_path / "run" / "student.pt")) == []
    with pytest.raises(distpro.UserError, match="'object:Net' was handed over as an object, which pt2 needs"):
        export("run", "pt2")


def test_the_command_line_cannot_repeat_objects(own, tmp_path, monkeypatch, capsys):
    module = module_of(own, monkeypatch, tmp_path)
    distpro.train(plain({"teacher": None, "terms": []}), out="run", data=module.parts(), student=student_of(module),
                  task=module.Margin())  # fmt: skip
    assert main(["evaluate", "run"]) == 2
    said = capsys.readouterr().err
    assert "was handed over as an object" in said and len(said.splitlines()) == 1


@pytest.mark.slow
def test_objects_resume_to_the_same_bytes(own, tmp_path, monkeypatch):
    module = module_of(own, monkeypatch, tmp_path)

    def go(out, resume=False):
        objects = {"data": module.loaders(), "student": student_of(module), "teacher": teacher_of(module)}
        distpro.search(plain(), out=out, resume=resume, task=module.Margin(), **objects)

    go("whole")
    stop_after(monkeypatch, [5])
    with pytest.raises(Interrupted):
        go("parts")
    go("parts", resume=True)
    states = [load_safely(tmp_path / out / "checkpoint.pt") for out in ("whole", "parts")]
    for state in states:
        del state["seconds"]
    assert differences(*states) == []
