"""One schedule file, three ways to replay it: `distpro retrain`, `Objective.follow`, and a process that reads a column."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from distpro import build
from distpro.config.reading import for_retrain, merge, read_config
from distpro.models import build_model
from distpro.process import Clock, parse_process
from distpro.runs.commands import retrain_config
from distpro.schedule import Schedule
from distpro.schedule_file import meaning_of
from distpro.weights import replay
from tests.digits import settings

pytestmark = pytest.mark.slow

KEYS = (*(f"layer{i}:pre_relu<-layer{i}@conv1x1" for i in (1, 2, 3)), "kd")
STEPS, PER_EPOCH = 12, 4  # of the search; a retrain has 15, 5 an epoch

MEANT = {"training": {"distill_weight": 3.0}, "retrain": {"threshold": 0.5, "start": 0.3}}
WARM = merge(MEANT, {"training": {"distill_warmup": 2.0}})
LONGER = merge(WARM, {"retrain": {"training": {"epochs": 6, "distill_weight": 2.0}}})


@pytest.fixture(scope="module", autouse=True)
def teacher(tmp_path_factory):
    """A teacher in the working directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("meaning"))
        torch.save(build_model("resnet14", num_classes=10).state_dict(), "teacher.pt")
        yield


def searched(changes):
    """What a search with this config would write, α̃ below the threshold for two terms now and then."""
    config = json.loads(read_config(settings("teacher.pt", changes)).model_dump_json())
    generator = torch.Generator().manual_seed(0)
    alpha_tilde = 1 + 0.3 * torch.randn(STEPS, 4, generator=generator)
    alpha_tilde[6:, 1], alpha_tilde[3:7, 3] = 0.4, 0.45
    weights = alpha_tilde.exp() / (alpha_tilde.exp().sum(1, keepdim=True) + np.e)
    return Schedule(
        KEYS,
        torch.tensor([[1, 1, 1], [2, 2, 1], [3, 3, 1], [0, 0, 0]]),
        alpha_tilde,
        weights,
        ("conv1x1",) * 3 + ("",),
        float(PER_EPOCH),
        {"config": config},
        torch.tensor([1.0, 2.0, 0.5, 4.0]),
        **meaning_of(config),
    )


def as_version_2(path):
    """The file as the version before wrote it, by hand."""
    content = torch.load(path, weights_only=True)
    for name in ("strength", "warmup", "reading", "threshold", "start", "scalars"):
        del content[name]
    torch.save({**content, "version": 2}, path)


def replayed(config, schedule):
    """λ·s·w of every step that a retrain takes, (T, 4); a term that is taken out has 0."""
    trainer = build.build_retrain(config, build.build_data(config), schedule)
    return table(trainer.objective, trainer.weights.weights, trainer.total_steps), trainer


def table(objective, weights, total):
    rows = [dict(zip(objective.keys, weights(step), strict=True)) for step in range(total)]
    return np.array([[row.get(key, 0.0) for key in KEYS] for row in rows])


