"""Data, task, metric, models and optimiser of somebody's own: as objects in Python, and by ``package.module:name``."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from itertools import count

import pytest
import torch
import yaml

import distpro
from distpro.cli import main
from distpro.config.reading import merge, read_config
from distpro.files import load_safely
from distpro.runs.export import export
from distpro.schedule import Schedule
from distpro.train.tracking import read_metrics
from distpro.train.trainer import Interrupted
from pathways import UserError
from tests.runs.test_resume import differences, stop_after

SOURCE = '''
"""Two spirals: points of the plane in two classes."""
import math
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from pathways.call import Call


class Spirals(Dataset):
    classes = ["one", "other"]

    def __init__(self, count, seed):
        draw = torch.Generator().manual_seed(seed)
        self.targets = torch.randint(2, (count,), generator=draw)
        angle = 3 * torch.rand(count, generator=draw) + math.pi * self.targets
        self.points = torch.stack([angle.cos(), angle.sin()], 1) * (0.2 + torch.rand(count, 1, generator=draw))

    def __len__(self):
        return len(self.points)

    def __getitem__(self, n):
        return self.points[n], self.targets[n]


def parts(count=40):
    return Spirals(count, 0), Spirals(16, 1), Spirals(20, 2)


def loaders(count=40):
    train, validation, test = parts(count)
    return DataLoader(train, 10, shuffle=True), DataLoader(validation, 8, shuffle=True), DataLoader(test, 7)


class Own(Sampler):
    """In an order that nobody knows."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter(torch.randperm(self.count).tolist())


def unsteady(count=40):
    train, validation, test = parts(count)
    return DataLoader(train, 10, sampler=Own(count)), validation, test


class Net(nn.Module):
    def __init__(self, width=4, outputs=2):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(2, width), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.head = nn.Linear(width, outputs)

    def forward(self, points):
        hidden = self.second(self.first(points))
        return {"scores": self.head(hidden), "hidden": hidden}


class Margin:
    """Classes by a hinge; the mean hinge is its headline, and lower is better."""

    headline, higher_is_better = "hinge", False

    def __init__(self, margin=1.0):
        self.margin = margin

    def model_arguments(self, data):
        return {"outputs": data.num_classes}

    def call(self, batch, training):
        return Call.of(batch.inputs)

    def loss(self, output, batch):
        return nn.functional.multi_margin_loss(output["scores"], batch.target, margin=self.margin)

    def response(self, output):
        return output["scores"]

    def labels(self, batch):
        return batch.target, None

    def metrics(self):
        return Mean("hinge", lambda output, batch: self.loss(output, batch) * batch.samples)


class Mean:
    def __init__(self, name, measure):
        self.name, self.measure, self.sum, self.count = name, measure, 0.0, 0

    def update(self, output, batch):
        self.sum += float(self.measure(output, batch))
        self.count += batch.samples

    def state(self):
        return [self.sum, self.count]

    def merge(self, states):
        self.sum, self.count = (sum(values) for values in zip(*states))

    def compute(self):
        return {self.name: self.sum / self.count}


class Soft(Margin):
    """Of a loss that has a second derivative."""

    def loss(self, output, batch):
        return nn.functional.cross_entropy(output["scores"], batch.target)


class Hits(Mean):
    """Share of right answers, times ``scale``."""

    def __init__(self, scale=1.0):
        super().__init__("hits", lambda o, b: scale * (o["scores"].argmax(1) == b.target).sum())


class Signs(torch.optim.Optimizer):
    """Steps along the signs of the averaged gradient."""

    def __init__(self, params, lr, decay=0.5):
        super().__init__(params, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    mean.mul_(group["decay"]).add_(p.grad, alpha=1 - group["decay"])
                    p.sub_(group["lr"] * mean.sign())
'''

numbers = count()


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The name of a module with the parts, which lies in the current directory and nowhere else."""
    name = f"own_parts_{next(numbers)}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    sys.modules.pop(name, None)


def module_of(own, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module(own)


def plain(changes=None):
    """What a config says beside the parts."""
    taps = ["first", "second"]
    config = {
        "threads": 1,
        "precision": "float32",
        "student": {"model": "given", "taps": taps},
        "teacher": {"model": "given", "taps": taps},
        "terms": [{"loss": "kd"}, {"loss": "l2", "student_taps": ["second"], "teacher_taps": ["second"]}],
        "training": {"epochs": 3, "batch_size": 10, "optimizer": {"lr": 0.1}, "learning_rate": {"name": "constant"}},
        "tracking": {"tensorboard": False, "log_every": 2},
    }
    return merge(config, changes or {})


def teacher_of(module):
    torch.manual_seed(5)
    return module.Net(8)


def student_of(module):
    torch.manual_seed(0)
    return module.Net()


def by_name(own, module, data="parts", changes=None):
    """The config that names every part."""
    torch.save(teacher_of(module).state_dict(), "teacher.pt")
    named = {
        "data": {"name": f"{own}:{data}"},
        "task": {f"{own}:Margin": {"margin": 0.5}},
        "metrics": [{f"{own}:Hits": {"scale": 100}}],
        "teacher": {"model": f"{own}:Net", "params": {"width": 8}, "checkpoint": "teacher.pt"},
        "student": {"model": f"{own}:Net"},
        # no fused or known formula: a search needs one whose derivative is known, a retrain takes any
        "retrain": {"training": {"optimizer": {"name": f"{own}:Signs", "lr": 0.01, "params": {"decay": 0.25}}}},
    }
    return plain(merge(named, changes or {}))


# As objects


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
def test_objects_through_a_search_over_a_horizon(kind, own, tmp_path, monkeypatch):
    """Each trial begins from the student's weights as they were handed over; judged by the headline, there is no loss."""
    module = module_of(own, monkeypatch, tmp_path)
    student, task = student_of(module), module.Soft()
    before = copy.deepcopy(student.state_dict())
    objects = {"data": getattr(module, kind)(), "teacher": teacher_of(module), "task": task, "student": student}
    config = plain({"search": {"horizon": 4, "trials": 5}})
    schedule = distpro.search(config, out="search", **objects)
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


# By name


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
