"""What a run writes into its folder, and in which order."""

from __future__ import annotations

import pytest
import yaml

from distpro.config.reading import read_config
from distpro.files import save_atomically
from distpro.runs import folder
from pathways.registry import UserError
from tests.digits import settings


def test_where_the_config_is_the_rest_is_too(tmp_path, monkeypatch):
    """A folder with a config has begun, and is gone on with: what is not there then would never be."""
    write, written = folder.write_atomically, []

    def killed(content, path, *rest):
        if len(written) == last:
            raise KeyboardInterrupt
        write(content, path, *rest)
        written.append(path.name)

    monkeypatch.setattr(folder, "write_atomically", killed)
    for last in (1, 2):
        written.clear()
        with pytest.raises(KeyboardInterrupt):
            folder.record(read_config(settings()), tmp_path / str(last), {"samples": 3})
        assert "config.yaml" not in written
    last = 9
    written.clear()
    folder.record(read_config(settings()), tmp_path / "whole", {"samples": 3})
    assert sorted(written) == ["config.yaml", "data.json", "environment.json"]


def mended():
    return read_config(settings(changes={"training": {"batch_size": 10}}))


def test_a_run_that_failed_at_once_leaves_its_folder_to_the_next(tmp_path):
    """Whether that is told to go on or not: there is nothing to go on from."""
    folder.record(read_config(settings()), tmp_path, {"samples": 3})
    for name in ("log.txt", "metrics.jsonl"):
        (tmp_path / name).write_text("")
    for resume in (False, True):
        with folder.open_folder(tmp_path, mended(), resume) as opened:
            assert opened == tmp_path and not folder.goes_on(tmp_path, resume)


def test_a_tuning_of_which_no_trial_has_ended_leaves_its_folder_to_the_next(tmp_path):
    """Unless another process is at work there, which may be in its first trial."""
    folder.record(read_config(settings()), tmp_path)
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials.journal").write_text("{}")
    save_atomically({}, tmp_path / "space.pt")
    tuning = {"resume": False, "shared": True, "kind": "tuning"}
    with folder.open_folder(tmp_path, mended(), **tuning) as opened:
        assert opened == tmp_path
        with pytest.raises(UserError, match="holds a run already"), folder.open_folder(tmp_path, mended(), **tuning):
            pass
    (tmp_path / "trials" / "kd").mkdir()
    (tmp_path / "trials" / "kd" / "result.json").write_text("{}")
    with pytest.raises(UserError, match="holds a run already"), folder.open_folder(tmp_path, mended(), **tuning):
        pass


@pytest.mark.parametrize(
    "kept",
    [
        "checkpoint.pt",
        "checkpoint.previous.pt",
        "student.pt",
        "alpha.pt",
        "result.json",
        "trials.journal",
        "student.safetensors",
    ]
    + ["trials/equal_weights/result.json", "rounds/1.pt", "1_first/checkpoint.pt"],
)
def test_where_there_is_more_than_a_beginning_it_is_kept(tmp_path, kept):
    folder.record(read_config(settings()), tmp_path)
    (tmp_path / kept).parent.mkdir(parents=True, exist_ok=True)
    if kept.endswith(".pt"):
        save_atomically({"step": 1, "weights": {}}, tmp_path / kept)
    else:
        (tmp_path / kept).write_text("{}")
    with pytest.raises(UserError, match="holds a run already"), folder.open_folder(tmp_path, mended(), False):
        pass
    if kept not in ("alpha.pt", "trials.journal"):
        said = "config has changed since the run began: training.batch_size was 20, is 10"
        with pytest.raises(UserError, match=said), folder.open_folder(tmp_path, mended(), True):
            pass
    assert folder.goes_on(tmp_path, True)


def test_a_config_that_no_run_has_written_is_kept(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings()))
    with pytest.raises(UserError, match="holds a run already"), folder.open_folder(tmp_path, mended(), False):
        pass


SEARCHED, TRAINED = {"step": 1, "weights": {"alpha_tilde": [], "history": []}}, {"step": 1, "weights": {}}


@pytest.mark.parametrize(
    ("files", "kind", "holds"),
    [
        ({"alpha.pt": {}, "checkpoint.pt": SEARCHED}, "training", "search"),
        ({"alpha.pt": {}, "checkpoint.pt": SEARCHED}, "tuning", "search"),
        ({"alpha.pt": {}, "checkpoint.pt": SEARCHED}, "search", None),
        ({"checkpoint.pt": SEARCHED}, "search", None),  # killed before it wrote its schedule
        ({"checkpoint.pt": TRAINED}, "search", "training"),
        ({"checkpoint.pt": TRAINED}, "tuning", "training"),
        ({"checkpoint.pt": TRAINED}, "training", None),
        ({"alpha.pt": {}, "checkpoint.pt": TRAINED}, "training", None),  # the schedule that it plays was put beside it
        ({"trials.journal": {}}, "training", "tuning"),
        ({"trials.journal": {}}, "search", "tuning"),
        ({"trials.journal": {}}, "tuning", None),
    ],
)
def test_a_run_is_gone_on_with_by_its_own_command(tmp_path, files, kind, holds):
    """Else that is said, not in which keys the configs differ."""
    folder.record(mended(), tmp_path)
    for name, content in files.items():
        save_atomically(content, tmp_path / name)
    if holds is None:
        with folder.open_folder(tmp_path, mended(), True, kind=kind):
            return
    with pytest.raises(UserError, match=f"holds a {holds}, no {kind} that --resume could go on with"):
        with folder.open_folder(tmp_path, read_config(settings()), True, kind=kind):
            pass
