"""A run that is interrupted and resumed ends in the same bytes as one that is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

import distpro
from distpro.cli import main
from distpro.config.schema import Config
from distpro.files import load_safely
from distpro.runs.folder import open_folder
from distpro.schedule import Schedule
from distpro.train.tracking import read_metrics
from distpro.train.trainer import Interrupted, Trainer
from tests.conftest import ROOT
from tests.digits import random_teacher, settings

pytestmark = pytest.mark.slow

STEPS = 12


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return random_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    """A search, and a retrain with its schedule, that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    distpro.search(settings(teacher), out=folder / "search")
    distpro.retrain(retrain_settings(teacher), schedule=folder / "search" / "alpha.pt", out=folder / "retrain")
    return folder


def retrain_settings(teacher):
    """80 samples, so that a retrain has as many steps as the search."""
    return settings(teacher, {"data": {"samples": 80}})


def run(stage, teacher, whole, out, resume=False):
    if stage == "search":
        distpro.search(settings(teacher), out=out, resume=resume)
    else:
        schedule = whole / "search" / "alpha.pt"
        distpro.retrain(retrain_settings(teacher), schedule=schedule, out=out, resume=resume)


def stop_after(monkeypatch, steps, number=signal.SIGTERM):
    """Send this process a signal after each of the given steps, once."""
    original, left = Trainer.train_step, list(steps)

    def train_step(self, batch):
        original(self, batch)
        if self.step in left:
            left.remove(self.step)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "train_step", train_step)


def stop_in_training(monkeypatch, number, steps):
    """Send this process a signal so many steps after the beginning of the training of that number, from 0."""
    fits, fit = [], Trainer.fit

    def stopping(trainer):
        fits.append(trainer)
        if len(fits) - 1 == number:
            stop_after(monkeypatch, [trainer.step + steps])
        return fit(trainer)

    monkeypatch.setattr(Trainer, "fit", stopping)


def apart(one, other):
    """Where checkpoint and schedule of two searches differ, bit for bit, but for the time."""
    found = []
    for name in ("checkpoint.pt", "alpha.pt"):
        files = [load_safely(folder / name) for folder in (one, other)]
        for file in files:
            file.pop("seconds", None)
            file.get("meta", {}).pop("created", None)
        found += differences(*files)
    return found


def differences(one, other, path=""):
    """Where two nested states differ, bit for bit."""
    if isinstance(one, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return [] if alike and one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes() else [path]
    if isinstance(one, (dict, list)):
        if len(one) != len(other):
            return [path]
        keys = one if isinstance(one, dict) else range(len(one))
        return [d for key in keys for d in differences(one[key], other[key], f"{path}.{key}")]
    return [] if one == other else [path]


def curves(folder):
    """Values by tag and step. No step comes twice, or after a later one."""
    found = {}
    for row in read_metrics(folder):
        for tag, value in row.items():
            found.setdefault(tag, []).append((row["step"], value))
    for tag, points in found.items():
        steps = [step for step, _ in points]
        if tag not in ("step", "epoch"):
            assert all(a < b for a, b in zip(steps, steps[1:], strict=False)), (tag, steps)
    return {tag: dict(points) for tag, points in found.items()}


def assert_same_run(found, truth):
    """Student, transforms, optimisers, α̃ and its history, evaluations, and what was logged of them."""
    states = [load_safely(folder / "checkpoint.pt") for folder in (found, truth)]
    for state in states:
        assert state.pop("seconds") > 0
    assert differences(*states) == []
    for name in ("student.pt", "alpha.pt"):
        if (truth / name).exists():
            files = [load_safely(folder / name) for folder in (found, truth)]
            for file in files:
                file.get("meta", {}).pop("created", None)
            assert differences(*files) == [], name
    ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (found, truth))
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    ours, theirs = curves(found), curves(truth)
    for tag in theirs:
        if tag != "images_per_second":
            assert ours[tag] == theirs[tag], tag
    assert ours["test/accuracy"] == theirs["test/accuracy"]


@pytest.mark.parametrize("stage", ["search", "retrain"])
@pytest.mark.parametrize(
    "steps",
    [[1], [4], [11], [2, 3, 7], [5, 8, 10]],
    ids=["first step", "end of an epoch", "last but one", "three times", "three times, once at the end of an epoch"],
)
def test_interrupted_and_resumed(stage, steps, teacher, whole, tmp_path, monkeypatch):
    stop_after(monkeypatch, steps)
    for number, step in enumerate(steps):
        with pytest.raises(Interrupted, match=f"stopped at step {step} of {STEPS}") as caught:
            run(stage, teacher, whole, tmp_path, resume=number > 0)
        assert caught.value.signal_number == signal.SIGTERM
        assert load_safely(tmp_path / "checkpoint.pt")["step"] == step
        assert not (tmp_path / "result.json").exists() and not (tmp_path / "student.pt").exists()
        if stage == "search":
            so_far, truth = Schedule.load(tmp_path / "alpha.pt"), Schedule.load(whole / "search" / "alpha.pt")
            assert len(so_far) == step
            assert torch.equal(so_far.weights, truth.weights[:step])
            assert torch.equal(so_far.alpha_tilde, truth.alpha_tilde[:step])
    run(stage, teacher, whole, tmp_path, resume=True)
    assert_same_run(tmp_path, whole / stage)


