"""What a machine with a GPU is asked: the plan fits its slot, and the parts run, at toy size on the CPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

REHEARSED = "environment data teacher kd profile"
"""Of the parts, those that take seconds; the others are rehearsed by hand."""


def gpu(*arguments, **variables):
    kept = {key: value for key, value in os.environ.items() if key != "DISTPRO_DATA"}
    environment = {**kept, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
    command = ["bash", str(ROOT / "tools" / "gpu.sh"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def test_the_plan_fits_ten_minutes():
    done = gpu("--plan")
    assert done.returncode == 0, done.stderr
    assert int(re.search(r"in all about (\d+) minutes", done.stdout)[1]) <= 10
    named = re.findall(r"^(\w+) +\d+ s", done.stdout, re.MULTILINE)
    assert set(REHEARSED.split()) < set(named) and "tests" in named


def test_a_folder_with_other_things_and_unknown_options_are_refused(tmp_path):
    (tmp_path / "student.pt").write_text("weeks of work")
    for arguments, said in (
        (["--plann"], "unknown option '--plann'"),
        ([tmp_path], "holds something else than results"),
    ):
        done = gpu(*arguments, PARTS="none")
        assert done.returncode == 2 and said in done.stderr and not done.stdout
    assert (tmp_path / "student.pt").read_text() == "weeks of work"
    assert [gpu(tmp_path / "new", PARTS="none").returncode for _ in range(2)] == [0, 0]


@pytest.mark.slow
def test_a_rehearsal_passes(tmp_path):
    done = gpu("--rehearse", tmp_path / "out", PARTS=REHEARSED)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["ok"] * len(REHEARSED.split())
    assert {line.split()[0] for line in lines} == set(REHEARSED.split())
    assert json.loads((tmp_path / "out" / "kd" / "result.json").read_text())["step"] == 4
