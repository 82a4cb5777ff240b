"""The quickstart ends with its table. What it runs is stood for by a script that prints and writes what a study does."""

import os
import shutil
import subprocess

from tests.conftest import ROOT

PYTHON = """#!/usr/bin/env bash
case "$*" in
tools/study.py*)
    mkdir -p runs/quickstart
    echo "quickstart: learned, seed 0: 97.00 (3 s)"
    printf '| run | accuracy |\\n|---|---|\\n| learned | 97.00 |\\n\\nits commands\\n' | tee runs/quickstart/quickstart.md ;;
*) echo "ran $*" ;;
esac
"""


def test_the_table_comes_last_and_once(tmp_path):
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "quickstart.sh", tmp_path / "tools")
    (tmp_path / "tools" / "environment.sh").write_text("")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(PYTHON)
    (tmp_path / "bin" / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    script = ["bash", str(tmp_path / "tools" / "quickstart.sh")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=True)
    *_, head, rule, row, last = done.stdout.splitlines()
    assert (head, rule, row) == ("| run | accuracy |", "|---|---|", "| learned | 97.00 |")
    assert last.startswith("table: runs/quickstart/quickstart.md (with its commands), done in ")
    assert done.stdout.count("| learned |") == 1 and "quickstart: learned, seed 0: 97.00" in done.stdout
