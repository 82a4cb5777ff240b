"""The page of `distpro report`: it says the numbers, fetches nothing, and takes no text for HTML."""

from __future__ import annotations

import base64
import json
import re
import statistics
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
import yaml

from distpro.cli import main
from distpro.report.gather import gather, groups_of
from distpro.report.intervals import half_width
from distpro.report.page import page, write_page
from pathways.registry import UserError
from tests.schedules import two_terms

EVIL = '<script>alert("1")</script>&amp;$x^'


class Reader(HTMLParser):
    """The text of a page, its tags, what it refers to, and the rows of its tables."""

    def __init__(self):
        super().__init__()
        self.tags, self.refers, self.text, self.rows, self.inside = [], [], [], [], False

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.refers += [value for name, value in attributes if name in ("src", "href", "action", "data", "xlink:href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        self.text.append(data)
        if self.inside:
            self.rows[-1][-1] += data


def read(html):
    reader = Reader()
    reader.feed(html)
    return reader


def rows_of(html):
    return {row[0]: row for row in read(html).rows}


def write_run(folder, accuracy, seed=0, weights="constant", sha="a", **settings):
    """What a run leaves, without the run."""
    folder.mkdir(parents=True)
    config = {
        "seed": seed,
        "student": {"model": "no.such.module:Network"},  # reading it must not import it
        "data": {"name": "digits"},
        "training": {"epochs": 2, "optimizer": {"lr": 0.1}},
        "retrain": {"weights": weights, "schedule": None},
        "terms": [{"loss": "kd", "weight": 1.0}],
        **settings,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    curve = [{"step": n, "epoch": n, "test/accuracy": accuracy - 2 + n, "train/task_loss": 2.0 / n} for n in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve))
    result = {"epoch": 2, "step": 8, "accuracy": accuracy, "best_accuracy": accuracy + 1, "seconds": 4.0}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "data.json").write_text(json.dumps({"train": 48, "test": 12, "sha256": sha}))
    command = ["/x/distpro/__main__.py", "retrain", "a b.yaml", f"seed={seed}"]
    (folder / "environment.json").write_text(json.dumps({"packages": {"torch": "9.9"}, "command": command}))
    return folder


@pytest.fixture
def study(tmp_path):
    """Two settings of three seeds each."""
    for seed, (low, high) in enumerate([(70.0, 72.0), (71.0, 73.5), (75.0, 75.5)]):
        write_run(tmp_path / "plain" / f"seed{seed}", low, seed, "none")
        write_run(tmp_path / "taught" / f"seed{seed}", high, seed)
    return [tmp_path / "plain", tmp_path / "taught"]


def test_groups_are_runs_that_differ_in_their_seed_alone(study):
    groups = groups_of(gather(study))
    assert [(g.label.rpartition("/")[2], g.values("accuracy")) for g in groups] == [
        ("plain", {0: 70.0, 1: 71.0, 2: 75.0}),
        ("taught", {0: 72.0, 1: 73.5, 2: 75.5}),
    ]


@pytest.mark.slow
def test_retrains_are_together_where_their_searches_differ_in_the_seed_alone(tmp_path):
    """The schedule's file says how it was searched; where none does, one file is one schedule."""
    searches = {"a0": {"seed": 0}, "a1": {"seed": 1}, "b1": {"seed": 1, "search": {"every": 4}}, "u": None, "v": None}
    for name, config in searches.items():
        schedule = two_terms([[0.0, 1.0], [0.5, 0.5]])
        search = config and {"search": {"every": 1}, "retrain": {"weights": "searched"}, **config}
        replace(schedule, meta={} if search is None else {"config": search}).save(tmp_path / f"{name}.pt")
    played = ["a0", "a1", "b1", "u", "u", "v", "gone", "gone"]
    for seed, name in enumerate(played):
        write_run(
            tmp_path / f"run{seed}",
            70.0 + seed,
            seed,
            retrain={"weights": "searched", "schedule": str(tmp_path / f"{name}.pt")},
        )
    runs = gather([tmp_path / f"run{n}" for n in range(len(played))])
    groups = groups_of(runs)
    assert [sorted(g.values("accuracy")) for g in groups] == [[0, 1], [2], [3, 4], [5], [6], [7]]
    assert rows_of(page(runs[:3], "t"))["its search: search.every"][1:] == ["1", "4"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "kept", "said"),
    [
        ({"keep": "best"}, {"kept_epoch": 3, "kept_ema": 1}, "best on validation data: epoch 3 (moving average)"),
        ({"keep": "average", "average_of": 4}, {}, "mean of the 4 best on validation data"),
        ({"keep": "last", "ema": {"decay": 0.9}}, {}, "moving average of the last step"),
    ],
)
def test_a_value_is_of_the_student_that_a_run_leaves(tmp_path, training, kept, said):
    runs = [write_run(tmp_path / "plain", 60.0), write_run(tmp_path / "kept", 70.0, training=training)]
    result = json.loads((runs[1] / "result.json").read_text())
    (runs[1] / "result.json").write_text(json.dumps({**result, "last_accuracy": 65.0, **kept}))
    html = page(gather(runs), "t")
    found = {name.rpartition("/")[2]: row for name, row in rows_of(html).items()}
    assert found["kept"][3:6] == [said, "65.00", "71.00"]
    assert found["plain"][3:6] == ["of the last epoch", "60.00", "61.00"]
    assert "Values are of the student that a run leaves" in html and "Values are of the last epoch" not in html


