"""The mistakes of ``mistakes.txt``: each gets one short message with the fix, and leaves everything as it was."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml

from distpro.cli import main
from distpro.files import save_atomically
from distpro.models import build_model

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

LIST = Path(__file__).with_name("mistakes.txt").read_text(encoding="utf-8").splitlines()
MISTAKES = [line.split(" => ") for line in LIST if line and not line.startswith("#")]
SLOW = ("stopped:", "note:")  # what trains

COMMON = {
    "threads": 1,
    "precision": "float32",
    "data": {"name": "digits", "samples": 100},
    "training": {"epochs": 1, "batch_size": 20, "optimizer": {"lr": 0.05}},
    "tracking": {"tensorboard": False},
}
FILES = {
    "other_space.yaml": "base: small.yaml\npathways: {transforms: [conv3x3]}\n",
    "dup.yaml": "data: {name: digits}\ndata: {name: npz}\nstudent: {model: resnet8}\n",
    "broken.yaml": "data: {name: digits\nstudent: {model: resnet8}\n",
    "tabs.yaml": "data:\n\tname: digits\nstudent: {model: resnet8}\n",
    "empty.yaml": "",
    "afile": "",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a teacher, a finished search of it and a finished retrain, of an epoch each, and some wrong files."""
    folder = tmp_path_factory.mktemp("mistakes")
    small = {
        "student": {"model": "resnet8"},
        "teacher": {"model": "resnet14", "checkpoint": "runs/teacher/student.pt"},
        "pathways": {"connect": "same", "transforms": ["conv1x1"]},
    }
    (folder / "teacher.yaml").write_text(yaml.safe_dump({**COMMON, "student": {"model": "resnet14"}}))
    (folder / "small.yaml").write_text(yaml.safe_dump({**COMMON, **small}))
    for name, text in FILES.items():
        (folder / name).write_text(text)
    for name in ("configs", "ro"):
        (folder / name).mkdir()
    (folder / "ro").chmod(0o555)
    torch.manual_seed(0)
    save_atomically(build_model("resnet14", num_classes=100).state_dict(), folder / "of_100_classes.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "teacher.yaml", "--out", "runs/teacher"]) == 0
        assert main(["search", "small.yaml", "--out", "runs/search"]) == 0
        assert main(["retrain", "--schedule", "runs/search/alpha.pt", "--out", "runs/retrain"]) == 0
    return folder


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if "e" not in path.relative_to(folder).parts}


def out_of(arguments):
    """The new folder that a command names; else one that is never there."""
    found = re.search(r"--out (e/\S+)", arguments)
    return found[1] if found else "none"


def marked(arguments, said):
    marks = [pytest.mark.slow] if said.startswith(SLOW) else []
    return pytest.param(arguments, said, marks=marks, id=re.sub(r"\W+", "_", arguments))


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "said"), [marked(*mistake) for mistake in MISTAKES])
def test_a_mistake_gets_one_message_with_the_fix(place, arguments, said, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.delenv("DISTPRO_DATA", raising=False)
    if " ro" in arguments and os.access(place / "ro", os.W_OK):
        pytest.skip("this user may write everywhere")
    if "/proc" in arguments and not sys.platform.startswith("linux"):
        pytest.skip("of Linux")
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    before = files(place)
    status = main(shlex.split(arguments))
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert files(place) == before
    lines, kind = err.splitlines(), said.partition(": ")[0]
    notes = [line for line in lines if line.startswith("distpro: note: ")]
    wanted = said.removeprefix("note: ").removeprefix("stopped: ").split("|")
    if kind == "note":
        assert status == 0
        assert any(all(part in line for part in wanted) for line in notes), err
        return
    assert status == 2
    if kind == "stopped":
        lines = [line for line in lines if line not in notes]
    else:
        assert out == "" and not (place / out_of(arguments)).exists()
    assert len(lines) == 1 and lines[0].startswith("distpro: "), err
    assert all(part in lines[0] for part in wanted), err


def test_the_list_is_whole():
    assert len(MISTAKES) == 90 and len({arguments for arguments, _ in MISTAKES}) == 90
