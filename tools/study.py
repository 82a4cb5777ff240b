"""Run a table of trainings from one YAML file and render it.

    python tools/study.py studies/cifar10_short.yaml --dry-run     # runs, and their cost
    python tools/study.py studies/cifar10_short.yaml               # runs what is missing, then renders
    python tools/study.py studies/cifar10_short.yaml --render      # renders only

The file says:

    config: search_configs/x.yaml       # pair, data, search and training
    seeds: [0, 1, 2]
    baseline: equal                     # label that the others are compared with, seed by seed
    set: {threads: 1}                   # overrides of every run
    search: {}                          # overrides of the searches, one per seed; absent: no search
    runs:
      KD: {pathways: null, terms: [{loss: kd, weight: 1}], retrain.weights: constant}
      searched: {retrain.weights: searched}

Each run is a `distpro` process of its own; `--jobs` of them run side by side. One row per finished run is appended to
docs/results/<study>.jsonl (or another --results folder) with everything that is needed to repeat it; rows that are there are not run again. The
table goes to docs/results/<study>.md, and into the pages of docs/ that have a place for it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from distpro.checkpoint import write_atomically
from distpro.config import read_config
from distpro.describe import describe

ROOT = Path(__file__).resolve().parent.parent
# Two-sided 95 % points of Student's t by degrees of freedom.
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


class Study:
    """The runs of a study file, their commands, and the rows that are there."""

    def __init__(self, path: Path, results: Path):
        self.name = path.stem
        self.content: dict[str, Any] = yaml.safe_load(path.read_text())
        self.path = path
        self.config = str(self.content["config"])
        self.runs: dict[str, dict[str, Any]] = self.content["runs"]
        self.results = results / f"{self.name}.jsonl"
        self.folder = ROOT / "runs" / self.name

    @property
    def searches(self) -> bool:
        return "search" in self.content

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the results file, those of this study's labels."""
        if not self.results.exists():
            return []
        rows = [json.loads(line) for line in self.results.read_text().splitlines()]
        return [r for r in rows if r["label"] == "search" or r["label"] in self.runs]

    def overrides(self, label: str, seed: int) -> list[str]:
        """``key=value`` of a run."""
        own = self.content["search"] if label == "search" else self.runs[label]
        merged = {**self.content.get("set", {}), **(own or {}), "seed": seed}
        return [f"{key}={json.dumps(value)}" for key, value in merged.items()]

    def schedule(self, seed: int) -> Path:
        return self.folder / f"search-{seed}" / "alpha.pt"

    def out(self, label: str, seed: int) -> Path:
        return self.folder / f"{re.sub(r'[^A-Za-z0-9.]+', '_', label)}-{seed}"

    def command(self, label: str, seed: int) -> list[str]:
        """The command that makes a row."""
        if label == "search":
            command = ["distpro", "search", self.config]
        else:
            command = ["distpro", "retrain", self.config]
            if self.searches and self.needs_schedule(label):
                command += ["--schedule", str(self.schedule(seed).relative_to(ROOT))]
        out = self.out(label, seed).relative_to(ROOT)
        return [*command, *self.overrides(label, seed), "--out", str(out)]

    def needs_schedule(self, label: str) -> bool:
        return self.runs[label].get("retrain.weights", "searched") not in ("constant", "none")

    def missing(self) -> list[tuple[str, int]]:
        """Runs without a row, searches first."""
        done = {(r["label"], r["seed"]) for r in self.rows()}
        labels = (["search"] if self.searches else []) + list(self.runs)
        return [(label, seed) for label in labels for seed in self.content["seeds"] if (label, seed) not in done]

    def run(self, label: str, seed: int) -> None:
        """Run one row, resuming where an earlier try has left a checkpoint."""
        out = self.out(label, seed)
        command = self.command(label, seed)
        resume = ["--resume"] if (out / "checkpoint.pt").exists() else []
        if not resume and out.exists():
            subprocess.run(["rm", "-r", str(out)], check=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        start = time.time()
        with open(out.parent / f"{out.name}.log", "a") as log:
            status = subprocess.run(
                [sys.executable, "-m", "distpro.cli", *command[1:], *resume],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        if status:
            print(f"{self.name}: {label}, seed {seed} ended with status {status}; see {log.name}", flush=True)
            return
        environment = json.loads((out / "environment.json").read_text())
        row = {
            "label": label,
            "seed": seed,
            **json.loads((out / "result.json").read_text()),
            "command": shlex.join(command),
            "packages": environment["packages"],
            "revision": environment["revision"],
            "threads": environment["threads"],
            "device": environment["device"],
        }
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with open(self.results, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{self.name}: {label}, seed {seed}: {row['accuracy']:.2f} ({time.time() - start:.0f} s)", flush=True)

    # The table

    def render(self) -> str:
        """Markdown: mean ± standard deviation, and paired differences to the baseline with a 95 % interval."""
        rows = self.rows()
        by_label: dict[str, dict[int, dict[str, Any]]] = {}
        for row in rows:
            by_label.setdefault(row["label"], {})[row["seed"]] = row
        baseline = by_label.get(self.content.get("baseline", ""), {})
        lines = [
            f"| weights | last-epoch test accuracy, % | n | paired difference to {self.content.get('baseline', '-')} | best epoch | seconds a run |",
            "|---|---|---|---|---|---|",
        ]
        for label in [*self.runs, "search"]:
            found = by_label.get(label, {})
            if not found:
                continue
            values = [r["accuracy"] for r in found.values()]
            differences = [r["accuracy"] - baseline[s]["accuracy"] for s, r in found.items() if s in baseline]
            shown = label if label != "search" else "(the search itself, 80 % of the data)"
            best = statistics.mean(r["best_accuracy"] for r in found.values())
            seconds = statistics.mean(r["seconds"] for r in found.values())
            against = _interval(differences) if label != self.content.get("baseline") and label != "search" else ""
            lines.append(f"| {shown} | {_spread(values)} | {len(values)} | {against} | {best:.2f} | {seconds:.0f} |")
        lines += ["", "Commands (of the first seed; the others differ in `seed=` and paths only):", "", "```"]
        lines += [r["command"] for r in rows if r["seed"] == self.content["seeds"][0]]
        versions = rows[0]["packages"] if rows else {}
        lines += ["```", "", ", ".join(f"{k} {v}" for k, v in versions.items())]
        lines[-1] += f"; device {rows[0]['device']}; {rows[0]['threads']} threads a run." if rows else ""
        return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _interval(differences: list[float]) -> str:
    if not differences:
        return ""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+.2f}"
    half = T95.get(len(differences) - 1, 1.96) * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def splice(page: Path, study: Study) -> None:
    """Put the table between the page's ``<!-- study: NAME -->`` and ``<!-- end -->``, if it has such a place."""
    text = page.read_text() if page.exists() else ""
    begin, _, rest = text.partition(f"<!-- study: {study.name} -->\n")
    if rest:
        _, end, after = rest.partition("<!-- end -->")
        write_atomically(f"{begin}<!-- study: {study.name} -->\n{study.render()}{end}{after}", page)


def cost(study: Study, label: str) -> float:
    """Multiply-accumulates of a run."""
    config = read_config(ROOT / study.config, study.overrides(label, 0))
    description = describe(config if label == "search" else config.for_retrain(), label == "search")
    return (description.steps or 0) * description.step_macs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 1))
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results", help="folder of rows and tables")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    study = Study(options.study, options.results)
    missing = study.missing()
    if options.dry_run:
        total = 0.0
        for label, seed in missing:
            macs = cost(study, label)
            total += macs
            print(f"{macs / 1e12:8.1f} TMAC   {shlex.join(study.command(label, seed))}")
        print(
            f"{total / 1e12:8.1f} TMAC   in {len(missing)} runs; at 40 GMAC/s a core about {total / 40e9 / 3600:.1f} core hours"
        )
        return
    if not options.render:
        for stage in (["search"], list(study.runs)):  # the schedules have to be there before the retrains
            with ThreadPoolExecutor(options.jobs) as pool:
                list(pool.map(lambda job: study.run(*job), [job for job in missing if job[0] in stage]))
    if study.rows():
        write_atomically(study.render(), study.results.with_suffix(".md"))
        print(study.render())
        for page in sorted((ROOT / "docs").glob("*.md")):
            splice(page, study)


if __name__ == "__main__":
    main()
