"""Which student a training leaves, against loops that anybody would write."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import update_bn

import distpro
from distpro.train.keeping import Keeper, MovingAverage, _mean, refresh_statistics
from distpro.train.trainer import Interrupted, Trainer
from tests.digits import settings
from tests.train.test_trainer import Batches, build, network


def keeper(trainer, **options):
    return Keeper(trainer.objective, "accuracy", True, train=trainer.train_loader, **options)


@pytest.mark.parametrize(("decay", "warmup"), [(0.9, False), (0.3, True), (0.999, True)])
def test_the_moving_average_is_a_hand_loop_in_float64(decay, warmup):
    trainer = build()
    trainer.objective.student.model.double()
    trainer.keeper = keeper(trainer, ema=partial(MovingAverage, decay=decay, warmup=warmup))
    trainer.train_loader = trainer.test_loader = None
    average = None
    for batch in [*Batches().epoch(0), *Batches().epoch(1)]:
        trainer.objective.student.model.zero_grad()
        loss = trainer.objective.student.model(batch.inputs.double()).square().mean()
        loss.backward()
        trainer.optimizer.step()
        trainer.keeper.after_step()
        now = {name: value.clone() for name, value in trainer.objective.student.model.state_dict().items()}
        if average is None:
            average, n = now, 0
            continue
        n += 1
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        average = {k: d * average[k] + (1 - d) * v if v.is_floating_point() else v for k, v in now.items()}
    found = trainer.keeper.average.module[0].state_dict()
    assert found.keys() == average.keys()
    for name, truth in average.items():
        assert torch.allclose(found[name], truth, rtol=1e-13, atol=1e-14), name
    assert not torch.equal(found["1.running_mean"], now["1.running_mean"])
    assert found["1.num_batches_tracked"] == 6


@pytest.mark.parametrize(
    ("reparametrise", "weight"),
    [
        (partial(prune.l1_unstructured, name="weight", amount=0.5), lambda s: s["0.weight_orig"] * s["0.weight_mask"]),
        (
            nn.utils.weight_norm,
            lambda s: s["0.weight_g"] * s["0.weight_v"] / s["0.weight_v"].flatten(1).norm(dim=1)[:, None, None, None],
        ),
    ],
    ids=["prune", "weight_norm"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_the_moving_average_of_a_weight_that_is_computed_before_each_pass(reparametrise, weight):
    trainer = build()
    student = trainer.objective.student.model
    reparametrise(student[0])
    trainer.optimizer = torch.optim.SGD(student.parameters(), 0.1)
    trainer._base_rates = [0.1]
    trainer.keeper = keeper(trainer, ema=partial(MovingAverage, decay=0.7, warmup=False))
    average = None
    for batch in [*Batches().epoch(0), *Batches().epoch(1)]:
        trainer.train_step(batch)
        now = {name: value.clone() for name, value in student.state_dict().items()}
        average = {
            k: 0.7 * average[k] + 0.3 * v if average and v.is_floating_point() else v.clone() for k, v in now.items()
        }
    trainer.keeper.conclude()
    plain = network(1).eval()
    plain.load_state_dict({k: v for k, v in average.items() if "0.weight" not in k} | {"0.weight": weight(average)})
    with torch.no_grad():
        assert torch.allclose(student.eval()(batch.inputs), plain(batch.inputs), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(weight(now), weight(average), atol=1e-3)


class Fourier(nn.Module):
    """A complex parameter and a complex buffer beside real ones."""

    def __init__(self, seed):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.real = nn.Parameter(torch.randn(3, generator=generator, dtype=torch.double))
        self.phase = nn.Parameter(torch.randn(3, 2, generator=generator, dtype=torch.cdouble))
        self.register_buffer("spectrum", torch.randn(4, generator=generator, dtype=torch.cdouble))
        self.register_buffer("count", torch.tensor(seed))


def states(count):
    return [{k: v.clone() for k, v in Fourier(seed).state_dict().items()} for seed in range(count)]


def test_complex_weights_are_averaged_as_real_ones_are():
    model, several = Fourier(0), states(4)
    average = MovingAverage(model, 0.7, warmup=False)
    for state in several:
        model.load_state_dict(state)
        average.update_parameters(model)
    found = average.module.state_dict()
    for name in ("real", "phase", "spectrum"):
        parts = [torch.view_as_real(s[name]) if s[name].is_complex() else s[name] for s in several]
        shares = (0.7**3, 0.3 * 0.7**2, 0.3 * 0.7, 0.3)
        truth = sum(share * part for share, part in zip(shares, parts, strict=True))
        part = torch.view_as_real(found[name]) if found[name].is_complex() else found[name]
        assert torch.allclose(part, truth, rtol=1e-13, atol=1e-14), name
    assert found["count"] == 3


def test_the_mean_of_the_best_has_complex_weights_too():
    several = states(3)
    mean = _mean(several)
    for name in ("real", "phase", "spectrum"):
        truth = (several[0][name] + several[1][name] + several[2][name]) / 3
        assert mean[name].dtype == truth.dtype and torch.allclose(mean[name], truth, rtol=1e-13, atol=1e-14), name
    assert mean["count"] == 0


def test_the_average_of_the_last_step_is_kept_and_evaluated_beside_the_student():
    plain, trainer = build(), build()
    trainer.keeper = keeper(trainer, ema=partial(MovingAverage, decay=0.5, warmup=False))
    torch.manual_seed(0)
    first = plain.fit()
    student = copy.deepcopy(plain.objective.student.model.state_dict())
    torch.manual_seed(0)
    result = trainer.fit()
    assert [row["accuracy"] for row in trainer.history] == [row["accuracy"] for row in plain.history]  # left alone
    kept, average = trainer.objective.student.model.state_dict(), trainer.keeper.average.module[0].state_dict()
    assert all(torch.equal(kept[name], average[name]) for name in kept)
    assert not torch.equal(kept["0.weight"], student["0.weight"])
    assert result["last_accuracy"] == first["accuracy"]
    assert result["accuracy"] == trainer.history[-1]["ema_accuracy"] == trainer.test()["accuracy"]


class Scripted:
    """A test whose accuracy is said in advance: of the student, and of its moving average."""

    def __init__(self, values):
        self.values = iter(values)

    def __call__(self, loader):
        return {"accuracy": next(self.values) if loader == "validation" else 0.0}


def watched(values, steps=5, **options):
    """A keeper that has seen so many steps with these validation accuracies, the students, and how it ended."""
    trainer = build()
    kept = keeper(trainer, validation="validation", **options)
    trainer.keeper, test = kept, Scripted(values)
    seen = []
    for epoch, batch in enumerate([*Batches().epoch(0), *Batches().epoch(1)][:steps], start=1):
        trainer.train_step(batch)
        seen.append(copy.deepcopy(trainer.objective.student.model.state_dict()))
        kept.evaluate(epoch, test, "test")
        if kept.stops:
            break
    return trainer, kept, seen


def same(found, truth):
    return all(torch.equal(found[name], value) for name, value in truth.items())


@pytest.mark.parametrize(
    ("values", "best"), [([3, 5, 4, 5, 1], 2), ([float("nan"), 1, 2, 2, 0], 3), ([1, 2, 3, 4, 5], 5)]
)
def test_the_best_is_the_first_of_the_best_on_validation_data(values, best):
    trainer, kept, seen = watched(values, keep="best")
    said = kept.conclude()
    assert said == f"kept: epoch {best}, validation accuracy {values[best - 1]}"
    assert same(trainer.objective.student.model.state_dict(), seen[best - 1])


def test_lower_is_better_where_the_task_says_so():
    trainer, kept, seen = watched([3, 5, 4, 2, 2], keep="best")
    kept = Keeper(trainer.objective, "accuracy", False, validation="validation", keep="best")
    for epoch, value in enumerate([3, 1, 2], start=1):
        kept.evaluate(epoch, Scripted([value]), "test")
    assert kept.best == {"value": 1, "epoch": 2, "averaged": False}


def test_student_and_average_are_both_candidates():
    values = [1, 2, 9, 8, 3, 10, 4, 4, 5, 5]  # student, average, student, average, ...
    trainer, kept, seen = watched(values, keep="best", ema=partial(MovingAverage, decay=0.5, warmup=False))
    assert kept.conclude() == "kept: epoch 3 of the moving average, validation accuracy 10"
    average = {k: v.clone() for k, v in seen[0].items()}
    for now in seen[1:3]:
        average = {k: 0.5 * average[k] + 0.5 * v if v.is_floating_point() else v for k, v in now.items()}
    found = trainer.objective.student.model.state_dict()
    assert all(torch.allclose(found[k], v, rtol=1e-6, atol=1e-7) for k, v in average.items())


def test_patience_counts_evaluations_without_a_better_one():
    assert len(watched([1, 2, 2, 1, 3], patience=2)[2]) == 4
    _, kept, seen = watched([1, 2, 1, 3, 3], patience=2)
    assert len(seen) == 5 and not kept.stops
    _, kept, _ = watched([4, 2, 1], steps=3, patience=2)
    assert kept.why_it_stopped() == (
        "early stopping: no better validation accuracy in 2 evaluations than accuracy 4 of epoch 1"
    )
    assert kept.conclude() == ""


def test_the_mean_of_the_best_has_statistics_of_its_own():
    trainer, kept, seen = watched([1, 7, 3, 9, 2], keep="average", average_of=3)
    assert kept.conclude() == "kept: the mean of epochs 4, 2, 3, the best on validation data"
    truth = network(1)
    truth.load_state_dict(
        {k: torch.stack([seen[n][k].double() for n in (3, 1, 2)]).mean(0).to(v.dtype) for k, v in seen[0].items()}
    )
    update_bn([batch.inputs for batch in Batches().epoch(0)], truth)
    found = trainer.objective.student.model.state_dict()
    for name, value in truth.state_dict().items():
        assert torch.allclose(found[name].double(), value.double(), rtol=1e-6, atol=1e-7), name


def test_frozen_statistics_stay():
    objective = distpro.Objective(None, nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    objective = distpro.Objective(None, objective.student.model, frozen=[objective.student.model[0]])
    refresh_statistics(objective, Batches())
    frozen, other = objective.student.model[0], objective.student.model[2]
    assert not frozen.running_mean.any() and other.running_mean.any()
    assert frozen.momentum == other.momentum == 0.1


# Whole runs

RECIPE = {
    "ema": {"decay": 0.8},
    "keep": "average",
    "average_of": 2,
    "patience": 3,
    "validation_fraction": 0.2,
    "epochs": 4,
    "optimizer": {
        "name": "nadam",
        "momentum": 0.9,
        "params": {"decoupled_weight_decay": True},
        "no_decay": "norms_and_biases",
    },
}


@pytest.mark.slow
def test_a_resumed_run_comes_to_the_same_bytes(tmp_path, monkeypatch):
    data = {
        "augment": ["flip", {"crop": {"padding": 1}}, "trivial_augment", "random_erasing"],
        "repeats": 2,
        "sampler": "balanced",
    }
    config = settings(changes={"training": RECIPE, "data": data})
    whole = distpro.train(config, tmp_path / "whole")

    def stops(trainer):
        return trainer.step == 6  # in the second epoch

    monkeypatch.setattr(Trainer, "_stops", stops)
    with pytest.raises(Interrupted):
        distpro.train(config, tmp_path / "broken")
    monkeypatch.undo()
    again = distpro.train(config, tmp_path / "broken", resume=True)
    assert {**whole.metrics, "seconds": 0} == {**again.metrics, "seconds": 0}
    assert (tmp_path / "whole/student.pt").read_bytes() == (tmp_path / "broken/student.pt").read_bytes()
    assert distpro.evaluate(tmp_path / "whole")["accuracy"] == whole.metrics["accuracy"]
    finished = distpro.train(config, tmp_path / "whole", resume=True)  # nothing is left to do
    assert {**finished.metrics, "seconds": 0} == {**whole.metrics, "seconds": 0}


@pytest.mark.slow
def test_a_training_without_improvement_ends_early(tmp_path):
    config = settings(
        changes={"training": {"epochs": 9, "patience": 1, "validation_fraction": 0.3, "optimizer": {"lr": 1e-9}}}
    )
    result = distpro.train(config, tmp_path / "run")
    assert result.metrics["epoch"] < 9 and result.metrics["step"] == 4 * result.metrics["epoch"]
    resumed = distpro.train(config, tmp_path / "run", resume=True)
    assert resumed.metrics["epoch"] == result.metrics["epoch"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": "best"}, "training.keep: chooses by validation data, never by test data"),
        ({"patience": 3}, "training.patience: chooses by validation data, never by test data"),
        ({"average_of": 4}, "training.average_of: is of keep: average, not of keep: last"),
        ({"keep": "best", "average_of": 4}, "training.average_of: is of keep: average, not of keep: best"),
        ({"keep": "best", "validation_fraction": 0.001}, "leaves one part of the split empty"),
    ],
)
def test_without_validation_data_nothing_is_chosen(changes, message):
    with pytest.raises(distpro.UserError, match=message):
        distpro.train(settings(changes={"training": changes}))


@pytest.mark.parametrize("key", ["ema", "keep", "patience", "validation_fraction"])
def test_a_search_keeps_no_student(key):
    value = {"ema": {}, "keep": "best", "patience": 1, "validation_fraction": 0.1}[key]
    with pytest.raises(distpro.UserError, match=f"training.{key}: a search keeps a schedule and no student"):
        distpro.search(settings("none.pt", {"training": {key: value}}))