@pytest.mark.parametrize("stage", ["search", "retrain"])
def test_a_signal_in_the_last_step_leaves_the_evaluation(stage, teacher, whole, tmp_path, monkeypatch):
    """Which may take longer than whoever sent the signal waits."""
    stop_after(monkeypatch, [STEPS])
    with pytest.raises(Interrupted, match=f"stopped at step {STEPS} of {STEPS}"):
        run(stage, teacher, whole, tmp_path)
    assert load_safely(tmp_path / "checkpoint.pt")["step"] == STEPS and not (tmp_path / "result.json").exists()
    run(stage, teacher, whole, tmp_path, resume=True)
    assert_same_run(tmp_path, whole / stage)
    run(stage, teacher, whole, tmp_path, resume=True)  # nothing is left to be done
    assert_same_run(tmp_path, whole / stage)


def test_handlers_of_signals_are_as_before(teacher, whole, tmp_path, monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stop_after(monkeypatch, [2], signal.SIGINT)
    with pytest.raises(Interrupted) as caught:
        run("search", teacher, whole, tmp_path)
    assert caught.value.signal_number == signal.SIGINT
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(
    "search",
    [
        {"estimator": "finite_difference", "optimizer": "sgd", "momentum": 0.5, "learning_rate": 1.0},
        {"every": 3, "threshold": 0.9, "revive_every": 2, "learning_rate": 0.2},
        {"repeats": True},
    ],
    ids=["finite difference and SGD", "dropping and reviving", "repeats"],
)
def test_other_searches_resume_as_well(search, teacher, tmp_path, monkeypatch):
    config = settings(teacher, {"search": search, "training": {"optimizer": {"name": "adamw", "lr": 0.01}}})
    distpro.search(config, out=tmp_path / "whole")
    stop_after(monkeypatch, [5])
    with pytest.raises(Interrupted):
        distpro.search(config, out=tmp_path / "parts")
    distpro.search(config, out=tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize(("window", "every", "kept"), [(3, 3, [0, 6, 6]), (2, 5, [2, 5, 5])])
def test_a_run_keeps_checkpoints_between_the_windows_of_unrolled_only(
    window, every, kept, teacher, tmp_path, monkeypatch
):
    """Asked to stop after step 2 (in a window of three it goes on from its beginning), killed after 6 and, resumed, after 7. The first
    epoch ends at 4, in a window."""
    config = settings(teacher, {"search": {"estimator": {"unrolled": {"steps": window}}, "every": every}})
    distpro.search(config, out=tmp_path / "whole")
    stop_after(monkeypatch, [2])
    with pytest.raises(Interrupted):
        distpro.search(config, out=tmp_path / "parts")
    steps = [load_safely(tmp_path / "parts" / "checkpoint.pt")["step"]]
    original = Trainer.train_step

    for last in (6, 7):

        def die(self, batch, last=last):
            if self.step == last:
                raise MemoryError
            original(self, batch)

        monkeypatch.setattr(Trainer, "train_step", die)
        with pytest.raises(MemoryError):
            distpro.search(config, out=tmp_path / "parts", resume=True)
        steps.append(load_safely(tmp_path / "parts" / "checkpoint.pt")["step"])
    assert steps == kept
    monkeypatch.setattr(Trainer, "train_step", original)
    distpro.search(config, out=tmp_path / "parts", resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"training": {"epochs": 4}}, "the config has changed since the run began: training.epochs was 3, is 4"),
        ({"search": {"every": 2}}, "search.every was 1, is 2"),
    ],
)
def test_a_run_is_resumed_with_its_own_config(change, message, teacher, whole):
    with pytest.raises(distpro.UserError, match=message):
        distpro.search(settings(teacher, change), out=whole / "search", resume=True)


