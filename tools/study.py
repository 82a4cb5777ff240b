"""Run a table of trainings from one YAML file and render it.

    python tools/study.py studies/cifar10_short.yaml --dry-run     # runs, and their cost
    python tools/study.py studies/cifar10_short.yaml               # runs what is missing, then renders
    python tools/study.py studies/cifar10_short.yaml --render      # renders only

The file says:

    config: search_configs/x.yaml       # pair, data, search and training
    metric: accuracy                    # what tables show, in percent or its own unit; the default
    seeds: [0, 1, 2]
    baseline: equal                     # label, or list of them, that the others are compared with, seed by seed
    set: {threads: 1}                   # overrides of every run
    searches:                           # overrides of the searches by name, each run once per seed; absent: no search
      search: {}
    epochs: [2, 4, 8]                   # every run at each of these budgets; absent: at the config's
    reach: ["KD, 8 epochs"]             # with epochs: tell how many epochs each needs for the accuracy of these rows
    shared: {"KD, 2 epochs": other/KD}  # rows that another study has, the label here first
    figures: [bars]                     # see tools/study_figures.py; absent: none
    runs:
      KD: {pathways: null, terms: [{loss: kd, weight: 1}], retrain.weights: constant}
      searched: {search: search}        # which search's schedule it replays; may be left out if there is one search only
      foreign: {search: other/search}   # or another study's: so a schedule is taken to another pair or data

A search or a run may have a `config:` of its own. A search that says `tune: {...}` is a `distpro tune`, and a run of it
trains the `best.yaml` that it has written.

Each run is a `distpro` process of its own; `--jobs` of them run side by side. One row per finished run is appended to
docs/results/<study>.jsonl (or another --results folder) with everything that is needed to repeat it; rows that are
there are not run again. The table goes to docs/results/<study>.md, the figures to docs/figures, and both
into the pages of docs/ that have a place for them. A run alone, without a row: `--repeat LABEL SEED`, which compares
its metric with the row's.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from study_file import ROOT, Search, StudyFile
from study_table import render, seen_from, splice

from distpro.config.reading import default_space, for_retrain, read_config
from distpro.files import write_atomically
from distpro.report.cost import describe
from distpro.schedule import Schedule


class Study(StudyFile):
    """A study that can be run."""

    def execute(self, label: str, seed: int, out: Path) -> dict[str, Any] | None:
        """Run one row in the folder ``out``, resuming where an earlier try has left a checkpoint. None: it failed."""
        program, *command = self.command(label, seed)
        given = str(self.out(label, seed).relative_to(ROOT))
        command = [str(out.relative_to(ROOT)) if word == given else word for word in command]
        run = [sys.executable, "-m", "distpro.cli"] if program == "distpro" else [sys.executable]
        begun = (out / "checkpoint.pt").exists() or ((out / "trials").is_dir() and (out / "config.yaml").exists())
        resume = ["--resume"] if begun else []
        if not resume and out.exists():
            shutil.rmtree(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out.parent / f"{out.name}.log", "a") as log:
            status = subprocess.run(
                [*run, *command, *resume],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        if status:
            print(f"{self.name}: {label}, seed {seed} ended with status {status}; see {log.name}", flush=True)
            return None
        environment = json.loads((out / "environment.json").read_text())
        row = {
            "label": label,
            "seed": seed,
            **json.loads((out / "result.json").read_text()),
            "command": shlex.join(self.command(label, seed)),
            "packages": environment["packages"],
            "revision": _revision(environment["revision"]),
            "threads": environment["threads"],
            "device": environment["device"],
        }
        if label in self.searches and (out / "alpha.pt").exists():
            row["learned"] = summary(Schedule.load(out / "alpha.pt"))
        return row

    def run(self, label: str, seed: int) -> None:
        """Run one row and keep it, unless its search has failed: it may have left the schedule of its first steps."""
        search = self.search_of(label)
        if search and not search.ended(seed):
            print(f"{self.name}: {label}, seed {seed} left out: '{search.label}' has not ended", flush=True)
            return
        row = self.execute(label, seed, self.out(label, seed))
        if row is None:
            return
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with open(self.results, "a") as file:
            file.write(json.dumps(row) + "\n")
        (self.out(label, seed) / "checkpoint.pt").unlink(missing_ok=True)
        print(f"{self.name}: {label}, seed {seed}: {row[self.metric]:.2f} ({row['seconds']:.0f} s)", flush=True)

    def run_all(self, jobs: list[tuple[str, int]], side_by_side: int) -> None:
        """Run rows and keep them."""
        with ThreadPoolExecutor(side_by_side) as pool:
            begun: dict[tuple[str, int], Future[None]] = {}

            def after_its_search(label: str, seed: int) -> None:
                search = self.search_of(label)
                if search and search.study is self and (search.label, seed) in begun:
                    wait([begun[search.label, seed]])  # which is before it in the queue, so that it has begun
                self.run(label, seed)

            waits = {job: bool(self.search_of(job[0])) for job in jobs}
            for job in sorted(jobs, key=lambda job: (job[0] not in self.searches, waits[job])):
                begun[job] = pool.submit(after_its_search, *job)
        for run in begun.values():
            run.result()

    def repeat(self, label: str, seed: int) -> bool:
        """Run a row once more, with the schedule that is in `runs/`, and say whether it comes to the same accuracy."""
        kept = next((r for r in self.rows() if (r["label"], r["seed"]) == (label, seed)), None)
        if kept is None:
            raise SystemExit(f"{self.results}: no row '{label}' with seed {seed}")
        search, out = self.search_of(label), self.out(label, seed)
        if search and not search.ended(seed):
            search.study.execute(search.label, seed, search.study.out(search.label, seed))
        out = out.with_name(f"{out.name}-repeated")
        shutil.rmtree(out, ignore_errors=True)
        row = self.execute(label, seed, out)
        same = row is not None and (row[self.metric], row["loss"]) == (kept[self.metric], kept["loss"])
        print(
            f"{self.name}: {label}, seed {seed}: row of revision {kept['revision']}: {kept[self.metric]}, {kept['loss']}"
        )
        print(f"  now: {row and (row[self.metric], row['loss'])}: {'the same' if same else 'NOT THE SAME'}")
        return same


def _revision(described: str) -> str:
    """Without the "-dirty" that comes of the rows, tables and figures themselves."""
    command = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs"]
    changed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    return described if changed else described.removesuffix("-dirty")


POINTS = 25


def summary(schedule: Schedule) -> dict[str, Any]:
    """What the figures show of a schedule: weights over time per term, and each term's teacher level (0: none)."""
    weights = schedule.interpolate(POINTS).weights
    return {
        "keys": list(schedule.keys),
        "teacher_levels": schedule.levels[:, 0].tolist(),
        "scales": [float(f"{x:.4g}") for x in schedule.scales.tolist()],
        "weights": [[round(x, 5) for x in row] for row in weights.tolist()],
    }


