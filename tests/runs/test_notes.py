"""What is said of models that know nothing, and of data sets that do not come again; what code of one's own raises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import TensorDataset

import distpro
from distpro.cli import main
from distpro.config.reading import merge, read_config
from distpro.files import load_safely
from distpro.models import build_model
from distpro.runs.unlike import said_of_schedule
from distpro.schedule import Schedule
from distpro.tasks import Classification
from distpro.train.trainer import Trainer
from tests.digits import random_teacher, settings
from tests.own_models import Mean

pytestmark = pytest.mark.slow

HERE = __name__


class Bright(nn.Module):
    """Knows the class of `images` without training; ``always``: says that class of every sample."""

    def __init__(self, num_classes=3, always=None):
        super().__init__()
        self.scale, self.num_classes, self.always = nn.Parameter(torch.ones(())), num_classes, always

    def forward(self, x):
        level = (x.mean((1, 2, 3))[:, None] - torch.linspace(-1, 1, self.num_classes)).square()
        z = -8 * self.scale * level
        return z if self.always is None else 0 * z + nn.functional.one_hot(torch.tensor(self.always), self.num_classes)


def images(count, shares=(1, 1, 1)):
    y = torch.arange(len(shares)).repeat_interleave(torch.tensor(shares)).repeat(count)[:count].sort().values
    x = torch.linspace(-1, 1, len(shares))[y].view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    return TensorDataset(x + 0.1 * torch.rand(x.shape), y)


def notes(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("distpro: note: ")]


def config(**training):
    chosen = {"epochs": 1, "batch_size": 20, "optimizer": {"lr": 1e-3}, **training}
    return settings(changes={"data": {"augment": [], "samples": None}, "training": chosen})


@pytest.mark.parametrize("count", [60, 1500])
@pytest.mark.parametrize(("always", "said"), [(None, False), (0, True), (2, True)])
def test_a_teacher_at_chance_level_is_said(count, always, said, capsys):
    data = images(60), images(count)
    given = config() | {"terms": [{"loss": "kd", "weight": 1}], "retrain": {"weights": "constant"}}
    given |= {"teacher": {"model": "object:Bright"}, "data": {"name": "object:tuple"}}
    distpro.retrain(given, data=data, teacher=Bright(always=always), student=Bright())
    found = [line for line in notes(capsys) if "the teacher is right in" in line]
    # somebody else's data are read from their beginning, where 1500 sorted samples are of one class
    assert len(found) == (said and count == 60)
    assert not found or "33.3% of 60 test samples, and one class for all of them in 33.3%" in found[0]


def test_it_is_found_in_a_folder_sorted_by_class(tmp_path, capsys):
    y = np.arange(1500) // 500
    x = np.broadcast_to((40 + 80 * y)[:, None, None, None], (1500, 8, 8, 3)).astype(np.uint8)
    np.savez(tmp_path / "x.npz", x_train=x[::25], y_train=y[::25], x_test=x, y_test=y)
    torch.save(Bright(always=1).state_dict(), tmp_path / "t.pt")
    given = config() | {"data": {"name": "npz", "root": str(tmp_path / "x.npz"), "mean": [0.47] * 3, "std": [0.26] * 3}}
    given |= {
        "terms": [{"loss": "kd", "weight": 1}],
        "retrain": {"weights": "constant"},
        "student": {"model": f"{HERE}:Bright"},
    }
    for always, said in ((1, 1), (None, 0)):
        taught = {"model": f"{HERE}:Bright", "params": {"always": always}, "checkpoint": str(tmp_path / "t.pt")}
        distpro.retrain(given | {"teacher": taught})
        assert sum("the teacher is right in" in line for line in notes(capsys)) == said


def test_the_note_changes_no_number(tmp_path, monkeypatch):
    torch.save(build_model("resnet14", num_classes=10).state_dict(), tmp_path / "t.pt")
    with_note = distpro.search(settings(tmp_path / "t.pt"))
    monkeypatch.setattr("distpro.runs.training.at_the_start", lambda *given: [])
    without = distpro.search(settings(tmp_path / "t.pt"))
    assert torch.equal(with_note.alpha_tilde, without.alpha_tilde)


def test_a_share_of_all_test_samples_has_no_count_of_a_few(capsys):
    """The student always says 0, the label of 160 in 640; the 320 that are looked at are of two classes alike."""
    given, labels = images(640), torch.ones(640, dtype=torch.int64)
    labels[:320:2] = 0
    distpro.train(config(), data=(images(60), TensorDataset(given.tensors[0], labels)), student=Bright(always=0))
    said = [line.removeprefix("distpro: note: the student ") for line in notes(capsys) if "is right in" in line]
    assert len(said) == 1
    assert said[0].startswith(
        "is right in 25.0% of the test samples, and one class for all of them in 50.0% of 320 looked at:"
    )


def test_a_student_that_has_learnt_nothing_is_said(capsys):
    for always, said in ((0, 1), (None, 0)):
        distpro.train(config(), data=(images(60), images(60)), student=Bright(always=always))
        assert sum("the student is right in" in line for line in notes(capsys)) == said


@pytest.mark.parametrize(("rate", "said"), [(50.0, True), (0.05, False)])
def test_a_loss_that_rose_is_said(rate, said, tmp_path, capsys):
    distpro.train(settings(changes={"training": {"optimizer": {"lr": rate}}}), out=tmp_path / "run")
    assert any("the task loss of the training rose from" in line for line in notes(capsys)) == said


@pytest.mark.parametrize(("classes", "said"), [(10, 0), (100, 1)])
def test_more_classes_than_the_data_have_are_said(classes, said, capsys):
    distpro.train(settings(changes={"student": {"params": {"num_classes": classes}}, "training": {"max_steps": 1}}))
    assert (
        sum(f"the student answers with {classes} classes, the data have 10" in line for line in notes(capsys)) == said
    )


def test_an_answer_that_nothing_trains_is_said(tmp_path, capsys):
    """DeiT is evaluated as the mean of two heads, of which a training with labels alone trains one."""
    pytest.importorskip("timm")
    small = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 3}
    student = {"student": {"model": "deit", "params": small}, "training": {"max_steps": 1}}
    distpro.train(settings(changes=student), out=tmp_path / "plain")
    said = "evaluated, the student answers through head_dist.weight and 1 more, which no loss trains"
    assert sum(said in line for line in notes(capsys)) == 1
    distpro.train(settings(changes={"training": {"max_steps": 1}}), out=tmp_path / "teacher")
    teacher = {"model": "resnet8", "checkpoint": str(tmp_path / "teacher" / "student.pt")}
    term = {"loss": "deit", "weight": 1, "student_taps": ["head_dist"]}
    taught = settings(changes={**student, "teacher": teacher, "terms": [term], "retrain": {"weights": "constant"}})
    distpro.retrain(taught, out=tmp_path / "taught")
    assert not any("which no loss trains" in line for line in notes(capsys))


class Single(nn.Module):
    """GroupNorm of one value a group, which it takes of several samples only."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.GroupNorm(8, 8), nn.Flatten(), nn.Linear(8, 10)
        )

    def forward(self, x):
        return self.body(x)