def test_a_config_from_before_a_key_was_there_means_its_default(whole, tmp_path):
    recorded = yaml.safe_load((whole / "search" / "config.yaml").read_text())
    config = Config(**recorded)
    del recorded["search"]["rounds"], recorded["tracking"]["sinks"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recorded))
    with open_folder(tmp_path, config, resume=True) as folder:
        assert folder == tmp_path
    other = config.model_copy(update={"search": config.search.model_copy(update={"rounds": 3})})
    with pytest.raises(distpro.UserError, match="search.rounds was 0, is 3"), open_folder(tmp_path, other, resume=True):
        pass


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_failed_before_its_first_checkpoint_is_done_anew(resume, teacher, whole, tmp_path, monkeypatch):
    """With what was wrong in its config mended, and as if it had never been."""

    def fail(self, batch):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", fail)
        with pytest.raises(MemoryError):
            distpro.search(settings(teacher, {"data": {"mean": [0.1] * 3, "std": [0.9] * 3}}), out=tmp_path)
    assert (tmp_path / "config.yaml").is_file() and not (tmp_path / "checkpoint.pt").exists()
    distpro.search(settings(teacher), out=tmp_path, resume=resume)
    assert_same_run(tmp_path, whole / "search")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["data"]["mean"] is None


def test_there_must_be_something_to_resume(teacher, tmp_path):
    with pytest.raises(distpro.UserError, match="no checkpoint.pt to resume from"):
        distpro.search(settings(teacher), out=tmp_path, resume=True)
    with pytest.raises(distpro.UserError, match="resume needs the run's folder"):
        distpro.search(settings(teacher), resume=True)


def test_a_checkpoint_of_another_set_up_is_refused(teacher, whole, tmp_path):
    """One pathway less than in the run's config."""
    with pytest.raises(distpro.UserError, match="holds a run already; continue it with --resume"):
        distpro.search(settings(teacher), out=whole / "search")
    distpro.search(settings(teacher, {"pathways": {"connect": [["layer1:pre_relu", "layer1"]]}}), out=tmp_path)
    (tmp_path / "config.yaml").write_bytes((whole / "search" / "config.yaml").read_bytes())
    with pytest.raises(distpro.UserError, match="checkpoint.pt: does not fit this run"):
        distpro.search(settings(teacher), out=tmp_path, resume=True)


# Processes of their own


def command(*arguments, script=("-m", "distpro.cli"), **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *script, *map(str, arguments)], env=environment, text=True, **options)


def test_a_command_ended_by_sigterm(teacher, tmp_path):
    """Exit status 128 + 15, a checkpoint, a schedule of the steps done, and a resumed run as if nothing had been."""
    config = settings(teacher, {"training": {"epochs": 15}, "tracking": {"log_every": 1, "evaluate_every": 15}})
    (tmp_path / "cfg.yaml").write_text(yaml.safe_dump(config))
    out, rows = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    process = command("search", tmp_path / "cfg.yaml", "--out", out, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (rows.exists() and rows.read_bytes()):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143, said
    step = load_safely(out / "checkpoint.pt")["step"]
    assert said.splitlines()[-1] == f"distpro: stopped at step {step} of 60; --resume goes on from here"
    assert 0 < len(Schedule.load(out / "alpha.pt")) == step < 60

    assert main(["search", str(tmp_path / "cfg.yaml"), "--out", str(out), "--resume"]) == 0
    distpro.search(config, out=tmp_path / "whole")
    assert_same_run(out, tmp_path / "whole")


KILLED = """
import os, signal, sys
from distpro.cli import main
from distpro.train.trainer import Trainer
original = Trainer.train_step
def train_step(self, batch):
    original(self, batch)
    if self.step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
Trainer.train_step = train_step
main(sys.argv[1:])
"""


def test_a_command_killed_in_the_middle_of_an_epoch(teacher, whole, tmp_path):
    """What is left is the last epoch's checkpoint; rows that were logged after it are written anew."""
    config = settings(teacher, {"tracking": {"log_every": 1}})
    (tmp_path / "cfg.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "run"
    process = command("search", tmp_path / "cfg.yaml", "--out", out, script=("-c", KILLED), stdout=subprocess.DEVNULL)
    assert process.wait(timeout=120) == -signal.SIGKILL
    assert load_safely(out / "checkpoint.pt")["step"] == len(Schedule.load(out / "alpha.pt")) == 4
    assert max(curves(out)["lr"]) == 6
    distpro.search(config, out=out, resume=True)
    assert list(curves(out)["lr"]) == list(range(1, STEPS + 1))
    schedule, truth = Schedule.load(out / "alpha.pt"), Schedule.load(whole / "search" / "alpha.pt")
    assert torch.equal(schedule.weights, truth.weights) and torch.equal(schedule.alpha_tilde, truth.alpha_tilde)
    states = [load_safely(folder / "checkpoint.pt") for folder in (out, whole / "search")]
    for part in ("student", "terms", "optimizer", "weights", "history"):
        assert differences(states[0][part], states[1][part]) == []
