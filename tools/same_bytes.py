"""Do a search and a retrain still give the same bytes as another revision on this machine?

    python tools/same_bytes.py [REVISION]      (default: 69482af, the last one before Batch, Call and Task)

Both revisions train a ResNet-14 teacher, search a schedule for ResNet-8 over pathways and losses, and retrain with it,
on the digits, each in a process of its own with one thread. Compared are the SHA-256 of α̃, w and the scales of the
schedule, and of every weight of the teacher and the student.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEFORE = "69482af"

CONFIG = {
    "threads": 1,
    "device": "cpu",
    "precision": "float32",
    # mean and std are said, because revisions differ in which images they take them of by themselves
    "data": {
        "name": "digits",
        "samples": 400,
        "mean": [0.3] * 3,
        "std": [0.38] * 3,
        "augment": [{"crop": {"padding": 1}}, "flip"],
    },
    "student": {"model": "resnet8"},
    "training": {"epochs": 3, "batch_size": 32, "optimizer": {"lr": 0.05}, "learning_rate": {"name": "cosine"}},
    "tracking": {"tensorboard": False},
}
SPACE = {
    "pathways": {"connect": "same", "transforms": ["conv1x1", "attention"]},
    "terms": [{"loss": "kd"}, {"loss": "dkd"}, {"loss": "at"}, {"loss": "sp"}],
}


def _digest(tensors: object) -> str:
    """SHA-256 over the names and bytes of a mapping of tensors."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):  # type: ignore[attr-defined]
        whole.update(name.encode() + tensor.contiguous().cpu().numpy().tobytes())
    return whole.hexdigest()[:16]


def _run_both() -> None:
    """Search and retrain with the distpro that this process imports; prints one line per result."""
    import torch

    import distpro

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        distpro.train({**CONFIG, "student": {"model": "resnet14"}}, out=folder / "teacher")
        teacher = {"model": "resnet14", "checkpoint": str(folder / "teacher" / "student.pt")}
        config = {**CONFIG, **SPACE, "teacher": teacher}
        schedule = distpro.search(config, out=folder / "search")
        distpro.retrain(config, schedule=folder / "search" / "alpha.pt", out=folder / "retrain")
        alpha = {name: getattr(schedule, name) for name in ("alpha_tilde", "weights", "scales")}
        print("teacher", _digest(torch.load(folder / "teacher" / "student.pt", weights_only=True)))
        print("schedule", _digest(alpha))
        print("student", _digest(torch.load(folder / "retrain" / "student.pt", weights_only=True)))


def _lines_of(tree: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, __file__, "--run"],
        env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{tree}: the run failed\n{done.stderr[-2000:]}")
    return [line for line in done.stdout.splitlines() if line.split(" ")[0] in ("teacher", "schedule", "student")]


def main() -> int:
    """Compare this tree with a revision. Exit status 1 where a result differs."""
    if sys.argv[1:] == ["--run"]:
        _run_both()
        return 0
    revision = sys.argv[1] if len(sys.argv) > 1 else BEFORE
    with tempfile.TemporaryDirectory() as place:
        tree = Path(place) / "before"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(tree), revision], check=True, capture_output=True)
        try:
            before = _lines_of(tree)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True, capture_output=True)
    now = _lines_of(ROOT)
    print(f"{'result':10}{revision:20}{'this tree':20}")
    for old, new in zip(before, now, strict=True):
        name, digest = old.split()
        print(f"{name:10}{digest:20}{new.split()[1]:20}{'same' if old == new else 'DIFFERS'}")
    return int(before != now)


if __name__ == "__main__":
    sys.exit(main())