def truth(schedule, total, strength, threshold, start, epochs=3, warmup=0.0):
    """In float64 with NumPy."""
    position = np.linspace(int(start * STEPS), STEPS - 1, total)
    w, alpha = (
        np.stack([np.interp(position, np.arange(STEPS), column) for column in x.double().T.numpy()], 1)
        for x in (schedule.weights, schedule.alpha_tilde)
    )
    by = strength * np.array([min(1, (s * epochs // total + 1) / warmup) if warmup else 1 for s in range(total)])
    return by[:, None] * schedule.scales.double().numpy() * w * (True if threshold is None else alpha > threshold)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(
    "changes, total, said",
    [
        (MEANT, 15, {"strength": 3.0}),
        (WARM, 15, {"strength": 3.0, "warmup": 2.0}),
        # 2 of the retrain's 6 epochs are 1 of the search's 3, the first
        (LONGER, 30, {"strength": 2.0, "warmup": 1.0}),
    ],
)
def test_three_ways_to_replay_one_file(changes, total, said, version, tmp_path):
    path = str(tmp_path / "alpha.pt")
    searched(changes).save(path)
    if version == 2:
        as_version_2(path)
    schedule = Schedule.load(path)
    expected = truth(schedule, total, threshold=0.5, start=0.3, **said)
    assert (expected == 0).any() and len(set(expected.sum(1).round(4))) == total

    by_command, trainer = replayed(retrain_config(None, schedule, []), schedule)
    assert trainer.total_steps == total
    trainer.objective.follow(schedule, total)
    by_follow = table(trainer.objective, trainer.objective.weights_at, total)
    columns = [parse_process({"schedule": {"file": path, "key": key}}).bind(Clock(total)) for key in KEYS]
    by_process = np.array([[column(step) for column in columns] for step in range(total)])
    for found in (by_command, by_follow, by_process):
        np.testing.assert_allclose(found, expected, rtol=1e-5)

    whole = parse_process({"schedule": {"file": path, "reduction": "total"}}).bind(Clock(total))
    summed = (expected / schedule.scales.numpy()).sum(1)
    np.testing.assert_allclose([whole(step) for step in range(total)], summed, rtol=1e-5)


# Which wins: what a config states, else what the schedule says

STATED = {
    "nothing": ({}, [], {}),
    "λ": ({"training": {"distill_weight": 5.0}}, [], {"strength": 5.0}),
    "λ of the retrain": ({"retrain": {"training": {"distill_weight": 5.0}}}, [], {"strength": 5.0}),
    "λ, override": ({}, ["training.distill_weight=5"], {"strength": 5.0}),
    "no threshold": ({"retrain": {"threshold": None}}, [], {"threshold": None}),
    "no threshold, override": ({}, ["retrain.threshold=null"], {"threshold": None}),
    "start": ({"retrain": {"start": 0}}, [], {"start": 0.0}),
    "warm-up": ({"training": {"distill_warmup": 3}}, [], {"warmup": 3.0}),
    "no warm-up": ({"training": {"distill_warmup": 0}}, [], {"warmup": 0.0}),
}
SAID = {"strength": 3.0, "warmup": 2.0, "threshold": 0.5, "start": 0.3}


@pytest.mark.parametrize("stated", STATED)
@pytest.mark.parametrize("how", ["file", "base", "object", "own"])
def test_a_config_wins_where_it_states_something(how, stated, tmp_path):
    changes, overrides, says = STATED[stated]
    schedule = searched(WARM)
    config = settings("teacher.pt", changes)
    if how == "own":
        config = None
        overrides = [*overrides, *(f"{k}={json.dumps(v)}" for k, v in flat(changes))]
    elif how == "object":
        config = read_config(config)
    else:
        (tmp_path / "below.yaml").write_text(yaml.safe_dump(config))
        (tmp_path / "above.yaml").write_text("base: below.yaml\nname: above\n")
        config = tmp_path / ("below.yaml" if how == "file" else "above.yaml")
    found, _ = replayed(retrain_config(config, schedule, overrides), schedule)
    np.testing.assert_allclose(found, truth(schedule, 15, **{**SAID, **says}), rtol=1e-5)


def flat(changes, above=""):
    for key, value in changes.items():
        yield from flat(value, f"{above}{key}.") if isinstance(value, dict) else [(f"{above}{key}", value)]


def test_what_a_schedule_says_now_wins_over_the_config_in_it():
    schedule = replace(searched(LONGER), strength=7.0, warmup=0.0, threshold=None, start=0.0)
    found, _ = replayed(retrain_config(None, schedule, []), schedule)
    np.testing.assert_allclose(found, truth(schedule, 30, 7.0, None, 0.0), rtol=1e-5)


def test_a_schedule_that_the_config_names_says_the_same(tmp_path):
    searched(WARM).save(tmp_path / "alpha.pt")
    config = settings("teacher.pt", {"retrain": {"schedule": str(tmp_path / "alpha.pt")}})
    checked = retrain_config(config, None, [])
    found, _ = replayed(checked, Schedule.load(tmp_path / "alpha.pt"))
    np.testing.assert_allclose(found, truth(searched(WARM), 15, **SAID), rtol=1e-5)


def test_the_resolved_config_of_a_retrain_says_what_was_played(tmp_path):
    """And so repeats it."""
    schedule = searched(WARM)
    config = settings("teacher.pt")
    resolved = retrain_config(config, schedule, [])
    training, retrain = resolved.training, resolved.retrain
    assert (training.distill_weight, training.distill_warmup) == (3.0, None)
    assert (retrain.threshold, retrain.start) == (0.5, 0.3)
    again = retrain_config(json.loads(resolved.model_dump_json()), schedule, [])
    assert again == resolved == for_retrain(resolved)


def test_equal_weights_take_the_schedules_strength():
    schedule = searched(WARM)
    config = settings("teacher.pt", {"retrain": {"weights": "equal"}})
    found, trainer = replayed(retrain_config(config, schedule, []), schedule)
    by = 3.0 * np.array([min(1, (step // 5 + 1) / 2) for step in range(15)])
    np.testing.assert_allclose(found, by[:, None] * schedule.scales.numpy() / 4, rtol=1e-6)
    replay(trainer.objective, "equal", 15, schedule)
    np.testing.assert_allclose(table(trainer.objective, trainer.objective.weights_at, 15), found)


def test_the_task_weight_and_a_temperature_move_in_a_retrain():
    scalars = {"task": torch.linspace(1, 0, STEPS), "kd.temperature": torch.linspace(2, 13, STEPS)}
    schedule = replace(searched(merge(MEANT, {"retrain": {"start": 0.0}})), scalars=scalars)
    config = retrain_config(None, schedule, ["training.max_steps=12"])
    trainer = build.build_retrain(config, build.build_data(config), schedule)
    kd = next(term for term in trainer.objective.terms if term.key == "kd")
    for step in (0, 4, 11):
        trainer.objective.at(step)
        assert trainer.objective.task_weight_at(step) == pytest.approx(1 - step / 11)
        assert kd.loss.temperature == pytest.approx(2 + step)


def test_a_process_may_read_a_scalar(tmp_path):
    scalars = {"kd.temperature": torch.linspace(2, 13, STEPS)}
    replace(searched(WARM), scalars=scalars).save(tmp_path / "alpha.pt")
    spec = {"schedule": {"file": str(tmp_path / "alpha.pt"), "key": "kd.temperature"}}
    process = parse_process(spec).bind(Clock(9))
    assert [process(0), process(8), process(99)] == pytest.approx(
        [5, 13, 13]
    )  # without the first 3 of 12 steps, without λ
