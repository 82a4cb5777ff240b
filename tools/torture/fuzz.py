"""Promise 4, of schedules: changes guided by what the reader does with them, where atheris is installed."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

from torture.campaign import Campaign
from torture.subjects import prepare

SECONDS = 120


def attack(campaign: Campaign, most: int) -> None:
    """`guided.py`, in a process of its own, some minutes at a time; each goes on with the inputs that led the ones before it to
    new lines."""
    if importlib.util.find_spec("atheris") is None:
        print("fuzz: left out: pip install atheris")
        return
    prepare(campaign.place)
    for case, _ in campaign.cases("fuzz", most):
        folder = Path("fuzz")
        (folder / "said.json").unlink(missing_ok=True)
        script = Path(__file__).with_name("guided.py")
        words = [
            sys.executable,
            str(script),
            "alpha.pt",
            str(folder),
            str(SECONDS),
            str(campaign.seed * 1000 + case + 1),
        ]
        run = subprocess.run(words, capture_output=True, text=True, check=False)
        said = (
            json.loads((folder / "said.json").read_text()) if (folder / "said.json").is_file() else {"found": ["none"]}
        )
        left = [path.name for path in folder.glob("*-*") if path.is_file()]  # of a crash, a hang, too much memory
        found = [*said.pop("found"), *left, *([run.stderr[-300:]] if run.returncode else [])]
        facts = {"count": said.pop("inputs", 0), **said, "seconds": SECONDS}
        campaign.end("fuzz", case, "Schedule.load, guided by coverage", not found, found=found[:10], **facts)
        if found:
            shutil.move(folder, f"fuzz_{campaign.seed}_{case}")
