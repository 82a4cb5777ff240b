"""The study runner's table: what it says of given rows, and what it would run."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from distpro.runs import comparing
from pathways.registry import UserError

ROOT = Path(__file__).parents[2]


sys.path.insert(0, str(ROOT / "tools"))
study, table, figures, horizon = map(importlib.import_module, ("study", "study_table", "study_figures", "horizon"))

CONTENT = """
config: search_configs/digits.yaml
seeds: [0, 1, 2]
baseline: equal
set: {threads: 1}
searches: {search: {training.epochs: 2}}
runs:
  equal: {retrain.weights: equal}
  searched: {retrain.weights: searched}
"""


@pytest.fixture
def example(tmp_path):
    path = tmp_path / "example.yaml"
    path.write_text(CONTENT)
    return study.Study(path, tmp_path)


def row(label, seed, accuracy):
    facts = {"packages": {"torch": "1"}, "device": "cpu", "threads": 1, "command": f"distpro {label} seed={seed}"}
    return {"label": label, "seed": seed, "accuracy": accuracy, "seconds": 10, "revision": "abc", **facts}


def test_commands_hold_overrides_seed_and_schedule(example):
    assert example.command("search", 1)[:3] == ["distpro", "search", "search_configs/digits.yaml"]
    assert {"training.epochs=2", "threads=1", "seed=1"} <= set(example.command("search", 1))
    for label in ("searched", "equal"):  # equal weights are equal in the search's units
        assert "runs/example/search-1/alpha.pt" in example.command(label, 1)
    example.runs["KD"] = {"retrain.weights": "constant"}
    assert "--schedule" not in example.command("KD", 1)


def test_a_schedule_may_come_from_another_study(example, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(CONTENT.replace("searches: {search:", "searches: {pooled:"))
    example.searches["γ / 4"] = {"search.learning_rate": 0.0125}
    example.runs["slow"] = {"search": "γ / 4"}
    assert "runs/example/_4-2/alpha.pt" in example.command("slow", 2)
    example.runs["foreign"] = {"search": "other/pooled", "config": "x.yaml"}
    command = example.command("foreign", 2)
    assert command[:3] == ["distpro", "retrain", "x.yaml"] and "runs/other/pooled-2/alpha.pt" in command
    (tmp_path / "other.jsonl").write_text(json.dumps({**row("pooled", 2, 40.0), "seconds": 7}) + "\n")
    example.results.write_text(json.dumps(row("foreign", 2, 50.0)) + "\n")
    assert "| foreign | 50.00 | 1 |  | 10 | 17 |" in table.render(example)  # the other study's search is paid for


def test_rows_may_be_shared_with_another_study(example, tmp_path):
    (tmp_path / "other.yaml").write_text(CONTENT)
    (tmp_path / "other.jsonl").write_text(json.dumps(row("searched", 1, 40.0)) + "\n")
    example.content["shared"] = {"equal": "other/searched"}
    assert [(r["label"], r["seed"], r["accuracy"]) for r in example.rows()] == [("equal", 1, 40.0)]
    assert ("equal", 1) not in example.missing() and ("equal", 0) in example.missing()


def test_every_run_at_every_budget(example, tmp_path):
    example.path.write_text(CONTENT.replace("baseline: equal\n", "") + "epochs: [2, 4]\nfigures: [budgets]\n")
    budgets = study.Study(example.path, tmp_path)
    assert list(budgets.runs) == [f"{k}, {n} epochs" for k in ("equal", "searched") for n in (2, 4)]
    assert "training.epochs=4" in budgets.command("equal, 4 epochs", 0)
    assert "training.epochs=2" in budgets.command("search", 0)


def test_epochs_to_an_accuracy_are_interpolated_in_their_logarithm(example, tmp_path):
    example.path.write_text(CONTENT.replace("baseline: equal\n", "") + "epochs: [2, 8]\nreach: ['equal, 8 epochs']\n")
    budgets = study.Study(example.path, tmp_path)
    accuracies = {
        "equal, 2 epochs": 40.0,
        "equal, 8 epochs": 60.0,
        "searched, 2 epochs": 50.0,
        "searched, 8 epochs": 70.0,
    }
    budgets.results.write_text("".join(json.dumps(row(k, 0, a)) + "\n" for k, a in accuracies.items()))
    text = table.render(budgets)
    assert "| equal | 8 |" in text and "| searched | 4.0 |" in text  # half the way from 50 to 70, half of two doublings
    assert table.epochs_to(40.0, {2: 50.0}) == "at most 2" and table.epochs_to(60.0, {2: 50.0}) == "more than 2"


def test_rows_that_are_there_are_not_run_again(example):
    assert len(example.missing()) == 9
    example.results.write_text(json.dumps(row("equal", 1, 50.0)) + "\n")
    assert ("equal", 1) not in example.missing()
    assert example.missing()[0][0] == "search"


def test_chosen_runs_bring_their_searches(example):
    assert example.with_searches(["searched"]) == {"searched", "search"}
    example.runs["KD"] = {"retrain.weights": "constant"}
    assert example.with_searches(["KD"]) == {"KD"}
    with pytest.raises(UserError, match="no run or search 'serched'; did you mean 'searched'"):
        example.with_searches(["serched"])


def test_a_run_whose_search_has_failed_is_left_out(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "folder", tmp_path / "runs")
    monkeypatch.setattr(example, "execute", lambda label, seed, out: None if label == "search" else row(label, seed, 1))
    example.out("search", 0).mkdir(parents=True)
    (example.out("search", 0) / "alpha.pt").touch()  # an interrupted search leaves one
    example.run_all([("search", 0), ("searched", 0)], side_by_side=1)
    assert example.rows() == []
    assert capsys.readouterr().out == "example: searched, seed 0 left out: 'search' has not ended\n"
    (example.out("search", 0) / "result.json").touch()
    (example.out("searched", 0)).mkdir()
    example.run("searched", 0)
    assert [r["label"] for r in example.rows()] == ["searched"]


def test_the_table_pairs_rows_by_seed(example):
    rows = [row("equal", s, a) for s, a in enumerate((50.0, 52.0, 54.0))]
    rows += [row("searched", s, a) for s, a in enumerate((51.0, 53.5, 54.5))]
    example.results.write_text("".join(json.dumps(r) + "\n" for r in rows))
    text = table.render(example)
    assert "| equal | 52.00 ± 2.00 | 3 |" in text
    # differences 1, 1.5, 0.5: mean 1, deviation 0.5, t(2) = 4.30, so ± 4.30 · 0.5 / √3 = 1.24
    assert "+1.00 [-0.24, +2.24]" in text
    example.content["baseline"] = ["equal", "searched"]
    assert "| 52.00 ± 2.00 | 3 |  | -1.00 [-2.24, +0.24] |" in table.render(example)


def test_a_page_takes_the_table_in_its_place(example, tmp_path):
    example.results.write_text(json.dumps(row("equal", 0, 50.0)) + "\n")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- study: example -->\nold\n<!-- end -->\nafter\n")
    table.splice(page, example.name, table.render(example))
    assert "old" not in page.read_text() and "50.00" in page.read_text()
    assert page.read_text().startswith("before\n") and page.read_text().endswith("<!-- end -->\nafter\n")


def test_level_shares_leave_out_terms_without_a_level():
    learned = {"teacher_levels": [1, 2, 2, 0], "weights": [[0.2, 0.1, 0.1, 5.0], [0.3, 0.05, 0.05, 9.0]]}
    assert figures._share(learned, 1) == pytest.approx([0.5, 0.75])
    assert figures._share(learned, 2) == pytest.approx([0.5, 0.25])


@pytest.mark.slow
def test_a_search_may_be_a_tuning_whose_best_is_retrained(example):
    example.searches["optuna"] = {"tune": {"families": ["static"], "trials": 4}}
    example.runs["three weights"] = {"search": "optuna"}
    tuning = example.command("optuna", 1)
    assert tuning[:2] == ["distpro", "tune"] and 'tune={"families": ["static"], "trials": 4}' in tuning
    assert example.command("three weights", 1)[:3] == ["distpro", "retrain", "runs/example/optuna-1/best.yaml"]
    assert "--schedule" not in example.command("three weights", 1)
    plain = comparing.cost(example, "equal")
    assert comparing.cost(example, "optuna") == pytest.approx(4 * 36 / 60 * plain, rel=0.05)  # half of the images judge


def test_a_tuning_is_judged_on_validation_data_and_has_no_test_value(example):
    example.searches["optuna"] = {"tune": {"families": ["static"], "trials": 4}}
    example.results.write_text("".join(json.dumps(row(name, 0, 61.5)) + "\n" for name in ("optuna", "equal")))
    text = table.render(example)
    assert "| (optuna) |  | 1 |" in text and "| equal | 61.50 | 1 |" in text


def test_the_table_of_horizons_leaves_out_the_first_steps():
    content = {
        "keys": ["a"],
        "first": 2,
        "h": {"1": [[[9.0], [9.0], [-0.002], [0.004]]], "2": [[[9.0], [-0.001], [-0.003]]]},
    }
    # K = 1: mean 1e-3, deviation 3√2 e-3, two windows; K = 2: mean -2e-3, deviation √2 e-3
    assert "| a | +1.0 ± 3.0 (1 of 2) | -2.0 ± 1.0 (2 of 2) |" in horizon.render(content)


def written_in(page):
    text = page.read_text()
    return dict(re.findall(r"^<!-- study: (\S+) -->\n(.*?)^<!-- end -->", text, re.DOTALL | re.MULTILINE))


SPLICED = [
    pytest.param(page, name, block, id=f"{page.stem}-{name}")
    for page in sorted((ROOT / "docs").rglob("*.md"))
    for name, block in written_in(page).items()
]


@pytest.mark.parametrize(("page", "name", "block"), SPLICED)
def test_a_page_shows_the_table_of_its_rows(page, name, block):
    results = ROOT / "docs" / "results" / name
    shown = table.seen_from(page, results.with_suffix(".md").read_text().replace("../figures/", "figures/"))
    assert block.strip() == shown.strip()
    rows = [json.loads(line) for line in results.with_suffix(".jsonl").read_text().splitlines()]
    seeds = {label: len({r["seed"] for r in rows if r["label"] == label}) for label in {r["label"] for r in rows}}
    table_says = {
        label.strip("()"): int(n) for label, n in re.findall(r"^\| (.+?) \| [^|]+ \| (\d+) \|", block, re.MULTILINE)
    }
    own = table_says.keys() & seeds.keys()  # a table may take rows of other studies, and leave some of its own out
    assert own and {label: table_says[label] for label in own} == {label: seeds[label] for label in own}
