"""Candidates against each other: what is tried, what it costs, what is chosen, and a tuning that is stopped."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
import yaml

import distpro
from distpro import build
from distpro.build.data import search_parts
from distpro.cli import main
from distpro.config.reading import read_config
from distpro.losses.usual import USUAL
from distpro.runs.candidates import Candidate
from distpro.runs.trials import Pruned, Trials
from distpro.schedule import Schedule
from distpro.train.trainer import Interrupted
from tests.conftest import ROOT
from tests.digits import random_teacher, settings
from tests.runs.test_resume import stop_in_training

optuna = pytest.importorskip("optuna", reason="distpro tune needs it: pip install 'distpro[tune]'")
from distpro.runs.ledger import Ledger  # noqa: E402

pytestmark = pytest.mark.slow

SINGLE = {"families": ["single"], "methods": ["kd", "sp"]}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return random_teacher(tmp_path_factory.mktemp("teacher"))


def tuning(teacher, **tune):
    """Trials of twelve steps, in three epochs, in a space of two terms."""
    space = {"pathways": None, "terms": [{"loss": "kd"}, {"loss": "sp"}]}
    return settings(teacher, {**space, "tune": {"methods": ["kd", {"loss": "at", "weight": 10}], "trials": 5, **tune}})


def rows_of(folder):
    return [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]


def without_times(rows):
    return [{**row, "seconds": 0} for row in rows]


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    distpro.tune(tuning(teacher), out=folder)
    return folder


def imitate(monkeypatch, loss):
    """Trainings that take no time: ``loss(config, schedule, progress)`` is what one has come to; returns their configs."""
    configs = []

    def run(self, name, schedule=None, config=None, watch=None, every=None, title=""):
        configs.append(config)
        epochs = config.training.epochs
        for epoch in range(1, epochs + 1):
            value = loss(config, schedule, epoch / epochs)
            row = {"epoch": epoch, "step": 4 * epoch, "accuracy": 50 - value, "loss": value}
            try:
                if watch is not None and epoch % every == 0:
                    watch(row)
            except Pruned:
                break
        return {**row, "seconds": 1.0}

    monkeypatch.setattr(Trials, "run", run)
    return configs


def weight_of(config):
    return config.terms[0].weight


# What is tried


def test_every_candidate_is_trained_where_its_range_begins(whole):
    rows = rows_of(whole)
    first = {row["candidate"]: row for row in rows[:4]}
    assert list(first) == ["kd", "at", "equal", "static"]
    assert [first[name]["values"] for name in ("kd", "at", "equal")] == [{"weight": 0.9}, {"weight": 10.0}, {"λ": 1.0}]
    assert first["static"]["values"] == {"kd": 0.5, "sp": 0.5}
    assert all(row["state"] == "complete" for row in first.values())
    same = ("loss", "accuracy", "step")
    assert [first["static"][k] for k in same] == [first["equal"][k] for k in same]  # it is the same training,
    assert (first["static"]["cost"], first["equal"]["cost"]) == (0, 1)  # which is not done twice


def test_the_budget_is_spent_and_not_more(whole):
    rows, result = rows_of(whole), json.loads((whole / "result.json").read_text())
    assert 4 < result["spent"] <= 5 and result["spent"] == pytest.approx(sum(row["cost"] for row in rows))
    assert result["trials"] == len(rows) >= 6
    for row in rows:
        assert row["cost"] == pytest.approx(
            0 if row["candidate"] == "static" and row["trial"] == 3 else row["epochs"] / 3
        )
    low, high = 0.03, 30
    assert all(low * 0.9 <= r["values"]["weight"] <= high * 0.9 for r in rows if r["candidate"] == "kd")


def test_what_is_best_is_first_and_in_the_files(whole):
    rows = [row for row in rows_of(whole) if row["state"] == "complete"]
    best = min(rows, key=lambda row: row["loss"])
    result = json.loads((whole / "result.json").read_text())
    assert result["loss"] == best["loss"] and result["best"]["values"] == best["values"]
    board = (whole / "leaderboard.md").read_text()
    assert "of 5 trainings of 3 epochs" in board and "judged by the validation loss" in board
    assert board.partition("| 1 | ")[2].startswith(best["candidate"])
    assert {"config.yaml", "environment.json", "tune.png", "best.yaml"} <= {path.name for path in whole.iterdir()}
    assert not list((whole / "trials").glob("*/checkpoint.pt"))


def test_a_trial_is_a_retrain_on_the_searchs_part(teacher, whole):
    config = read_config(tuning(teacher))
    data = build.build_data(config)
    validation, train = search_parts(config, data)
    own = read_config({**tuning(teacher), "terms": [{"loss": "kd", "weight": 0.9}], "retrain": {"weights": "constant"}})
    expected = build.build_retrain(own, data, None, parts=(train, validation)).fit()
    found = next(row for row in rows_of(whole) if row["candidate"] == "kd" and row["trial"] == 0)
    assert (found["loss"], found["accuracy"]) == (expected["loss"], expected["accuracy"])


# What is chosen


def test_the_weight_that_is_chosen_is_the_best_judged(teacher, tmp_path, monkeypatch):
    """Of KD a weight of 3 is best by far; at its usual one SP is better."""

    def loss(config, schedule, progress):
        worst = 1.0 if config.terms[0].loss == "kd" else 0.5
        return worst * abs(math.log(weight_of(config) / (3 if config.terms[0].loss == "kd" else 9000)))

    configs = imitate(monkeypatch, loss)
    tuned = distpro.tune(tuning(teacher, **SINGLE, trials=40, pruner="none"), out=tmp_path / "run")
    judged = [loss(config, None, 1.0) for config in configs]
    assert len(configs) == 40
    assert tuned.metrics["loss"] == min(judged) < 0.3
    best = read_config(tmp_path / "run" / "best.yaml")
    assert weight_of(best) == weight_of(configs[judged.index(min(judged))]) == weight_of(tuned.config)
    assert best.retrain.weights == "constant" and best.pathways is None and len(best.terms) == 1


def test_it_may_be_judged_by_the_headline(teacher, tmp_path, monkeypatch):
    def run(self, name, schedule=None, config=None, **options):
        weight = weight_of(config)
        return {"epoch": 3, "step": 12, "accuracy": weight, "loss": weight, "seconds": 1.0}

    monkeypatch.setattr(Trials, "run", run)
    source = tuning(teacher, **SINGLE | {"methods": ["kd"]}, trials=6, pruner="none")
    weights = {by: weight_of(distpro.tune(source, overrides=[f"tune.by={by}"]).config) for by in ("loss", "headline")}
    assert weights["loss"] < 0.9 < weights["headline"]


@pytest.mark.parametrize("family", ["equal", "static"])
def test_the_best_retrains_with_the_trials_weights(teacher, tmp_path, family):
    """Over the whole training part, by best.yaml alone."""
    out = tmp_path / "run"
    tuned = distpro.tune(tuning(teacher, families=[family], trials=3, epochs=1, pruner="none"), out=out)
    values = json.loads((out / "result.json").read_text())["best"]["values"]
    config, schedule = read_config(out / "best.yaml"), Schedule.load(out / "best.pt")
    assert config.training.epochs == 3 and len(rows_of(out)) == 3
    expected = [values["kd"], values["sp"]] if family == "static" else [values["λ"] / 2] * 2
    expected = [weight * scale for weight, scale in zip(expected, schedule.scales.tolist(), strict=True)]
    trainer = build.build_retrain(config, build.build_data(config), schedule)
    for step in (0, trainer.total_steps - 1):
        assert trainer.weights.weights(step) == pytest.approx(expected, rel=1e-6)
    result = distpro.retrain(out / "best.yaml", out=tmp_path / "retrain")
    assert result.metrics == {
        **distpro.retrain(tuned.config, schedule=tuned.schedule).metrics,
        "seconds": result.metrics["seconds"],
    }


def test_a_learned_schedule_takes_part_with_its_controls(teacher, tmp_path):
    source = tuning(teacher)
    distpro.search({**source, "search": {"horizon": 3, "trials": 0}}, out=tmp_path / "search")
    seconds = json.loads((tmp_path / "search" / "result.json").read_text())["seconds"]
    alpha = tmp_path / "search" / "alpha.pt"
    out = tmp_path / "run"
    tuned = distpro.tune(source, out=out, overrides=["tune.families=[learned]", "tune.epochs=1"], schedule=alpha)
    assert [row["candidate"] for row in tuned.rows] == [f"learned, {c}" for c in ("searched", "final", "mean", "equal")]
    costs = {row["candidate"]: row["cost"] for row in tuned.rows}
    assert costs == {
        "learned, searched": 1,
        "learned, final": 0,
        "learned, mean": 0,
        "learned, equal": 1,
    }  # its start is 1
    assert f"comes from a search of {seconds:.0f} s" in (out / "leaderboard.md").read_text()
    best = read_config(out / "best.yaml")
    assert f"learned, {best.retrain.weights}" == json.loads((out / "result.json").read_text())["best"]["candidate"]
    expected = distpro.retrain(source, alpha, overrides=[f"retrain.weights={best.retrain.weights}"]).metrics
    assert distpro.retrain(out / "best.yaml").metrics["loss"] == expected["loss"]


def test_objects_of_ones_own_take_part_and_are_left_alone(teacher, monkeypatch):
    """Without a folder."""
    config = read_config(tuning(teacher))
    data = build.build_data(config)
    pair = build.build_pair(config, data)
    before = {name: tensor.clone() for name, tensor in pair.student.state_dict().items()}
    own = {"data": data, "teacher": pair.teacher, "student": pair.student}
    source = {
        **tuning(teacher, **SINGLE, trials=2, epochs=1),
        "search": {"horizon": 3},
    }  # judged as such a search judges
    tuned = distpro.tune(source, **own)
    assert tuned.metrics["calibrated_loss"] == min(row["judged"] for row in tuned.rows) <= tuned.metrics["loss"]
    assert len(tuned.rows) == 2 and tuned.folder is None and tuned.schedule is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in pair.student.state_dict().items())
    assert distpro.retrain(tuned.config, **own).metrics["loss"] > 0


# Pruning


def test_what_falls_behind_is_pruned_and_counts_in_part(teacher, tmp_path, monkeypatch):
    def loss(config, schedule, progress):
        return abs(math.log(weight_of(config) / (0.9 if config.terms[0].loss == "kd" else 1e6))) + 1 - progress

    imitate(monkeypatch, loss)
    source = settings(teacher, {**tuning(teacher, **SINGLE, trials=12), "training": {"epochs": 9}})
    tuned = distpro.tune(source, out=tmp_path / "run")
    pruned = [row for row in tuned.rows if row["state"] == "pruned"]
    assert len(tuned.rows) > 12 and pruned
    assert all(row["cost"] == row["epochs"] / 9 and row["epochs"] in (1, 3) for row in pruned)
    assert 11 < sum(row["cost"] for row in tuned.rows) <= 12
    assert all(row["state"] == "complete" for row in tuned.rows[:2])  # each candidate's first
    assert f"({len(pruned)} pruned)" in (tmp_path / "run" / "leaderboard.md").read_text()


def test_a_training_ends_where_it_is_pruned(teacher):
    config = read_config(tuning(teacher))
    seen = []

    def watch(row):
        seen.append(row["epoch"])
        if row["epoch"] == 2:
            raise Pruned

    own = config.model_copy(update={"retrain": config.retrain.model_copy(update={"weights": "none"})})
    metrics = Trials(config, build.build_data(config), build.Given()).run("one", config=own, watch=watch, every=1)
    assert seen == [1, 2] and (metrics["epoch"], metrics["step"]) == (2, 8) and "loss" in metrics


# Going on


@pytest.mark.parametrize("trial", [1, 4])
def test_a_tuning_that_is_stopped_comes_to_the_same_trials(teacher, whole, tmp_path, monkeypatch, trial):
    stop_in_training(monkeypatch, trial, steps=3)
    with pytest.raises(Interrupted, match="of 5 trainings; --resume goes on from here"):
        distpro.tune(tuning(teacher), out=tmp_path / "run")
    monkeypatch.undo()
    distpro.tune(tuning(teacher), out=tmp_path / "run", resume=True)
    assert without_times(rows_of(tmp_path / "run")) == without_times(rows_of(whole))


def test_it_may_go_on_with_a_larger_budget(teacher, tmp_path, monkeypatch):
    imitate(monkeypatch, lambda config, schedule, progress: abs(math.log(weight_of(config) / 3)))
    source, out = tuning(teacher, **SINGLE, trials=4, pruner="none"), tmp_path / "run"
    first = distpro.tune(source, out=out).rows
    more = distpro.tune(source, out=out, overrides=["tune.trials=7"], resume=True).rows
    assert len(first) == 4 and len(more) == 7 and more[:4] == first
    with pytest.raises(distpro.UserError, match="tune.trials is 5, but 7 trainings are spent"):
        distpro.tune(source, out=out, overrides=["tune.trials=5"], resume=True)
    with pytest.raises(distpro.UserError, match="config has changed since the run began: tune.by"):
        distpro.tune(source, out=out, overrides=["tune.by=headline"], resume=True)


def test_a_trial_of_a_dead_worker_is_taken_over_and_a_living_ones_is_not(teacher, tmp_path):
    config = read_config(tuning(teacher, trials=3))
    candidates = {name: Candidate(name, "single", lambda values: None, {"weight": 1.0}) for name in ("kd", "sp")}
    dead, living, third = (Ledger(tmp_path, config, epochs=3) for _ in range(3))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host, _, token = dead.worker.rsplit("-", 2)
    dead.worker = f"{host}-{gone.pid}-{token}"
    dead.begin(list(candidates.values()))
    with dead.at_work(), living.at_work(), third.at_work():
        assert {path.name for path in (tmp_path / "workers").iterdir()} == {living.worker, third.worker}
        other = living.take(candidates)
        lost = dead.take(candidates)
        found = third.take(candidates)
        assert (other.trial.number, other.candidate) == (0, "kd")
        assert (found.trial.number, found.candidate, found.values) == (lost.trial.number, "sp", lost.values)
        assert third.running() == 2 and third.take(candidates).trial.number == 2
        assert third.take(candidates) is None  # three trainings are spoken for


def test_two_workers_share_a_budget(teacher, tmp_path):
    tuned = distpro.tune(tuning(teacher, **SINGLE, trials=4, pruner="none", epochs=1), out=tmp_path / "run", workers=2)
    assert sorted(row["trial"] for row in tuned.rows) == [0, 1, 2, 3]
    assert {row["candidate"] for row in tuned.rows if row["trial"] < 2} == {"kd", "sp"}
    assert sum(row["cost"] for row in tuned.rows) == 4 and not list((tmp_path / "run" / "workers").iterdir())


# What it says


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["tune.families=[singel]"], "'tune.families.0' is 'singel'.*did you mean 'single'"),
        (["tune.methods=[dk]"], "candidate 'dk'.*unknown loss 'dk'; did you mean 'dkd'"),
        (["tune.methods=[kd,kd]"], "two candidates are called 'kd'"),
        (["tune.families=[learned]"], "learned needs a schedule: give --schedule alpha.pt"),
        (["tune.trials=2"], "tune.trials is 2, which does not train each candidate once; there are 4: kd; at; equal"),
        (["tune.span=[2,3]"], r"tune.span.*is \[2, 3\]"),
        (["tune.trails=2"], "unknown key 'tune.trails'; did you mean 'trials'"),
        (["teacher=null"], "tune: the candidates need a teacher"),
        (["stages=[{name: one}]"], "stages: tune compares trainings of one stage"),
        (["terms=[{loss: kd, weight: 1}]", "tune.families=[static]"], "static needs pathways or terms"),
        (["tune.families=[single]", "tune.methods=[{loss: kd, weight: 0}]"], "tune.methods: kd: weight is 0"),
        (
            ["tune.families=[single]", "tune.methods=[{loss: kd, weight: {linear: {initial: 1, final: 0}}}]"],
            "tune.methods: kd: weight is .*; a number above 0",
        ),
        (
            ["tune.families=[single]", "tune.methods=[{loss: kd, params: {temperature: learned}}]"],
            "kd: temperature is learned",
        ),
        (["task_weight=learned"], "tune: task_weight is learned, which only a search does"),
    ],
)
def test_messages(teacher, tmp_path, overrides, said):
    with pytest.raises(distpro.UserError, match=said):
        distpro.tune(tuning(teacher), out=tmp_path / "run", overrides=overrides)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_refuses_a_budget_that_is_too_small(teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tuning(teacher)))
    assert main(["tune", "c.yaml", "--dry-run", "--trials", "2"]) == 2
    assert "tune.trials is 2, which does not train each candidate once" in capsys.readouterr().err


def test_without_optuna_it_says_how_to_get_it(teacher, tmp_path, monkeypatch, capsys):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tuning(teacher)))
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["tune", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        "distpro: tune needs optuna: pip install 'distpro[tune]' (in a clone: pip install -e '.[tune]')\n"
    )


def test_a_default_method_that_cannot_be_built_is_left_out(teacher, tmp_path, monkeypatch, capsys):
    imitate(monkeypatch, lambda config, schedule, progress: 1.0)
    source = settings(teacher, {"tune": {"families": ["single"], "trials": 5}})
    source["student"]["taps"] = source["teacher"]["taps"] = ["layer1"]
    distpro.tune(source, out=tmp_path / "run")
    said, tried = capsys.readouterr().out, {row["candidate"] for row in rows_of(tmp_path / "run")}
    assert tried | {"review"} == {"kd", "dkd", "at", "logit_std", "review"}
    assert ("candidate 'review' is left out" in said) == ("review" not in tried)


def test_the_command_says_what_it_would_try_and_what_it_has_found(teacher, tmp_path, monkeypatch, capsys):
    file, out = tmp_path / "c.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(tuning(teacher)))
    assert main(["tune", str(file), "--dry-run", "--trials", "9"]) == 0
    said = capsys.readouterr().out
    assert "weight from 0.027 to 27, first 0.9" in said and "2 weights, each from 0.03 to 30 times" in said
    assert "budget: 9 trainings of 3 epochs" in said
    imitate(monkeypatch, lambda config, schedule, progress: weight_of(config) if schedule is None else 1.0)
    assert (
        main(["tune", str(file), "--out", str(out), "--trials", "4", "tune.families=[single]", "tune.pruner=none"]) == 0
    )
    assert f"retrain:     distpro retrain {out / 'best.yaml'}" in capsys.readouterr().out
    assert main(["tune", str(file), "--out", str(out)]) == 2
    assert "holds a run already; continue it with --resume" in capsys.readouterr().err


def test_usual_weights_are_those_of_the_methods_configs():
    stated = {}
    for path in sorted((ROOT / "retrain_configs" / "methods").glob("*.yaml")):
        content = yaml.safe_load(path.read_text())
        for term in [*content.get("terms", []), *(t for s in content.get("stages", []) for t in s.get("terms", []))]:
            weight = term["weight"]["warmup"]["value"] if "warmup" in str(term["weight"]) else term["weight"]
            if term["loss"] == path.stem and not term.get("pretrain"):
                stated[path.stem] = weight
    assert {name: weight for name, weight in stated.items() if weight != 1} == {
        k: v for k, v in USUAL.items() if v != 1
    }
