"""Runs that read the teacher's answers from a cache come to the numbers of runs that compute them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import distpro
from distpro.config.reading import merge, read_config
from distpro.files import load_safely
from distpro.models import build_model
from distpro.objective import Objective
from distpro.report.cost import as_text, describe
from pathways import UserError
from tests.digits import settings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.save(build_model("resnet14", num_classes=10).state_dict(), path)
    return path


@pytest.fixture
def passes(monkeypatch):
    """Counts the teacher's passes in trainings."""
    count = []
    plain = Objective.run_teacher

    def run_teacher(self, batch):
        teacher = self.teacher.forward
        if batch.samples > 2 and batch.index is not None:  # neither the example nor a look before the training
            monkeypatch.setattr(self.teacher, "forward", lambda x: (count.append(1), teacher(x))[1])
        result = plain(self, batch)
        monkeypatch.setattr(self.teacher, "forward", teacher)
        return result

    monkeypatch.setattr(Objective, "run_teacher", run_teacher)
    return count


def content(checkpoint, cache=None, **changes):
    plain = {
        "pathways": None,
        "terms": [{"loss": "kd", "weight": 1}, {"loss": "at", "weight": 100}],
        "retrain": {"weights": "constant"},
        "cache": None if cache is None else {"folder": str(cache)},
    }
    return merge(merge(settings(checkpoint), plain), changes)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("augment", [["crop", "flip"], []])
def test_the_same_numbers_and_no_teacher(checkpoint, tmp_path, passes, augment, precision):
    """Three epochs of five steps: without a cache, while it is filled, and from it. Bit for bit."""
    changes = {"data": {"augment": augment}, "precision": precision}
    distpro.retrain(content(checkpoint, **changes), out=tmp_path / "plain")
    assert len(passes) == 15
    passes.clear()
    distpro.retrain(content(checkpoint, tmp_path / "cache", **changes), out=tmp_path / "filling")
    # without augmentation the cache fills while batches of known samples come along
    assert len(passes) == 15 if augment else 5 <= len(passes) <= 15
    passes.clear()
    distpro.retrain(content(checkpoint, tmp_path / "cache", **changes), out=tmp_path / "cached")
    assert len(passes) == 0
    students = [load_safely(tmp_path / run / "student.pt") for run in ("plain", "filling", "cached")]
    if augment:  # the batches that filled the cache are the batches that read it
        assert all(torch.equal(v, s[k]) for s in students[1:] for k, v in students[0].items())
    losses = [[row["term/kd"] for row in rows(tmp_path / run) if "term/kd" in row] for run in ("plain", "cached")]
    assert losses[1] == (
        losses[0] if augment else pytest.approx(losses[0], rel=1e-4 if precision == "float32" else 0.05)
    )


def rows(folder):
    from distpro.train.tracking import read_metrics

    return read_metrics(folder)


def test_augmentations_that_come_again_bound_the_cache(checkpoint, tmp_path, passes):
    changes = {"data": {"augment_epochs": 1}}
    distpro.retrain(content(checkpoint, tmp_path / "cache", **changes), out=tmp_path / "cached")
    assert len(passes) == 5  # the first epoch fills it, the others read
    distpro.retrain(content(checkpoint, **changes), out=tmp_path / "plain")
    ours, theirs = (distpro.evaluate(tmp_path / run)["loss"] for run in ("cached", "plain"))
    assert ours == pytest.approx(theirs, rel=1e-3)  # other batches, so other orders of summation


def test_a_search_reads_the_cache_of_its_training_part(checkpoint, tmp_path, passes):
    given = {"terms": [{"loss": "kd"}, {"loss": "at"}], "search": {"normalise": "none"}}
    plain = distpro.search(content(checkpoint, **given))
    assert len(passes) == 12  # 80 of 100 samples: 4 steps an epoch
    distpro.search(content(checkpoint, tmp_path / "cache", **given))
    passes.clear()
    cached = distpro.search(content(checkpoint, tmp_path / "cache", **given))
    assert len(passes) == 0 and torch.equal(cached.alpha_tilde, plain.alpha_tilde)


def test_rotations_are_cached_with_their_image(checkpoint, tmp_path, passes):
    given = {"terms": [{"loss": "sskd", "weight": 1}], "task_weight": 0}
    plain = distpro.retrain(content(checkpoint, **given)).metrics
    distpro.retrain(content(checkpoint, tmp_path / "cache", **given))
    passes.clear()
    cached = distpro.retrain(content(checkpoint, tmp_path / "cache", **given)).metrics
    assert len(passes) == 0 and cached["loss"] == plain["loss"]


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"seed": 1, "data": {"seed": 0}}, "seed"),
        ({"data": {"augment": ["flip"]}}, "augment"),
        ({"data": {"mean": [0.1, 0.1, 0.1]}}, "mean and std"),
        ({"data": {"samples": 80}}, "data"),
        ({"precision": "bfloat16"}, "precision"),
        ({"training": {"epochs": 4}}, "epochs"),
        ({"terms": [{"loss": "kd", "weight": 1}]}, "tap 'layer1'"),
    ],
)
def test_a_stale_cache_is_refused(checkpoint, tmp_path, changes, what):
    distpro.retrain(content(checkpoint, tmp_path / "cache"))
    with pytest.raises(UserError, match=f"made for something else, what differs: .*{what}"):
        distpro.retrain(content(checkpoint, tmp_path / "cache", **changes))


