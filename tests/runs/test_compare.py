"""`distpro compare`: runs what is missing, keeps a row of each, and writes the page."""

from __future__ import annotations

import json
import shlex
import subprocess

import pytest
import yaml

from distpro.cli import main
from distpro.runs import comparing
from pathways.registry import UserError
from tests.digits import random_teacher, settings

STUDY = {
    "config": "pair.yaml",
    "seeds": [0, 1],
    "baseline": "alone",
    "set": {"training.max_steps": 2, "threads": 1, "tracking.tensorboard": False},
    "runs": {"taught": {"retrain.weights": "equal", "pathways.weight": 1.0}, "alone": {"retrain.weights": "none"}},
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A study of a pair, whose runs stay in this process."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    (tmp_path / "pair.yaml").write_text(yaml.safe_dump(settings("teacher.pt")))

    def run(command, **options):
        if command[1:3] != ["-m", "distpro.cli"]:
            return subprocess.CompletedProcess(command, 0, "", "")
        return subprocess.CompletedProcess(command, main(command[3:]))

    monkeypatch.setattr(comparing.subprocess, "run", run)
    return tmp_path


@pytest.mark.slow
def test_what_is_missing_is_run_and_shown(here, capsys):
    random_teacher(here).rename(here / "teacher.pt")
    content = {**STUDY, "searches": {"search": {"search.trials": 0}}}
    (here / "study.yaml").write_text(yaml.safe_dump(content))
    assert main(["compare", "study.yaml", "--only", "alone"]) == 0
    rows = [json.loads(line) for line in (here / "runs" / "study" / "study.jsonl").read_text().splitlines()]
    assert [(row["label"], row["seed"]) for row in rows] == [("alone", 0), ("alone", 1)]
    assert main(["compare", "study.yaml"]) == 0
    lines = (here / "runs" / "study" / "study.jsonl").read_text().splitlines()
    assert len(lines) == 6 and [json.loads(line) for line in lines[:2]] == rows  # nothing is run again
    html = (here / "runs" / "study" / "study.html").read_text()
    assert "difference to alone" in html and "(search)" in html and "taught" in html


@pytest.mark.slow
def test_a_plan(here, capsys):
    assert main(["compare", "study.yaml", "--dry-run", "--only", "taught"]) == 0
    first, second, total = capsys.readouterr().out.splitlines()
    assert first.endswith("seed=0 --out runs/study/taught-0") and "--schedule" not in first  # there is no search
    assert second.endswith("seed=1 --out runs/study/taught-1") and "in 2 runs" in total
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": [0]}, "study.yaml: unknown key 'seed'; did you mean 'seeds'"),
        ({"config": None}, "study.yaml: config is None: expected a path"),
        ({"seeds": [0.5]}, "study.yaml: seeds is [0.5]: expected whole numbers"),
        ({"runs": {}}, "study.yaml: runs is {}"),
        ({"runs": {"a": 3}}, "study.yaml: runs: a is 3: expected overrides"),
        ({"searches": {"alone": {}}}, "name of a search and of a run: alone"),
        ({"searches": None}, "study.yaml: searches is None: expected {search: {...}}, or no such key"),
        ({"searches": ["a"]}, "study.yaml: searches is ['a']: expected"),
        ({"set": None}, "study.yaml: set is None: expected overrides"),
        ({"shared": ["a"]}, "study.yaml: shared is ['a']: expected"),
        ({"shared": {"a": "b"}}, "study.yaml: shared: a is 'b': expected STUDY/LABEL"),
        ({"metric": ["a"]}, "study.yaml: metric is ['a']: expected a metric's name"),
        ({"runs": {1: {}}}, "study.yaml: runs: the label 1 is no text: write it in quotes"),
        ({"epochs": 2}, "study.yaml: epochs is 2: expected budgets"),
        ({"epochs": []}, "study.yaml: epochs is []: expected budgets"),
        ({"epochs": [0]}, "study.yaml: epochs is [0]: expected budgets"),
        ({"seeds": [0, 0]}, "study.yaml: seeds is [0, 0]: expected whole numbers, each once"),
        ({"seeds": [True]}, "study.yaml: seeds is [True]: expected whole numbers"),
        ({"baseline": "alon"}, "study.yaml: baseline: no run 'alon'; did you mean 'alone'"),
        (
            {"searches": {"search": {}}, "runs": {"a": {"search": "serch"}}, "baseline": []},
            "no search 'serch'; did you mean",
        ),
        ({"runs": {"a": {"search": "x"}}, "baseline": []}, "runs: a: no search 'x' (there are none"),
        ({"runs": {"a": {"search": "study/x"}}, "baseline": []}, "runs: a: study.yaml has no search 'x'"),
        ({"runs": {"KD 3": {}, "KD,3": {}}, "baseline": "KD 3"}, "'KD 3' and 'KD,3' would have one folder, KD_3-SEED"),
    ],
)
def test_a_file_that_is_no_study(here, capsys, change, said):
    (here / "study.yaml").write_text(yaml.safe_dump({**STUDY, **change}))
    for more in ([], ["--dry-run"]):
        assert main(["compare", "study.yaml", *more]) == 2
        assert said in capsys.readouterr().err
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"training.epocs": 3}, "unknown key 'training.epocs'; did you mean 'epochs'?"),
        ({"terms": [{"loss": "kdd"}]}, "unknown loss 'kdd'; did you mean 'kd'?"),
    ],
)
def test_a_row_that_could_not_begin_is_refused_before_the_first_is_run(here, capsys, overrides, said):
    (here / "study.yaml").write_text(yaml.safe_dump({**STUDY, "runs": {**STUDY["runs"], "KD": overrides}}))
    for more in ([], ["--dry-run"]):
        assert main(["compare", "study.yaml", *more]) == 2
        err = capsys.readouterr().err
        assert err.startswith("distpro: study.yaml: KD: ") and said in err
    assert not (here / "runs").exists()


