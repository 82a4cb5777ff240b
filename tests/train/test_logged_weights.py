"""Beside the loss of a term, a log shows the weight that it had and what the two came to: against numbers made by hand."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import distpro
from distpro.batch import batch_of
from distpro.objective import Objective, Term
from distpro.schedule import Schedule
from distpro.tasks import Classification
from distpro.train.tracking import Tracker, read_metrics
from distpro.train.trainer import Interrupted, Trainer
from distpro.weights import Replay, replay
from tests.digits import random_teacher, settings
from tests.pairs import Distance, batch, network, schedule
from tests.runs.test_resume import stop_after
from tests.train.test_tracking import events

SINGLE = 2.0**-23  # relative; losses are kept in float32, and so are the weights of a schedule
STEPS = 6
FACTORS = {"a": 0.5, "b": 0.8, "c": 1.5, "fixed": 0.25}


class Batches:
    """Three batches an epoch, in float64."""

    def __len__(self):
        return 3

    def epoch(self, epoch, start=0):
        for n in range(start, 3):
            x, y = batch(torch.float64)
            yield batch_of(x + epoch + 0.1 * n, y)


def objective(**weights):
    """A term of its own size for each key; the student does not learn."""
    terms = [Term(Distance().double(), key, ["5"], ["5"], weight=weights.get(key)) for key in FACTORS]
    for term in terms:
        term.loss.factor.data.fill_(FACTORS[term.key])
    return Objective(network(1).double(), network(0).double(), terms)


@cache
def raw(key, step):
    """The loss of a term at a step, by hand."""
    x = list(Batches().epoch(step // 3))[step % 3].inputs
    student, teacher = network(0).double().train(), network(1).double().eval()
    with torch.no_grad():
        return F.mse_loss(FACTORS[key] * student[:6](x), teacher[:6](x)).item()


def logged(one, weights, folder=None, **options):
    """The rows of a training with a log every step, or as ``options`` say."""
    loader = Batches()
    trainer = Trainer(
        one,
        Classification(),
        torch.optim.SGD(one.trainable_parameters(), 0.0),
        weights,
        loader,
        loader,
        epochs=2,
        **{"log_every": 1, **options},
    )
    rows = []
    trainer._record = lambda values: rows.append({"step": trainer.step, **values})
    if folder is None:
        trainer.fit()
    else:
        del trainer._record
        with Tracker(folder) as trainer.tracker:
            trainer.fit()
        rows = read_metrics(folder)
    return [row for row in rows if "lr" in row]


def shown(row, what):
    """Numbers of a row by key."""
    return {tag.removeprefix(f"{what}/"): value for tag, value in row.items() if tag.startswith(f"{what}/")}


@pytest.mark.slow
def test_a_schedule(tmp_path):
    """With λ and its warm-up, threshold, scales and start: a term is dropped from the start, another one on the way."""
    given = replace(
        schedule(
            [[9.0, 9.0, 9.0], [0.25, 0.5, 1.0], [0.75, 0.5, 0.5], [0.5, 1.0, 0.25]],
            ["c", "a", "b"],
            alpha_tilde=[[9.0, 9.0, 9.0], [0.5, 0.75, 1.0], [0.25, 0.75, 0.625], [0.0, 0.75, 0.25]],
        ),
        scales=torch.tensor([1.0, 2.0, 0.5]),
        strength=3.0,
        warmup=1.5,
        steps_per_epoch=2,
        threshold=0.5,
        start=0.25,
    )
    one = objective(fixed=0.7)
    rows = logged(one, replay(one, "searched", STEPS, given), tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for step, row in enumerate(rows):
        at = [step * 2 / (STEPS - 1), [0, 1, 2]]
        strength = 3.0 * min(1.0, (step // 3 + 1) / 1.5)
        expected = {
            "a": strength * 2.0 * np.interp(*at, [0.5, 0.5, 1.0]),
            "b": strength * 0.5 * np.interp(*at, [1.0, 0.5, 0.25]) * (np.interp(*at, [1.0, 0.625, 0.25]) > 0.5),
            "c": 0.0,
            "fixed": 0.7,
        }
        assert shown(row, "weight") == pytest.approx(expected, rel=SINGLE)
        losses = {key: raw(key, step) for key, weight in expected.items() if weight}
        assert shown(row, "term") == pytest.approx(losses, rel=SINGLE)
        assert shown(row, "weighted") == {k: v * row[f"weight/{k}"] for k, v in shown(row, "term").items()}
    assert [sorted(shown(row, "term")) for row in rows] == [["a", "b", "fixed"]] * 4 + [["a", "fixed"]] * 2
    written = events(tmp_path)
    for kind in ("weight", "term", "weighted"):
        for key in FACTORS:
            truth = [(row["step"], np.float32(row[f"{kind}/{key}"])) for row in rows if f"{kind}/{key}" in row]
            tag = f"{kind}/{key}"
            assert (tag in written.Tags()["scalars"]) == bool(truth)
            assert not truth or [(event.step, event.value) for event in written.Scalars(tag)] == truth


def test_constants_and_equal_weights():
    constants = {"a": 0.5, "b": 0.0, "c": lambda step: 0.1 * step, "fixed": 2.0}
    one = objective(**constants)
    for step, row in enumerate(logged(one, replay(one, "constant", STEPS))):
        weights = {**constants, "c": 0.1 * step}
        assert shown(row, "weight") == weights
        truth = {key: weights[key] * raw(key, step) for key in weights if weights[key]}
        assert shown(row, "weighted") == pytest.approx(truth, rel=SINGLE)
    one = objective()
    rows = logged(one, replay(one, "equal", STEPS, scale=2.0))
    assert all(shown(row, "weight") == dict.fromkeys(FACTORS, 0.5) for row in rows)


def test_no_term_has_no_weight():
    one = objective()
    for row in logged(one, replay(one, "none", STEPS)):
        assert not any(tag.startswith(("term/", "weight/", "weighted/")) for tag in row)


def test_terms_that_are_kept_keep_their_weights():
    one = objective(a=0.5, b=0.25, c=0.125, fixed=2.0)
    one.keep([one.terms[3], one.terms[1]])
    assert dict(zip(one.keys, one.weights_at(0), strict=True)) == {"fixed": 2.0, "b": 0.25}
    (row,) = logged(one, Replay(one), max_steps=1)
    assert shown(row, "weighted") == pytest.approx({"fixed": 2 * raw("fixed", 0), "b": raw("b", 0) / 4}, rel=SINGLE)


def test_a_row_of_several_steps():
    """The weight of the last one; the mean loss of those that have computed it, and the mean product of all."""
    weights = {"a": lambda step: 1.0 + step, "b": lambda step: float(step % 3 == 1), "c": lambda step: float(step > 2)}
    one = objective(**weights, fixed=0.0)
    first, second = logged(one, Replay(one), log_every=3)
    for start, row, keys in ((0, first, ["a", "b"]), (3, second, ["a", "b", "c"])):
        steps = range(start, start + 3)
        assert shown(row, "weight") == {**{key: at(steps[-1]) for key, at in weights.items()}, "fixed": 0.0}
        losses = {key: [raw(key, step) for step in steps if weights[key](step)] for key in keys}
        products = {key: [weights[key](step) * raw(key, step) for step in steps] for key in keys}
        assert shown(row, "term") == pytest.approx({k: np.mean(v) for k, v in losses.items()}, rel=SINGLE)
        assert shown(row, "weighted") == pytest.approx({k: np.mean(v) for k, v in products.items()}, rel=SINGLE)


class OnDevice(Replay):
    """Weights as a search gives them: a tensor, now and then numbers, where a threshold has dropped one."""

    def weights(self, step):
        return torch.tensor([0.5, 0.25, 0.125, 1.0]) * (step + 1) if step % 3 else [0.5, 0.0, 0.125, 1.0]


def test_weights_that_a_search_gives():
    one = objective()
    (row,) = logged(one, OnDevice(one), max_steps=2, log_every=2)
    assert shown(row, "weight") == {"a": 1.0, "b": 0.5, "c": 0.25, "fixed": 2.0}
    assert row["weighted/a"] == pytest.approx((0.5 * raw("a", 0) + 1.0 * raw("a", 1)) / 2, rel=SINGLE)
    assert row["term/b"] == pytest.approx(raw("b", 1), rel=SINGLE)
    assert row["weighted/b"] == pytest.approx(0.5 * raw("b", 1) / 2, rel=SINGLE)


@pytest.mark.parametrize("weights", [Replay, OnDevice])
def test_a_state_in_the_middle_of_a_row(weights):
    """What a training that goes on from there logs; one of a distpro that did not keep the weights logs the steps that it
    has done itself."""
    options = {"a": lambda step: 1.0 + step, "b": 0.5, "c": 0.25, "fixed": 0.0}

    def trainer(**more):
        one = objective(**options)
        optimizer = torch.optim.SGD(one.trainable_parameters(), 0.0)
        made = Trainer(one, Classification(), optimizer, weights(one), Batches(), Batches(), 1, log_every=3, **more)
        made.said = []
        made._record = lambda values: made.said.append(values)
        return made

    whole, part = trainer(), trainer(max_steps=3)
    whole.fit()
    for given in list(Batches().epoch(0))[:2]:
        part.train_step(given)
    state = copy.deepcopy(part.state_dict())
    again = trainer()
    again.load_state_dict(state)
    again.fit()
    kinds = ("term", "weight", "weighted")
    assert [shown(again.said[0], kind) for kind in kinds] == [shown(whole.said[0], kind) for kind in kinds]
    del state["used_weights"]
    before = trainer()
    before.load_state_dict(state)
    before.fit()
    assert before.said[0]["weighted/b"] == pytest.approx(before.said[0]["weight/b"] * raw("b", 2), rel=SINGLE)


@pytest.mark.slow
def test_a_recipe_that_is_resumed(tmp_path, monkeypatch):
    """Constants in one stage, a schedule in the next, which is stopped between two rows: each row once, in both files."""
    given = Schedule(("kd", "at"), torch.zeros(2, 3).long(), torch.ones(2, 2), torch.tensor([[0.5, 1.0], [0.25, 0.0]]))
    stages = [
        {"name": "one", "terms": [{"loss": "kd", "weight": 0.9}], "training": {"epochs": 1}},
        {
            "name": "two",
            "terms": [{"loss": "kd"}, {"loss": "at"}],
            "training": {"epochs": 2},
            "retrain": {"weights": "searched"},
        },
    ]
    changes = {
        "pathways": None,
        "terms": [],
        "data": {"samples": 80},
        "retrain": {"weights": "constant"},
        "tracking": {"tensorboard": True, "log_every": 3},
        "stages": stages,
    }
    config = settings(random_teacher(tmp_path), changes)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_after(patch, [2])
        distpro.retrain(config, schedule=given, out=tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_after(patch, [5])
        distpro.retrain(config, schedule=given, out=tmp_path / "run", resume=True)
    distpro.retrain(config, schedule=given, out=tmp_path / "run", resume=True)
    for stage, steps in (("1_one", [3, 4]), ("2_two", [3, 4, 6, 8])):
        rows, written = read_metrics(tmp_path / "run" / stage), events(tmp_path / "run" / stage)
        trained = [row for row in rows if "lr" in row]
        assert [row["step"] for row in trained] == steps
        for row in trained:
            at = [(row["step"] - 1) / 7, [0, 1]]
            expected = {"kd": np.interp(*at, [0.5, 0.25]), "at": np.interp(*at, [1.0, 0.0])}
            assert shown(row, "weight") == pytest.approx({"kd": 0.9} if stage == "1_one" else expected, rel=SINGLE)
        for tag in (tag for tag in trained[0] if tag.startswith(("term/", "weight/", "weighted/"))):
            found = [(event.step, event.value) for event in written.Scalars(tag)]
            assert found == [(row["step"], np.float32(row[tag])) for row in trained if tag in row]
