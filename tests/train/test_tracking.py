"""What a run writes down is what happened, and is still readable after a crash and a resume."""

import importlib
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distpro.console import fail, table
from distpro.train import progress
from distpro.train.progress import Progress
from distpro.train.tracking import METRICS, Tracker, read_metrics
from pathways.registry import UserError

KEYS = ("layer1<-layer1@conv1x1", "layer1<-layer1@conv1x1.2", "layer2<-layer1@conv1x1", "kd(T=4)+x*[?]", "rkd:a/b")
LEVELS = torch.tensor([[1, 1, 1], [1, 1, 2], [2, 1, 1], [0, 0, 0], [0, 0, 0]])


def events(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return accumulator.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def curve(folder, tag):
    return [(event.step, event.value) for event in events(folder).Scalars(tag)]


def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


# JSON lines


def test_rows_are_plain_json_and_read_back(tmp_path):
    values = {
        "train/loss": torch.tensor(0.5, requires_grad=True),
        "exact": torch.tensor(0.1, dtype=torch.float64),
        "count": torch.tensor([2**40 + 1]),
        "lr": 0.1,
        "nan": float("nan"),
        "inf": torch.tensor(-math.inf),
    }
    with Tracker(tmp_path, tensorboard=False) as tracker:
        tracker.scalars(values, step=3, epoch=0.25)
    (line,) = (tmp_path / METRICS).read_text().splitlines()
    row = json.loads(line, parse_constant=refuse)
    assert row["nan"] is None and row["inf"] is None
    (row,) = read_metrics(tmp_path)
    assert (row["step"], row["epoch"], row["train/loss"], row["lr"]) == (3, 0.25, 0.5, 0.1)
    assert row["exact"] == 0.1 and row["count"] == 2**40 + 1
    assert math.isnan(row["nan"]) and math.isnan(row["inf"])


def test_row_is_on_disk_before_close(tmp_path):
    with Tracker(tmp_path, tensorboard=False) as tracker:
        tracker.scalars({"lr": 1.0}, step=0, epoch=0.0)
        assert len(read_metrics(tmp_path)) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_said_of_the_file(tmp_path):
    with Tracker(tmp_path, tensorboard=False) as tracker:
        own, tracker._file = tracker._file, open("/dev/full", "a", buffering=1)
        with pytest.raises(OSError) as caught:
            tracker.scalars({"loss": 1.0}, step=0, epoch=0.0)
        tracker._file = own
    assert caught.value.filename == str(tmp_path / METRICS) and "space" in caught.value.strerror


@pytest.mark.parametrize("tail", ["", '{"step": 9, "lr": 0.', '{"step": 3, "epoch": 0, "lr": 3.0}', "\0\0\0"])
def test_resume_removes_what_runs_again(tmp_path, tail):
    with Tracker(tmp_path, tensorboard=False) as tracker:
        for step in range(6):
            tracker.scalars({"lr": step}, step, epoch=0.0)
    with open(tmp_path / METRICS, "a") as file:
        file.write(tail)
    with Tracker(tmp_path, resume_step=3, tensorboard=False) as tracker:
        for step in (3, 4):
            tracker.scalars({"lr": 10 * step}, step, epoch=0.0)
    assert [(row["step"], row["lr"]) for row in read_metrics(tmp_path)] == [(0, 0), (1, 1), (2, 2), (3, 30), (4, 40)]


def test_rows_behind_the_checkpoint_are_removed_also_those_of_its_step(tmp_path):
    """Of an evaluation, after which the run was killed before the next checkpoint was there."""
    with Tracker(tmp_path, tensorboard=False) as tracker:
        tracker.scalars({"lr": 1.0}, 2, epoch=1.0)
        rows = tracker.rows
        tracker.scalars({"test/accuracy": 5.0}, 2, epoch=1.0)
    with Tracker(tmp_path, resume_step=3, resume_rows=rows, tensorboard=False) as tracker:
        tracker.scalars({"test/accuracy": 5.0}, 2, epoch=1.0)
        assert tracker.rows == 2
    assert ["lr" in row for row in read_metrics(tmp_path)] == [True, False]


def test_new_run_replaces_an_older_one(tmp_path):
    for value in (1.0, 2.0):
        with Tracker(tmp_path) as tracker:
            tracker.scalars({"lr": value}, step=0, epoch=0.0)
    assert [row["lr"] for row in read_metrics(tmp_path)] == [2.0]
    assert curve(tmp_path, "lr") == [(0, 2.0)]


def test_damage_in_the_middle_is_named(tmp_path):
    (tmp_path / METRICS).write_text('{"step": 0}\n{"step"\n{"step": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(tmp_path)


def test_no_file_is_no_rows(tmp_path):
    assert read_metrics(tmp_path / "absent") == []


# TensorBoard


def test_tensorboard_has_the_same_numbers(tmp_path):
    with Tracker(tmp_path) as tracker:
        for step in range(3):
            tracker.scalars({f"term/{key}": torch.tensor(step + 0.5) for key in KEYS}, step, epoch=step)
    for key in KEYS:
        assert curve(tmp_path, f"term/{key}") == [(row["step"], row[f"term/{key}"]) for row in read_metrics(tmp_path)]


@pytest.mark.parametrize("count", [9, 99])  # of event files in this process: the next has one digit more
def test_tensorboard_hides_what_runs_again(tmp_path, count, monkeypatch):
    writer = importlib.import_module("tensorboard.summary.writer.event_file_writer")
    monkeypatch.setattr(writer, "_global_uid", writer.AtomicCounter(count))
    with Tracker(tmp_path) as tracker:
        for step in range(6):
            tracker.scalars({"lr": step}, step, epoch=0.0)
    with Tracker(tmp_path, resume_step=3) as tracker:
        tracker.scalars({"lr": 30}, 3, epoch=0.0)
    assert curve(tmp_path, "lr") == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]


def test_layout_has_one_chart_per_teacher_level(tmp_path):
    """TensorBoard shows in a chart every tag that ``re.match`` finds, so each entry must find its own tag alone."""
    layout_pb2 = pytest.importorskip("tensorboard.plugins.custom_scalar.layout_pb2")
    with Tracker(tmp_path) as tracker:
        tracker.alpha_layout(KEYS, LEVELS)
        tracker.scalars({f"{name}/{key}": 1.0 for name in ("alpha", "alpha_tilde") for key in KEYS}, 0, 0.0)
    written = events(tmp_path)
    layout = layout_pb2.Layout()
    layout.ParseFromString(written.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    (category,) = layout.category
    found = {
        chart.title: [[t for t in written.Tags()["scalars"] if re.match(tag, t)] for tag in chart.multiline.tag]
        for chart in category.chart
    }
    assert found == {
        "teacher level 1": [[f"alpha/{KEYS[0]}"], [f"alpha/{KEYS[1]}"]],
        "teacher level 2": [[f"alpha/{KEYS[2]}"]],
        "terms without a level": [[f"alpha/{KEYS[3]}"], [f"alpha/{KEYS[4]}"]],
    }


def test_text_figure_and_summary(tmp_path):
    figures = pytest.importorskip("matplotlib.figure")
    plugin_data_pb2 = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
    config = {"lr": 0.1, "nesterov": True, "student": "resnet20", "milestones": [150, 180], "clip": None}
    with Tracker(tmp_path) as tracker:
        tracker.scalars({"test/accuracy": 0.5}, 7, epoch=1.0)
        tracker.text("config", "`a: 1`")
        tracker.figure("alpha", figures.Figure(figsize=(2, 1), dpi=50), 7)
        tracker.summary(config, {"accuracy": torch.tensor(0.75)})
    written = events(tmp_path)
    assert written.Tensors("config/text_summary")[0].tensor_proto.string_val == [b"`a: 1`"]
    image = written.Images("alpha")[0]
    assert (image.step, image.width, image.height) == (7, 100, 50)
    assert curve(tmp_path, "final/accuracy") == [(7, 0.75)]
    start = plugin_data_pb2.HParamsPluginData()
    start.ParseFromString(written.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    entered = start.session_start_info.hparams
    assert entered["lr"].number_value == 0.1 and entered["student"].string_value == "resnet20"
    assert entered["milestones"].string_value == "[150, 180]" and entered["clip"].string_value == "None"
    assert len(list(tmp_path.glob("events.*"))) == 1


def test_without_tensorboard_nothing_else_is_written(tmp_path):
    with Tracker(tmp_path, tensorboard=False) as tracker:
        tracker.alpha_layout(KEYS, LEVELS)
        tracker.text("config", "text")
        tracker.summary({"lr": 0.1}, {"accuracy": 0.5})
    assert [path.name for path in tmp_path.iterdir()] == [METRICS]


@pytest.mark.slow
def test_slow_libraries_are_imported_when_needed():
    code = (
        "import sys, distpro.train.tracking, distpro.report.plots, distpro.report.words\n"
        "print([m for m in ('tensorboard', 'torch.utils.tensorboard', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Console


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    return now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_log_lines_are_few_plain_and_right(clock, capsys):
    with Progress(100, "search") as progress:
        for done in range(1, 51):
            clock[0] = float(done)  # one step a second
            progress.update(done, loss=torch.tensor(0.25), images_per_second=12345.6)
        progress.message("[halfway")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "search   10%  10/100 steps  elapsed 0:00:10  left 0:01:30  loss 0.25  images/s 12,346"
    assert lines[4].startswith("search   50%  50/100 steps  elapsed 0:00:50  left 0:00:50")
    assert lines[5:] == ["[halfway"]
    assert all(line.isprintable() for line in lines)


def test_last_state_is_printed_once(clock, capsys):
    with Progress(3, "train", unit="epoch") as progress:
        for done in (1, 2, 3):
            progress.update(done)
    assert capsys.readouterr().out == "train  100%  3/3 epochs  elapsed 0:00:00  left 0:00:00\n"


def test_numbers_stay_until_newer_ones_come(clock, capsys):
    with Progress(4, "train") as progress:
        progress.update(1, loss=1.0, accuracy=0.5)
        progress.update(2, loss=2.0)
        progress.update(3)
    assert capsys.readouterr().out.endswith("loss 2  accuracy 0.5\n")


def test_progress_tells_where_an_error_struck(clock, capsys):
    with pytest.raises(RuntimeError), Progress(8, "train") as progress:
        progress.update(2, loss=float("nan"))
        raise RuntimeError
    assert "2/8 steps" in (out := capsys.readouterr().out) and "loss nan" in out and "left ?" in out


def test_time_left_of_a_resumed_run_counts_its_own_steps(clock, capsys):
    with Progress(1000, "search") as progress:
        for done in (900, 910):
            progress.update(done)
            clock[0] += 5.0
        progress.update(920)
    assert "920/1000 steps  elapsed 0:00:10  left 0:00:40" in capsys.readouterr().out


def test_terminal_has_a_bar_and_lines_that_stay(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", screen := Terminal())
    with Progress(4, "search") as progress:
        progress.message("dropped [/x] layer1")
        progress.update(4, accuracy=0.75)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "dropped [/x] layer1\n" in text
    assert "100%" in text and "4/4 steps" in text and "accuracy 0.75" in text


def test_table_keeps_long_cells_whole(capsys):
    key = "model.backbone." * 20 + "<-layer1@[conv1x1]"
    table("terms [/]", ["key", "weight"], [[key, 0.123456], ["kd", 12.0]])
    out = capsys.readouterr().out
    assert key in out and "0.1235" in out and "terms [/]" in out and "\x1b" not in out


def test_fail_goes_to_stderr_as_it_is(capsys):
    fail("config.yaml: unknown key 'lr' [allowed: a, b]")
    assert capsys.readouterr() == ("", "distpro: config.yaml: unknown key 'lr' [allowed: a, b]\n")
