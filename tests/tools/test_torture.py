"""A slice of the campaign of tools/torture, and what it relies on."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
pytest.importorskip("optuna")

SCRIPT = """
import sys
sys.path.insert(0, "tools")
sys.argv = ["torture", *sys.argv[1:]]
from torture import campaign, garbage, parts
garbage.CHUNK = 20
parts.PARTS = {name: (attack, int(n)) for (name, (attack, _)) in parts.PARTS.items() if (n := COUNTS.get(name))}
from torture import __main__ as run
run.PARTS = parts.PARTS
sys.exit(run.main())
"""
COUNTS = {"kill": 1, "damaged": 1, "strangers": 6, "configs": 1, "files": 1}


@pytest.mark.slow
def test_a_slice_of_the_campaign_holds(tmp_path):
    results = tmp_path / "results.jsonl"
    script = SCRIPT.replace("COUNTS", repr(COUNTS))
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            script,
            "--minutes",
            "20",
            "--results",
            str(results),
            "--place",
            str(tmp_path / "place"),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(rows) == sum(COUNTS.values()) and all(row["ok"] for row in rows)
