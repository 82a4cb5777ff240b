"""Weights & Biases and MLflow, as modules that write down what they are told."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from distpro.build import check_names
from distpro.config.reading import read_config
from distpro.console import LOG, logged, note, warn
from distpro.train.sinks import IDENTITIES
from distpro.train.stopping import Interrupted
from distpro.train.tracking import Tracker, read_metrics
from pathways.registry import UserError


class Service:
    """Every call of it, and of what it gives, by name."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))

    def of(self, name):
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


@pytest.fixture
def wandb(monkeypatch):
    service, module = Service(), types.ModuleType("wandb")
    service.id, service.config, service.summary = "abc", Service(), Service()
    module.Image = lambda data: ("image", data)
    module.init = lambda **params: service.calls.append(("init", (), params)) or service
    monkeypatch.setitem(sys.modules, "wandb", module)
    return service


@pytest.fixture
def mlflow(monkeypatch):
    service, module = Service(), types.ModuleType("mlflow")
    for name in (
        "set_tracking_uri",
        "set_experiment",
        "log_metrics",
        "log_params",
        "log_text",
        "log_figure",
        "end_run",
    ):
        setattr(module, name, getattr(service, name))
    run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))
    module.start_run = lambda **params: service.calls.append(("start_run", (), params)) or run
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return service


def test_weights_and_biases(tmp_path, wandb):
    folder = tmp_path / "run"
    with Tracker(folder, tensorboard=False, sinks=[{"wandb": {"project": "mine", "mode": "offline"}}]) as tracker:
        tracker.scalars({"lr": torch.tensor(0.5), "term/a<-b@c": 2.0}, step=3, epoch=1.0)
        tracker.figure("alpha", "figure", 3)
        tracker.images("seen", torch.zeros(2, 3, 4, 5, dtype=torch.uint8), 3)
        tracker.summary({"training.epochs": 2, "taps": ["a"]}, {"accuracy": 0.75})
    assert wandb.of("init")[0][1] == {"dir": str(folder), "name": "run", "project": "mine", "mode": "offline"}
    logged_numbers, figure, images = wandb.of("log")
    assert logged_numbers == (({"lr": 0.5, "term/a<-b@c": 2.0},), {"step": 3})
    assert figure == (({"alpha": ("image", "figure")},), {"step": 3})
    assert [picture.shape for _, picture in images[0][0]["seen"]] == [(4, 5, 3)] * 2
    assert wandb.config.of("update")[0][0] == ({"training.epochs": 2, "taps": "['a']"},)
    assert wandb.summary.of("update")[0][0] == ({"final/accuracy": 0.75},)
    assert wandb.of("finish") == [((), {"exit_code": 0})]
    assert read_metrics(folder)[0]["lr"] == 0.5  # as ever


def test_mlflow(tmp_path, mlflow):
    folder = tmp_path / "run"
    with Tracker(folder, tensorboard=False, sinks=[{"mlflow": {"uri": "file:x", "experiment": "mine"}}]) as tracker:
        tracker.scalars({"a<-b": 1.0, "a@-b": 2.0, "test/top 5": 3.0}, step=3, epoch=1.0)
        tracker.text("config", "x: 1")
        tracker.summary({"terms": "t" * 900}, {"accuracy": 0.75})
    assert mlflow.of("set_tracking_uri")[0][0] == ("file:x",) and mlflow.of("set_experiment")[0][0] == ("mine",)
    assert mlflow.of("start_run")[0][1] == {"run_name": "run"}
    first, last = mlflow.of("log_metrics")
    assert first == (({"a_-b": 1.0, "a_-b_2": 2.0, "test/top 5": 3.0},), {"step": 3})  # two tags stay two
    assert last == (({"final/accuracy": 0.75},), {"step": 3})
    assert len(mlflow.of("log_params")[0][0][0]["terms"]) == 500
    assert mlflow.of("end_run") == [(("FINISHED",), {})]


def test_a_resumed_run_goes_on_in_the_same_one_and_an_error_is_told(tmp_path, wandb, mlflow):
    both = ["wandb", "mlflow"]
    with Tracker(tmp_path, tensorboard=False, sinks=both) as tracker:
        tracker.scalars({"x": 1.0}, 1, 1.0)
    assert (tmp_path / IDENTITIES).is_file()
    with pytest.raises(ZeroDivisionError), Tracker(tmp_path, resume_step=2, tensorboard=False, sinks=both):
        raise ZeroDivisionError
    assert wandb.of("init")[1][1]["id"] == "abc" and wandb.of("init")[1][1]["resume"] == "allow"
    assert mlflow.of("start_run")[1][1] == {"run_id": "r1"}
    assert wandb.of("finish")[1][1] == {"exit_code": 1} and mlflow.of("end_run")[1][0] == ("FAILED",)
    with pytest.raises(Interrupted), Tracker(tmp_path, resume_step=2, tensorboard=False, sinks=both):
        raise Interrupted(15, 2, 4)  # stopped, to be gone on with
    assert wandb.of("finish")[2][1] == {"exit_code": 0} and mlflow.of("end_run")[2][0] == ("FINISHED",)
    with Tracker(tmp_path, tensorboard=False, sinks=both):
        pass
    assert "id" not in wandb.of("init")[3][1]  # a new run in an old folder is another


def test_sinks_are_checked_before_a_run(monkeypatch):
    def config(sinks):
        return read_config({"student": {"model": "resnet8"}, "tracking": {"sinks": sinks}})

    with pytest.raises(UserError, match="unknown sink 'wandbb'; did you mean 'wandb'"):
        check_names(config(["wandbb"]))
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"tracking.sinks: wandb needs a package more: pip install 'distpro\[wandb\]'"):
        check_names(config(["wandb"]))
    monkeypatch.setitem(sys.modules, "mlflow", types.ModuleType("mlflow"))
    with pytest.raises(UserError, match="url"):
        check_names(config([{"mlflow": {"url": "x"}}]))


def test_the_log_has_what_was_said(tmp_path, capsys):
    path = tmp_path / "log.txt"
    with pytest.raises(ValueError), logged(path, anew=True):
        note("the cache is full")
        warn("a teacher at chance level")
        raise ValueError("diverged\nat step 3")
    note("not in the file")
    lines = [line.split(" ", 2)[2] for line in path.read_text().splitlines()]
    assert lines == ["INFO the cache is full", "WARNING a teacher at chance level", "ERROR ValueError: diverged"]
    with logged(path, anew=False):
        note("resumed")
    assert len(path.read_text().splitlines()) == 4
    assert not [handler for handler in LOG.handlers if getattr(handler, "baseFilename", "") == str(path)]
    assert capsys.readouterr().out.splitlines()[0] == "the cache is full"