@pytest.mark.parametrize(("statuses", "expected"), [([2, 2], 2), ([2, 1], 1), ([-9, 2], 1), ([0, 0], 0)])
def test_failed_runs_are_named_when_the_others_have_ended(here, monkeypatch, capsys, statuses, expected):
    environment = {"packages": {}, "revision": "", "threads": 1, "device": "cpu"}

    def run(command, **options):
        out, seed = here / command[command.index("--out") + 1], int(command[command.index("--out") - 1][-1])
        status = statuses[seed] if "taught" in out.name else 0
        if not status:
            out.mkdir()
            (out / "environment.json").write_text(json.dumps(environment))
            (out / "result.json").write_text(json.dumps({"accuracy": 50.0 + seed, "seconds": 1.0}))
        return subprocess.CompletedProcess(command, status, "", "")

    monkeypatch.setattr(comparing.subprocess, "run", run)
    assert main(["compare", "study.yaml"]) == expected
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in (here / "runs" / "study" / "study.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows if row["label"] == "alone"] == [0, 1]
    assert (here / "runs" / "study" / "study.html").is_file()
    if expected:
        assert "study: 2 failed (taught, seed 0; taught, seed 1)" in err and "study.html" in err
    else:
        assert err == "" and out.endswith("study.html\n")


def test_a_label_and_a_file_that_are_not_there(here, capsys):
    assert main(["compare", "study.yaml", "--only", "alon"]) == 2
    assert "no run or search 'alon'; did you mean 'alone'" in capsys.readouterr().err
    assert main(["compare", "stdy.yaml"]) == 2
    assert "stdy.yaml: no such config file; did you mean 'study.yaml'" in capsys.readouterr().err


def with_rows(here, out="runs/study", **changes):
    """The study, and a row of each run as it is run now."""
    path = here / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}))
    study = comparing.Study(path, here / out, here)
    rows = [
        {
            "label": label,
            "seed": seed,
            "accuracy": 50.0,
            "seconds": 1.0,
            "command": shlex.join(study.command(label, seed)),
        }
        for label in (*study.searches, *study.runs)
        for seed in study.seeds
    ]
    (here / out).mkdir(parents=True, exist_ok=True)
    study.results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return study, rows


def test_rows_of_another_study_or_of_one_that_was_edited_are_refused(here, capsys):
    study, rows = with_rows(here, searches={"search": {}}, metric="accuracy")
    comparing.check_rows(study)
    moved = [{**row, "command": "python -m " + row["command"].replace("--out runs", "--out else")} for row in rows]
    study.results.write_text("".join(json.dumps(row) + "\n" for row in moved))
    comparing.check_rows(study)  # where it was run, and by what, is all the same
    (here / "study.yaml").write_text(yaml.safe_dump({**study.content, "set": {"training.max_steps": 3}}))
    for more in ([], ["--dry-run"]):
        assert main(["compare", "study.yaml", *more]) == 2
        said = capsys.readouterr().err
        assert "study.jsonl: the row of 'search' with seed 0 is of another command than study.yaml says now" in said
        assert "training.max_steps=2" in said and "now: training.max_steps=3" in said
        assert "remove the row and those of what replays it (taught), or give the study's file another name" in said
    study.results.write_text("".join(json.dumps(row) + "\n" for row in rows[2:]))
    with pytest.raises(UserError, match="the row of 'taught' with seed 0 replays 'search', which has no row"):
        comparing.check_rows(study)


def test_rows_that_another_study_shares_are_checked_as_well(here):
    with_rows(here, "runs/other")[0].results.rename(here / "runs" / "other" / "study.jsonl")
    (here / "second.yaml").write_text(yaml.safe_dump({**STUDY, "shared": {"alone": "study/alone"}}))
    second = comparing.Study(here / "second.yaml", here / "runs" / "other", here)
    comparing.check_rows(second)
    (here / "study.yaml").write_text(yaml.safe_dump({**STUDY, "seeds": [1, 0], "set": {}}))
    with pytest.raises(UserError, match="the row of 'alone' with seed 1 is of another command"):
        comparing.check_rows(second)


def test_a_metric_that_no_run_gives_is_refused_before_anything_is_run(here, capsys):
    (here / "study.yaml").write_text(yaml.safe_dump({**STUDY, "metric": "acuracy"}))
    assert main(["compare", "study.yaml"]) == 2
    assert "study.yaml: metric: the runs give no 'acuracy'; did you mean 'accuracy'" in capsys.readouterr().err
    assert not (here / "runs").exists()
    (here / "study.yaml").write_text(yaml.safe_dump({**STUDY, "metric": "loss"}))
    assert comparing.open_study("study.yaml").metric == "loss"


def test_without_a_metric_it_is_the_task_s(here, monkeypatch):
    config = settings("teacher.pt", {"task": {"name": "regression", "outputs": 10, "headline": "mae"}})
    (here / "pair.yaml").write_text(yaml.safe_dump({**config, "pathways": None, "terms": []}))
    study = comparing.open_study("study.yaml")
    assert study.metric == "mae"
    row = {"label": "alone", "seed": 0, "accuracy": 1.0}
    monkeypatch.setattr(study, "execute", lambda label, seed, out: row)
    study.out("alone", 0).mkdir(parents=True)
    with pytest.raises(UserError, match="the runs give no 'mae'"):  # said at the end, and the row is kept
        study.run_all([("alone", 0)], 1)
    assert study.own_rows() == [row]