def cost(study: Study, label: str) -> float:
    """Multiply-accumulates of a run."""
    tunes = Search(study, label).tunes
    searching = label in study.searches
    config = read_config(ROOT / study.config(label), study.overrides(label, 0), space=default_space)
    description = describe(config if searching else for_retrain(config), searching)
    if not tunes:
        return (description.steps or 0) * description.step_macs
    part = (config.tune.epochs or config.training.epochs) / config.training.epochs
    return config.tune.trials * part * (description.steps or 0) * describe(for_retrain(config), False).step_macs


def plan(study: Study, jobs: list[tuple[str, int]]) -> None:
    """Print the commands of runs, and what they cost."""
    total = 0.0
    for label, seed in jobs:
        macs = cost(study, label)
        total += macs
        print(f"{macs / 1e12:8.1f} TMAC   {shlex.join(study.command(label, seed))}")
    hours = total / 40e9 / 3600
    print(f"{total / 1e12:8.1f} TMAC   in {len(jobs)} runs; at 40 GMAC/s a core about {hours:.1f} core hours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", type=Path, nargs="+", metavar="study")
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 1))
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results", help="folder of rows and tables")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--render", action="store_true")
    parser.add_argument(
        "--only", nargs="+", metavar="LABEL", help="these runs, with their searches, of those that are missing"
    )
    parser.add_argument("--repeat", nargs=2, metavar=("LABEL", "SEED"), help="run a row once more and compare")
    options = parser.parse_args()
    studies = [Study(path, options.results) for path in options.studies]
    if (options.repeat or options.only) and len(studies) > 1:
        parser.error("--repeat and --only take one study")
    if options.repeat:
        sys.exit(not studies[0].repeat(options.repeat[0], int(options.repeat[1])))
    for study in studies:
        wanted = study.with_searches(options.only) if options.only else study.runs.keys() | study.searches.keys()
        missing = [job for job in study.missing() if job[0] in wanted]
        if options.dry_run:
            plan(study, missing)
            continue
        if not options.render:
            study.run_all(missing, options.jobs)
        if study.rows():
            text = render(study)
            write_atomically(seen_from(study.results, text), study.results.with_suffix(".md"))
            print(text)
            for page in sorted((ROOT / "docs").rglob("*.md")):
                splice(page, study.name, text)


if __name__ == "__main__":
    main()