def test_means_intervals_and_paired_differences(study):
    found = rows_of(page(gather(study), "t"))
    label = next(name for name in found if name.endswith("taught"))
    mean, half = statistics.mean([72, 73.5, 75.5]), half_width([72, 73.5, 75.5])
    gain = [2.0, 2.5, 0.5]
    low, high = (statistics.mean(gain) + sign * half_width(gain) for sign in (-1, 1))
    assert found[label][1:4] == [
        f"{mean:.2f} ± {half:.2f}  (n = 3)",
        f"{statistics.mean(gain):+.2f} [{low:+.2f}, {high:+.2f}]",
        f"{mean + 1:.2f}",
    ]
    assert found["retrain.weights"][1:] == ["none", "constant"]
    assert not {"seed", "student.model"} & found.keys()  # what all have in common does not differ


@pytest.mark.slow
def test_the_interval_is_student_s_t():
    scipy = pytest.importorskip("scipy.stats")
    for n in (2, 3, 10, 11, 31, 32, 100):
        values = torch.randn(n, generator=torch.Generator().manual_seed(n)).double().tolist()
        low, high = scipy.t.interval(0.95, n - 1, statistics.mean(values), scipy.sem(values))
        assert half_width(values) == pytest.approx((high - low) / 2, rel=2e-3)


def test_a_stranger_s_text_is_no_html(tmp_path):
    rows = [{"label": EVIL, "seed": n, "accuracy": 50.0 + n, "best_accuracy": 51.0, "command": EVIL} for n in (0, 1)]
    rows += [{"label": "other", "seed": 0, "accuracy": 40.0, "packages": {EVIL: EVIL}, "device": EVIL}]
    rows[0]["learned"] = {"keys": [EVIL], "weights": [[1.0], [2.0]]}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = read(write_page([path], title=EVIL).read_text(encoding="utf-8"))
    assert "script" not in reader.tags and reader.tags.count("h1") == 1
    assert EVIL in "".join(reader.text)
    assert reader.refers and all(where.startswith("data:image/svg+xml;base64,") for where in reader.refers)


@pytest.mark.slow
def test_figures_are_whole_and_refer_to_nothing(study):
    html = page(gather(study), "t")
    for found in re.findall(r"base64,([^\"]*)", html):
        svg = base64.b64decode(found).decode()
        assert svg.rstrip().endswith("</svg>") and "<script" not in svg
        assert all(where.startswith("#") for where in re.findall(r'href="([^"]*)"', svg))
    assert page(gather(study), "t") == html  # and come out the same again