def test_other_weights_of_the_teacher_are_noticed(checkpoint, tmp_path):
    distpro.retrain(content(checkpoint, tmp_path / "cache"))
    state = load_safely(checkpoint)
    state["layer1.0.conv1.weight"][0, 0, 0, 0] += 1e-3
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(UserError, match="what differs: teacher weights"):
        distpro.retrain(content(tmp_path / "other.pt", tmp_path / "cache"))


def test_other_code_of_the_teacher_is_noticed(checkpoint, tmp_path, monkeypatch):
    distpro.retrain(content(checkpoint, tmp_path / "cache"))
    resnet = type(build_model("resnet14", num_classes=10))
    plain = resnet.forward
    monkeypatch.setattr(resnet, "forward", lambda self, x: 20 * plain(self, x))
    with pytest.raises(UserError, match="what the teacher answers at 'logits', .*code has changed"):
        distpro.retrain(content(checkpoint, tmp_path / "cache"))


def test_its_size_is_said_before_anything_runs(checkpoint, tmp_path, capsys):
    config = read_config(content(checkpoint, tmp_path / "cache", training={"epochs": 100}, data={"samples": 1000}))
    description = describe(config, searching=False)
    shapes = 10 + 16 * 8 * 8 + 32 * 4 * 4 + 64 * 2 * 2
    assert description.cache_bytes == 1000 * 100 * 4 * shapes
    assert "0.721 GB of teacher outputs" in as_text(description)
    distpro.retrain(content(checkpoint, tmp_path / "cache"))
    assert "0% filled" in capsys.readouterr().out


def test_what_cannot_be_cached(checkpoint, tmp_path):
    with pytest.raises(UserError, match="depend on the rest of the batch"):
        distpro.retrain(content(checkpoint, tmp_path / "cache", teacher_training=True))


class Answering(nn.Module):
    """A small network whose answer goes through a function."""

    def __init__(self, after=lambda y: y, **norm):
        super().__init__()
        torch.manual_seed(5)
        self.norm, self.after = nn.BatchNorm2d(8, **norm), after
        self.before, self.head = (
            nn.Conv2d(3, 8, 3),
            nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10)),
        )

    def forward(self, x):
        return self.after(self.head(self.norm(self.before(x)).relu()))


class KeptInTraining(Answering):
    def train(self, mode=True):
        super().train(mode)
        self.norm.train()
        return self


class Counting(Answering):
    """A sample's answer is its own, but other than before."""

    def __init__(self):
        super().__init__(self.times)
        self.passes = 0

    def times(self, y):
        self.passes += 1
        return y * self.passes


OF_THE_BATCH, EACH_TIME = "of a sample depends on the rest of its batch", "of the same samples each time"


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        (Answering, None),
        (partial(Answering, lambda y: 1e-3 * y.softmax(1)), None),
        (partial(Answering, track_running_stats=False), OF_THE_BATCH),
        (KeptInTraining, OF_THE_BATCH),
        (partial(Answering, lambda y: y - y.mean(0)), OF_THE_BATCH),
        (partial(Answering, lambda y: F.dropout(y, 0.2, training=True)), EACH_TIME),
        (Counting, EACH_TIME),
    ],
    ids=["plain", "small", "no running statistics", "kept in training", "centred", "dropout", "counting"],
)
def test_teachers_whose_answer_is_not_of_the_sample_alone(tmp_path, teacher, said):
    made = teacher().eval()
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        both, again, alone = made(images), made(images), made(images[[0, 0]])
    assert torch.allclose(both, again) == (said != EACH_TIME)  # what the messages say is so
    assert torch.allclose(both[0], alone[0]) == (said is None)
    made = teacher()
    config = content(None, tmp_path / "cache", terms=[{"loss": "kd", "weight": 1}], training={"epochs": 1})
    config = {key: value for key, value in config.items() if key != "teacher"}
    if said is None:
        assert distpro.retrain(config, teacher=made).metrics["loss"] > 0
        return
    with pytest.raises(UserError, match=f"cache: the teacher.*'logits' {said}"):
        distpro.retrain(config, teacher=made)
    assert not (tmp_path / "cache").exists()
