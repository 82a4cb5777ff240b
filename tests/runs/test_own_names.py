"""Data, task, metric, models and optimiser of somebody's own, by ``package.module:name``: what a config and a schedule may name."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
import yaml

import distpro
from distpro.cli import main
from distpro.config.reading import merge, read_config
from distpro.files import load_safely
from distpro.schedule import Schedule
from pathways import UserError
from tests.own_parts import by_name, module_of, plain, student_of, teacher_of


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parts", "loaders"])
def test_names_through_every_command(kind, own, tmp_path, monkeypatch, capsys):
    """From the command line, and to the numbers of the objects."""
    module = module_of(own, monkeypatch, tmp_path)
    config = by_name(own, module, kind)
    (tmp_path / "cfg.yaml").write_text(yaml.safe_dump(config))
    for arguments in (
        ["search", "cfg.yaml", "--dry-run"],
        ["search", "cfg.yaml", "--out", "search"],
        ["retrain", "cfg.yaml", "--schedule", "search/alpha.pt", "--dry-run"],
        ["retrain", "cfg.yaml", "--schedule", "search/alpha.pt", "--out", "retrain"],
        ["train", "cfg.yaml", "--out", "alone"],
        ["evaluate", "retrain"],
    ):
        assert main(arguments) == 0, capsys.readouterr().err
    found = json.loads("{" + capsys.readouterr().out.rpartition("{")[2])
    result = json.loads((tmp_path / "retrain" / "result.json").read_text())
    assert found == {"hinge": pytest.approx(result["hinge"]), "hits": pytest.approx(result["hits"])}
    assert 0 <= result["hits"] <= 100 and result["best_hinge"] <= result["hinge"]

    objects = {"data": getattr(module, kind)(), "teacher": teacher_of(module), "student": student_of(module)}
    same = distpro.search(plain(), task=module.Margin(0.5), **objects)
    assert torch.equal(same.weights, Schedule.load("search/alpha.pt").weights)


def test_the_optimiser_of_ones_own_moves_the_student(own, tmp_path, monkeypatch):
    """Each weight by 0.01 in each of 4 steps: an even multiple of it, and not by more than 4 of them."""
    module = module_of(own, monkeypatch, tmp_path)
    config = read_config(by_name(own, module, changes={"training": {"epochs": 1}, "retrain": {"weights": "none"}}))
    distpro.retrain(config, out="run")
    torch.manual_seed(0)
    for name, before in module.Net().state_dict().items():
        steps = (load_safely(tmp_path / "run" / "student.pt")[name] - before) / 0.01
        assert torch.allclose(steps, steps.round(), atol=1e-3) and steps.abs().max() <= 4.001


# Orders that nobody can repeat


@pytest.mark.slow
def test_a_run_says_that_it_cannot_be_repeated(own, tmp_path, monkeypatch, capsys):
    module = module_of(own, monkeypatch, tmp_path)
    words = "a resumed run will not come to the same numbers: the order comes from "
    config, objects = plain({"training": {"max_steps": 2}}), {"task": module.Margin()}
    train, validation, test = module.unsteady()
    for name, data, reason in (
        ("training", (train, validation, test), f"{own}.Own"),
        ("validation", (validation, train, test), f"{own}.Own"),
        ("steady", module.loaders(), None),
    ):
        models = {"teacher": teacher_of(module), "student": student_of(module)}
        distpro.search(config, out=name, data=data, **objects, **models)
        said = capsys.readouterr().out
        assert (words + reason in said.splitlines()[0]) if reason else words not in said
    distpro.search(config, data=(train, validation, test), **objects, **models)
    assert words not in capsys.readouterr().out  # nothing to resume
    alone = plain({"teacher": None, "terms": [], "training": {"max_steps": 2}})
    distpro.train(alone, out="alone", data=(train, test), student=student_of(module), **objects)
    assert words in capsys.readouterr().out


# A schedule runs no code


def test_a_schedule_that_names_code_is_refused(own, tmp_path, monkeypatch, capsys):
    module = module_of(own, monkeypatch, tmp_path)
    distpro.search(by_name(own, module, changes={"training": {"max_steps": 1}}), out="search")
    names = {
        "teacher.model": f"{own}:Net",
        "student.model": f"{own}:Net",
        "data.name": f"{own}:parts",
        "task": f"{own}:Margin",
        "metrics": f"{own}:Hits",
        "training.optimizer.name": f"{own}:Signs",
    }
    stored = Schedule.load("search/alpha.pt")
    plainly = merge(
        copy.deepcopy(stored.meta["config"]),
        {
            "data": {"name": "digits"},
            "task": "classification",
            "metrics": [],
            "teacher": {"model": "resnet14", "params": {}},
            "student": {"model": "resnet8", "params": {}},
            "retrain": {"training": {}},
        },
    )
    plainly["retrain"]["training"] = {}
    places = {
        "teacher.model": {"teacher": {"model": names["teacher.model"]}},
        "student.model": {"student": {"model": names["student.model"]}},
        "data.name": {"data": {"name": names["data.name"]}},
        "task": {"task": {names["task"]: {"margin": 0.5}}},
        "metrics": {"metrics": [names["metrics"]]},
        "training.optimizer.name": {"training": {"optimizer": {"name": names["training.optimizer.name"]}}},
    }
    sys.modules.pop(own)
    for key, change in places.items():
        for config in (merge(plainly, change), {**plainly, "stages": [change]}):
            stored.meta["config"] = config
            stored.save(tmp_path / "alpha.pt")
            assert main(["retrain", "--schedule", "alpha.pt", "--out", "run"]) == 2
            said = capsys.readouterr().err
            assert f"names code of its own, {key} '{names[key]}'" in said, (key, said)
            assert f"{key}={names[key]}" in said and len(said.splitlines()) == 1
    assert own not in sys.modules and not (tmp_path / "run").exists()
    assert main(["retrain", "--schedule", "alpha.pt", "--out", "run", f"name=x{own}:Signs"]) == 2  # another name


def test_a_schedule_that_is_trusted_repeats_its_code(own, tmp_path, monkeypatch):
    """Each name said again, as the message asks for, and the models' once: nothing of the config changes."""
    module = module_of(own, monkeypatch, tmp_path)
    distpro.search(by_name(own, module, changes={"training": {"max_steps": 2}}), out="search")
    trusted = [
        f"student.model={own}:Net",
        f"data.name={own}:parts",
        f"task={own}:Margin",
        f"metrics={own}:Hits",
        f"training.optimizer.name={own}:Signs",
    ]
    for missing in trusted[1:]:
        with pytest.raises(distpro.UserError, match=f"repeat it as {missing}, or give a config"):
            distpro.retrain(schedule="search/alpha.pt", overrides=[said for said in trusted if said != missing])
    result = distpro.retrain(schedule="search/alpha.pt", out="run", overrides=trusted)
    assert result.metrics["step"] == 2 and {"hinge", "hits"} <= result.metrics.keys()
    ours, theirs = (yaml.safe_load((tmp_path / run / "config.yaml").read_text()) for run in ("run", "search"))
    for key in ("data", "task", "metrics", "teacher", "student"):
        assert ours[key] == theirs[key], key
    another = [f"metrics=[{{{own}:Hits: {{scale: 1}}}}]", *(said for said in trusted if "metrics" not in said)]
    result = distpro.retrain(schedule="search/alpha.pt", overrides=another)
    assert result.metrics["hits"] <= 1


def test_a_run_is_not_resumed_on_other_data(tmp_path):
    """Of the same type, with another number of samples."""

    def data(count):
        generator = torch.Generator().manual_seed(count)
        return torch.utils.data.TensorDataset(torch.randn(count, 4, generator=generator), torch.arange(count) % 3)

    config = {"training": {"max_steps": 2, "batch_size": 8}, "tracking": {"tensorboard": False}}
    student = torch.nn.Linear(4, 3)
    distpro.train(config, data=(data(16), data(16)), student=student, out=tmp_path / "run")
    with pytest.raises(UserError, match="the data have changed since the run began"):
        distpro.train(config, data=(data(24), data(16)), student=student, out=tmp_path / "run", resume=True)
    distpro.train(config, data=(data(16), data(16)), student=student, out=tmp_path / "run", resume=True)