def test_a_student_that_cannot_be_evaluated_on_the_last_test_sample_is_refused_before_it_trains():
    said = r"student, at evaluation \(the last batch of the test part has one sample\): one sample of the data does not pass"
    with pytest.raises(distpro.UserError, match=said):
        distpro.train(settings(changes={"training": {"batch_size": 179}}), student=Single())


def test_tasks_without_accuracy_are_left_alone(capsys):
    class Task:
        headline, higher_is_better = "error", False

        def __getattr__(self, name):
            return getattr(distpro.tasks.Classification(), name)

        def metrics(self):
            found = distpro.tasks.Classification().metrics()
            compute = found.compute
            found.compute = lambda: {"error": 100 - compute()["accuracy"]}
            return found

    distpro.train(config(), data=(images(60), images(60)), student=Bright(always=0), task=Task())
    assert notes(capsys) == []


# Code of one's own


class Constructed(nn.Module):
    def __init__(self, num_classes=10):
        raise RuntimeError("no weights here\nat all")


class Run(nn.Module):
    """Fails in training, where no check before the first step looks; or always."""

    def __init__(self, num_classes=10, always=False):
        super().__init__()
        self.layer, self.always = nn.Linear(192, num_classes), always

    def forward(self, x):
        if self.training or self.always:
            raise KeyError("later")
        return self.layer(x.flatten(1))


def data_that_fail():
    return [1 / 0]


