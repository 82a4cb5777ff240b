"""Two processes train what one process trains: gloo on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import distpro
from distpro.build.runs import _choose_estimator
from distpro.config.reading import merge, read_config
from distpro.files import load_safely
from distpro.models import build_model
from distpro.schedule import Schedule
from distpro.train import distributed
from distpro.train.tracking import read_metrics
from pathways.registry import UserError
from tests.conftest import ROOT
from tests.digits import settings
from tests.ranks import run_in_two

pytestmark = pytest.mark.slow

NETWORK = '''
from torch import nn

def plain(num_classes=10):
    """Without BatchNorm, so that a batch in two parts is the batch."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With a teacher's checkpoint and a network of one's own."""
    (tmp_path / "networks.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(5)
    torch.save(build_model("resnet14", num_classes=10).state_dict(), tmp_path / "teacher.pt")
    yield tmp_path
    sys.modules.pop("networks", None)


def write(folder, **changes):
    plain = {
        "student": {"model": "networks:plain", "taps": ["2", "4"]},
        "teacher": {"taps": ["layer1", "layer2"]},
        "pathways": None,
        "terms": [{"loss": "kd"}, {"loss": "at", "connect": "all"}],
        "data": {"augment": ["crop", "flip"]},
    }
    content = merge(merge(settings(folder / "teacher.pt"), plain), changes)
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return folder / "config.yaml"


def launch(*arguments):
    """Start a command in two processes."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "distpro.cli"]
        + [str(a) for a in arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), os.getcwd()])},
    )


def two(*arguments, fails=False):
    """Run a command in two processes to its end; gives its output."""
    codes, output = run_in_two(*arguments)
    assert all((code != 0) == fails for code in codes), output
    return output


def launched(*arguments, fails=False):
    """The same as a user does it, by torchrun."""
    running = launch(*arguments)
    output, _ = running.communicate(timeout=300)
    assert (running.returncode != 0) == fails, output
    return output


def stopped(*arguments):
    """Tell a command in two processes, whose folder is ``run``, to stop behind its first checkpoint; gives the last one."""
    running = launch(*arguments)
    for _ in range(600):
        if Path("run/checkpoint.pt").is_file():
            break
        time.sleep(0.1)
    running.send_signal(signal.SIGTERM)
    running.communicate(timeout=60)
    return load_safely("run/checkpoint.pt")


def close(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.allclose(value.float(), ours[name].float(), rtol=tolerance, atol=tolerance), name


def test_a_search_and_a_retrain(folder):
    """Same α̃ on the same data, and the same student; written once, and evaluated on every test image once."""
    config = write(folder)
    launched("search", config, "--out", "two")
    alone = distpro.search(config, out="one")
    together = Schedule.load("two/alpha.pt")
    assert torch.allclose(together.alpha_tilde, alone.alpha_tilde, atol=1e-3)
    assert torch.allclose(together.scales, alone.scales, rtol=1e-3)
    assert (alone.alpha_tilde[-1] - 1).abs().min() > 0.05  # they have moved
    close(load_safely("two/checkpoint.pt")["student"], load_safely("one/checkpoint.pt")["student"], 2e-3)
    text = two("retrain", config, "--schedule", "one/alpha.pt", "--out", "retrain2")
    result = distpro.retrain(config, schedule="one/alpha.pt", out="retrain1")
    close(load_safely("retrain2/student.pt"), load_safely("retrain1/student.pt"), 1e-4)
    assert text.count("epoch 3/3") == 1  # one of the two speaks
    ours, theirs = (read_metrics(Path(name)) for name in ("retrain2", "retrain1"))
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    found = [row["test/loss"] for row in ours if "test/loss" in row]
    assert found[-1] == pytest.approx(result.metrics["loss"], rel=1e-4)
    assert found == pytest.approx([row["test/loss"] for row in theirs if "test/loss" in row], rel=1e-4)


def test_a_search_over_a_horizon(folder):
    """Sweep and trials: the same weights, and the same trainings judged alike."""
    config = write(folder, search={"horizon": 3, "trials": 7, "validation_fraction": 0.2})
    two("search", config, "--out", "two")
    alone = distpro.search(config, out="one")
    together = Schedule.load("two/alpha.pt")
    moved = (alone.alpha_tilde[3] - alone.alpha_tilde[0]).abs().max().item()
    assert torch.allclose(together.alpha_tilde[:6], alone.alpha_tilde[:6], atol=0.02 * moved) and moved > 1e-4
    assert torch.allclose(together.weights[-1], alone.weights[-1], rtol=0.02)
    judged = [
        {path.parent.name: json.loads(path.read_text())["loss"] for path in Path(run).glob("trials/*/result.json")}
        for run in ("two", "one")
    ]
    assert len(judged[1]) > 3 and judged[0] == pytest.approx(judged[1], rel=2e-3)


def test_a_search_for_numbers_beside_the_weights(folder):
    """Of which the task's weight moves most here."""
    kd = {"loss": "kd", "params": {"temperature": "learned"}}
    search = {"horizon": 3, "trials": 0, "validation_fraction": 0.2, "criterion": "task"}  # means over samples
    config = write(folder, terms=[kd, {"loss": "at"}], task_weight="learned", search=search)
    two("search", config, "--out", "two")
    alone = distpro.search(config, out="one")
    together = Schedule.load("two/alpha.pt")
    assert torch.allclose(together.alpha_tilde, alone.alpha_tilde, atol=1e-3)
    assert list(alone.scalars) == ["task", "kd.temperature"]
    for name, values in alone.scalars.items():
        moved = (values / values[0]).log().abs().max()
        assert moved > 1e-3, name
        apart = (together.scalars[name] / values).log().abs().max()
        assert apart < 1e-3 and apart < 0.1 * moved, name


def test_batch_statistics_over_both(folder):
    config = write(folder, student={"model": "resnet8", "taps": ["layer1", "layer2"]}, retrain={"weights": "equal"})
    two("retrain", config, "--out", "two", "sync_batch_norm=true")
    distpro.retrain(config, out="one")
    close(load_safely("two/student.pt"), load_safely("one/student.pt"), 5e-3)
    two("retrain", config, "--out", "apart")
    apart, one = load_safely("apart/student.pt"), load_safely("one/student.pt")
    assert not torch.allclose(apart["layer1.0.conv1.weight"], one["layer1.0.conv1.weight"], rtol=5e-3, atol=5e-3)


def test_weights_that_are_trained(folder):
    """Of two processes and of one, in steps of two batches."""
    training = {"batch_size": 10, "accumulate": 2}
    config = write(folder, retrain={"weights": "uncertainty"}, training=training)
    two("retrain", config, "--out", "two")
    distpro.retrain(config, out="one")
    ours, theirs = (load_safely(f"{run}/checkpoint.pt") for run in ("two", "one"))
    close(ours["weights"], theirs["weights"], 1e-4)
    close(ours["student"], theirs["student"], 1e-3)
    assert theirs["weights"]["terms"].abs().min() > 1e-2


def test_what_two_have_begun_one_can_end(folder):
    config = write(folder, retrain={"weights": "equal"}, training={"epochs": 30})
    assert 0 < stopped("retrain", config, "--out", "run")["step"] < 150
    distpro.retrain(config, out="run", resume=True)
    distpro.retrain(config, out="one")
    close(load_safely("run/student.pt"), load_safely("one/student.pt"), 2e-3)


def test_two_go_on_to_the_same_bytes(folder):
    """Each with the random numbers of its own, of which dropout takes some."""
    text = NETWORK.replace("nn.Flatten()", "nn.Flatten(), nn.Dropout(0.5)")
    (folder / "networks.py").write_text(text)
    config = write(folder, retrain={"weights": "equal"}, training={"epochs": 20})
    two("retrain", config, "--out", "whole")
    state = stopped("retrain", config, "--out", "run")
    assert 0 < state["step"] < 100 and len(state["random_of_ranks"]) == 2
    two("retrain", config, "--out", "run", "--resume")
    whole, run = load_safely("whole/student.pt"), load_safely("run/student.pt")
    assert all(torch.equal(value, run[name]) for name, value in whole.items())


def test_a_rank_that_dies_ends_the_run_and_says_why(folder):
    """The cause is on the screen, the other rank does not wait for ever, and one process goes on from the checkpoint."""
    dying = "import os, torch\n\nclass Dying(torch.nn.ReLU):\n    calls = 0\n\n    def forward(self, x):\n"
    dying += "        Dying.calls += self.training and float(x.sum()) < 1e9\n        if Dying.calls > 12 and os.environ.get('RANK') == '1':\n"
    dying += "            raise RuntimeError('the disk of rank 1 is full')\n        return super().forward(x)\n"
    text = NETWORK.replace("nn.ReLU()", "Dying()", 1)
    (folder / "networks.py").write_text(dying + text)
    config = write(folder, retrain={"weights": "equal"})
    start = time.monotonic()
    output = launched("retrain", config, "--out", "run", fails=True)
    assert "the disk of rank 1 is full" in output and time.monotonic() - start < 120
    step = load_safely("run/checkpoint.pt")["step"]
    assert 0 < step < 15
    distpro.retrain(config, out="run", resume=True)
    distpro.retrain(config, out="one")
    close(load_safely("run/student.pt"), load_safely("one/student.pt"), 2e-3)


def test_what_cannot_be_shared_is_said(folder):
    message = "batch_size 21 cannot be cut into 2 equal parts"
    assert message in two("search", write(folder), "training.batch_size=21", "--out", "run", fails=True)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["search.estimator=unrolled"], "unrolled runs in one process"),
        (
            ["sync_batch_norm=true", "search.estimator=forward_mode"],
            "with sync_batch_norm, forward_mode cannot see through batch statistics of several processes; "
            "use search.estimator=finite_difference",
        ),
    ],
)
def test_estimators_that_run_in_one_process_are_refused_in_two(folder, changes, message, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(UserError, match=message):
        _choose_estimator(read_config(write(folder), changes), None, None, 1, 1, None)