@pytest.mark.slow
def test_one_run_its_schedule_commands_and_versions(tmp_path):
    two_terms([[0.0, 1.0], [0.5, 0.5]]).save(tmp_path / "alpha.pt")
    retrain = {"weights": "searched", "schedule": str(tmp_path / "alpha.pt")}
    write_run(tmp_path / "run", 70.0, retrain=retrain)
    (tmp_path / "result.json").write_text('{"seconds": 99.5}')
    html = page(gather([tmp_path / "run"]), "t")
    text = "".join(read(html).text)
    assert "distpro retrain 'a b.yaml' seed=0" in text and "torch 9.9" in text
    assert "A schedule of 2 terms over 2 steps" in text
    assert rows_of(html)["its search's seconds"][1] == "99.5"
    assert f"distpro retrain {tmp_path / 'run' / 'config.yaml'}" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: (run / "result.json").unlink(), "has not ended"),
        (
            lambda run: (run / "data.json").write_text('{"sha256": "b"}'),
            "not all of these runs saw the same data",
        ),
        (
            lambda run: (run / "config.yaml").write_text("retrain: {weights: searched, schedule: gone.pt}"),
            "the schedule gone.pt, which runs replay, is not found from here",
        ),
    ],
)
def test_what_a_reader_should_know_first(study, change, said):
    change(study[0] / "seed0")
    html = page(gather(study), "t")
    assert said in re.search(r'<p class="note">(.*?)</p>', html)[1]


def test_the_accuracy_of_a_tuning_is_not_of_the_test_part(tmp_path):
    """It is its best trial's on validation data, and stands in the section of tunings."""
    write_run(tmp_path / "retrain", 80.0)
    write_run(tmp_path / "tuning", 61.625)
    trial = {
        "trial": 0,
        "candidate": "kd",
        "accuracy": 61.625,
        "state": "complete",
        "cost": 1.0,
        "values": {"weight": 2.0},
        "judged": -61.625,
        "epochs": 2,
        "seconds": 3.0,
    }
    (tmp_path / "tuning" / "trials.jsonl").write_text(json.dumps(trial) + "\n")
    (tmp_path / "tuning" / "leaderboard.md").write_text("")
    found = gather([tmp_path])
    html = page(found, "A page")
    before, _, after = html.partition("Tuning: trials, the best first")
    assert [run.kind for run in found] == ["retrain", "tuning"] and "80.00" in before
    assert "61.6" not in before and "61.6" in after
    assert "tunings, which are judged on validation data" in before


def test_an_unfinished_run_shows_its_last_evaluation(tmp_path):
    run = write_run(tmp_path / "run", 70.0)
    (run / "result.json").unlink()
    assert gather([run])[0].metrics["accuracy"] == 70.0
    assert "No run has been tested yet" not in page(gather([run]), "t")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("nothing", None, "no such run"),
        ("rows.jsonl", "{", "not readable"),
        ("rows.jsonl", "[1]\n", "is no study's results"),
        ("rows.jsonl", "", "holds no rows"),
        ("run/config.yaml", "a: [", "not readable"),
        ("run/config.yaml", "[1]", "is no run's config"),
        ("run/notes.txt", "", "is no run's folder"),
    ],
)
def test_bad_input_is_one_message(tmp_path, capsys, name, text, said):
    path = tmp_path / name
    if text is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    target = path.parent if "run/" in name else path
    assert main(["report", str(target)]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.html"))


@pytest.mark.slow
def test_the_baseline_and_the_file_can_be_chosen(study, tmp_path, capsys):
    taught = str(study[1])
    assert main(["report", *map(str, study), "--baseline", taught, "--out", str(tmp_path / "p.html")]) == 0
    assert f"difference to {taught}" in (tmp_path / "p.html").read_text()
    with pytest.raises(UserError, match="no run is called 'taugt'.*there are"):
        page(gather(study), "t", "taugt")