def an_optimiser(params, lr):
    raise ValueError("not today")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student": {"model": f"{HERE}:Constructed"}}, "RuntimeError: no weights here at all"),
        ({"student": {"model": f"{HERE}:Run"}}, "KeyError: 'later'"),
        (
            {"student": {"model": f"{HERE}:Run", "params": {"always": True}}},
            "do not pass through it (KeyError: 'later'",
        ),
        (
            {"data": {"name": f"{HERE}:data_that_fail", "samples": None, "params": None}},
            "ZeroDivisionError: division by zero",
        ),
        ({"training": {"optimizer": {"name": f"{HERE}:an_optimiser"}}}, "ValueError: not today"),
    ],
)
def test_what_ones_own_code_raises_is_one_line_with_its_place(changes, message, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings(changes=changes)))
    assert main(["train", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1] and "test_notes.py, line " in said[-1] and said[-1].startswith("distpro: ")
    assert not any("Traceback" in line for line in said)


def test_distpros_own_faults_keep_their_traceback(tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings()))
    monkeypatch.setattr(Trainer, "fit", None)  # calling it fails in distpro's file
    with pytest.raises(TypeError):
        main(["train", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")])


class Undefined(Classification):
    """Its metric divides by nothing."""

    headline = "share"

    def metrics(self):
        return Mean(lambda output, batch: {"share": torch.tensor(torch.nan)})


@pytest.mark.parametrize("task", [Undefined(), None])
def test_a_metric_that_says_nothing_is_said(task, capsys):
    given = settings(
        changes={"data": {"name": "object:tuple", "augment": [], "samples": None}, "training": {"epochs": 1}}
    )
    distpro.train(given, data=(images(40), images(40)), student=Bright(), task=task)
    said = any("the test share is nan in every evaluation" in line for line in notes(capsys))
    assert said == isinstance(task, Undefined)


def test_an_answer_that_is_no_number_is_said(capsys):
    """An accuracy does not show it."""
    test = images(40)
    test.tensors[0][3] = float("nan")
    given = settings(
        changes={"data": {"name": "object:tuple", "augment": [], "samples": None}, "training": {"epochs": 1}}
    )
    distpro.train(given, data=(images(40), test), student=Bright())
    assert any("the test loss is nan" in line for line in notes(capsys))


class Two(nn.Module):
    """Gives features and logits."""

    def __init__(self):
        super().__init__()
        self.inner = Bright()

    def forward(self, x):
        return x.mean((2, 3)), self.inner(x)


def test_a_teacher_whose_answer_a_term_has_to_name_trains(capsys):
    term = {"loss": "kd", "weight": 1, "teacher_taps": ["logits[1]"]}
    given = config() | {"terms": [term], "retrain": {"weights": "constant"}}
    given |= {"teacher": {"model": "object:Two"}, "data": {"name": "object:tuple", "num_classes": 3}}
    distpro.retrain(given, data=(images(60), images(60)), teacher=Two(), student=Bright())
    assert not any("teacher is right" in line for line in notes(capsys))
    with pytest.raises(
        distpro.UserError, match="a task loss needs a model that returns {'logits': ...}, or a task of its own"
    ):
        distpro.train(given, data=(images(60), images(60)), student=Two())


def test_the_stated_number_of_classes_reaches_the_model(tmp_path):
    given = settings(changes={"data": {"name": "object:tuple", "augment": [], "samples": None, "num_classes": 3}})
    distpro.train(given, data=(images(40), images(40)), out=tmp_path / "run", overrides=["training.epochs=1"])
    assert load_safely(tmp_path / "run" / "student.pt")["fc.weight"].shape == (3, 64)


@pytest.mark.parametrize("control", ["mean", "shuffled", "final", "searched", "permuted"])
def test_controls_of_time_on_a_schedule_of_constants_are_said(control, tmp_path, capsys):
    schedule = Schedule(
        ("kd",), torch.zeros(1, 3).long(), torch.zeros(4, 1), torch.ones(4, 1), (), 2.0, reading="log", start=1.0
    )
    given = config() | {"terms": [{"loss": "kd"}], "retrain": {"weights": control, "start": 1}}
    given |= {"teacher": {"model": "object:Bright"}, "data": {"name": "object:tuple", "num_classes": 3}}
    distpro.retrain(given, schedule=schedule, data=(images(60), images(60)), teacher=Bright(), student=Bright())
    said = f"retrain.weights: {control} is what searched plays" in capsys.readouterr().out
    assert said == (control in ("mean", "shuffled", "final"))


def test_what_a_schedule_was_searched_with_is_said_where_it_is_another(tmp_path, capsys):
    given = settings(random_teacher(tmp_path), {"training": {"max_steps": 2}, "terms": [{"loss": "kd"}]})
    schedule = distpro.search(given)
    distpro.retrain(given, schedule=schedule)
    assert "where the schedule was searched" not in capsys.readouterr().err
    changes = {"pathways": {"distance": "l2"}, "terms": [{"loss": "kd", "params": {"temperature": 9}}]}
    distpro.retrain(merge(given, changes), schedule=schedule)
    said = capsys.readouterr().err
    assert "pathways.distance: l2 here, hcl where the schedule was searched" in said
    assert "parameters of kd: {'temperature': 9} here, none where the schedule was searched" in said
    stored = dict(schedule.meta["config"]) | {"task": "multi_label"}
    for strange in ({}, {"terms": [5]}, {"terms": [{}], "task": 3}):
        assert said_of_schedule(replace(schedule, meta={"config": strange}), read_config(given)) == []
    other = replace(schedule, meta={**schedule.meta, "config": stored})
    assert said_of_schedule(other, read_config(given)) == [
        "the task: classification here, multi_label where the schedule was searched"
    ]


def test_a_teacher_of_another_task_is_said(tmp_path, capsys):
    teacher = random_teacher(tmp_path)
    given = settings(teacher, {"training": {"max_steps": 1}})
    (tmp_path / "config.yaml").write_text("task: classification")
    distpro.search(given)
    assert "its run's task was" not in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("task: {multi_label: {}}")
    distpro.search(given)
    assert "teacher: its run's task was multi_label, this one's is classification" in capsys.readouterr().err


def test_a_teacher_without_terms_teaches_nothing(tmp_path, capsys):
    given = settings(random_teacher(tmp_path), {"training": {"max_steps": 1}, "pathways": None, "terms": []})
    with pytest.raises(distpro.UserError, match="'equal', but no term's weight is free: give pathways or terms"):
        distpro.retrain(merge(given, {"retrain": {"weights": "equal"}}))
    distpro.retrain(merge(given, {"retrain": {"weights": "constant"}}))
    assert "the config has a teacher, but no pathways or terms: it teaches nothing" in capsys.readouterr().err
