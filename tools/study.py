"""Run a table of trainings from one YAML file and render it.

    python tools/study.py studies/cifar10_short.yaml --dry-run     # runs, and their cost
    python tools/study.py studies/cifar10_short.yaml               # runs what is missing, then renders
    python tools/study.py studies/cifar10_short.yaml --render      # renders only

`distpro compare` runs the same files (distpro/report/study.py says what may stand in them) and writes a page; this
writes the tables and figures of docs/, which `reach: [LABEL]` (epochs until the accuracy of these rows) and `figures: [dots]` (see
tools/study_figures.py) in a file add to.

Each run is a `distpro` process of its own; `--jobs` of them run side by side. One row per finished run is appended to
docs/results/<study>.jsonl (or another --results folder) with everything that is needed to repeat it; rows that are
there are not run again. The table goes to docs/results/<study>.md, the figures to docs/figures, and both
into the pages of docs/ that have a place for them. A run alone, without a row: `--repeat LABEL SEED`, which compares
its metric with the row's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from study_table import ROOT, render, seen_from, splice

from distpro.files import write_atomically
from distpro.runs import comparing
from distpro.runs.comparing import missing, plan
from pathways.registry import UserError


class Study(comparing.Study):
    """A study of this repository."""

    def __init__(self, path: Path, results: Path, root: Path = ROOT):
        super().__init__(path, results, root)

    def revision(self, described: str) -> str:
        """Without the "-dirty" that comes of the rows, tables and figures themselves."""
        command = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs"]
        changed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
        return described if changed else described.removesuffix("-dirty")

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
        jobs = missing(study, options.only)
        if options.dry_run:
            plan(study, jobs)
            continue
        if not options.render:
            study.run_all(jobs, options.jobs)
        if study.rows():
            text = render(study)
            write_atomically(seen_from(study.results, text), study.results.with_suffix(".md"))
            print(text)
            for page in sorted((ROOT / "docs").rglob("*.md")):
                splice(page, study.name, text)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
