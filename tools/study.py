"""Run a table of trainings from one YAML file and render it.

    python tools/study.py studies/cifar10_short.yaml --dry-run     # runs, and their cost
    python tools/study.py studies/cifar10_short.yaml               # runs what is missing, then renders
    python tools/study.py studies/cifar10_short.yaml --render      # renders only

The file says:

    config: search_configs/x.yaml       # pair, data, search and training
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

A search or a run may have a `config:` of its own. A search that says `tune: [...]` is one of tools/tune.py with these
arguments, and a run of it takes the config that it has written.

Each run is a `distpro` process of its own; `--jobs` of them run side by side. One row per finished run is appended to
docs/results/<study>.jsonl (or another --results folder) with everything that is needed to repeat it; rows that are
there are not run again. The table goes to docs/results/<study>.md, the figures to docs/figures, and both
into the pages of docs/ that have a place for them. A run alone, without a row: `--repeat LABEL SEED`, which compares
its accuracy with the row's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from study_figures import FIGURES, at_budget

from distpro.config.reading import for_retrain, read_config
from distpro.files import write_atomically
from distpro.report.cost import describe
from distpro.schedule import Schedule
from pathways.registry import nearest

ROOT = Path(__file__).resolve().parent.parent
# Two-sided 95 % points of Student's t by degrees of freedom.
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


class Search(NamedTuple):
    """A search of a study, which runs of it or of another study replay."""

    study: Study
    label: str

    def schedule(self, seed: int) -> Path:
        return self.study.out(self.label, seed) / "alpha.pt"

    def ended(self, seed: int) -> bool:
        return self.study.out(self.label, seed).joinpath("result.json").exists()

    @property
    def tunes(self) -> bool:
        """Whether it is one of tools/tune.py, which finds no schedule but a config."""
        return "tune" in self.study.searches.get(self.label, {})


class Study:
    """The runs of a study file, their commands, and the rows that are there."""

    def __init__(self, path: Path, results: Path):
        self.name = path.stem
        self.content: dict[str, Any] = yaml.safe_load(path.read_text())
        self.path = path
        self.seeds: list[int] = self.content["seeds"]
        self.searches: dict[str, dict[str, Any]] = {k: v or {} for k, v in self.content.get("searches", {}).items()}
        self.runs: dict[str, dict[str, Any]] = {k: v or {} for k, v in self.content["runs"].items()}
        if "epochs" in self.content:
            self.runs = {
                at_budget(label, epochs): {**own, "training.epochs": epochs}
                for label, own in self.runs.items()
                for epochs in self.content["epochs"]
            }
        if both := self.runs.keys() & self.searches.keys():
            raise SystemExit(f"{path}: name of a search and of a run: {', '.join(both)}")
        self.results = results / f"{self.name}.jsonl"
        self.folder = ROOT / "runs" / self.name

    def rows(self) -> list[dict[str, Any]]:
        """Rows of this study's labels and seeds: of its results file, and those that it shares with other studies."""
        lines = self.results.read_text().splitlines() if self.results.exists() else []
        rows = [json.loads(line) for line in lines]
        for label, source in self.content.get("shared", {}).items():
            study, _, theirs = source.partition("/")
            rows += [{**r, "label": label} for r in self.other(study).rows() if r["label"] == theirs]
        known = self.runs.keys() | self.searches.keys()
        return [r for r in rows if r["label"] in known and r["seed"] in self.seeds]

    def other(self, name: str) -> Study:
        """The study in the file beside this one."""
        return Study(self.path.with_name(f"{name}.yaml"), self.results.parent)

    def config(self, label: str) -> str:
        return str({**self.runs, **self.searches}[label].get("config", self.content["config"]))

    def overrides(self, label: str, seed: int) -> list[str]:
        """``key=value`` of a run or search."""
        merged = {**self.content.get("set", {}), **{**self.runs, **self.searches}[label], "seed": seed}
        return [
            f"{key}={json.dumps(value)}" for key, value in merged.items() if key not in ("config", "search", "tune")
        ]

    def search_of(self, label: str) -> Search | None:
        """The search that a run replays. None: it needs no search, or is one."""
        if label in self.searches:
            return None
        own = {**self.content.get("set", {}), **self.runs[label]}
        if own.get("retrain.weights", "searched") in ("constant", "none") and "search" not in own:
            return None
        search = own.get("search", next(iter(self.searches), ""))
        study, _, name = search.partition("/")
        foreign = name and search not in self.searches  # names may have a / in them
        return Search(self.other(study), name) if foreign else Search(self, search)

    def out(self, label: str, seed: int) -> Path:
        return self.folder / f"{re.sub(r'[^A-Za-z0-9.]+', '_', label)}-{seed}"

    def command(self, label: str, seed: int) -> list[str]:
        """The command that makes a row."""
        search, tune = self.search_of(label), self.searches.get(label, {}).get("tune")
        config, options = self.config(label), []
        if tune:
            program = ["python", "tools/tune.py"]
        elif label in self.searches:
            program = ["distpro", "search"]
        else:
            program = ["distpro", "retrain"]
        if search and search.tunes:
            config = str(search.schedule(seed).with_name("tuned.yaml").relative_to(ROOT))
        elif search:
            options = ["--schedule", str(search.schedule(seed).relative_to(ROOT))]
        out = ["--out", str(self.out(label, seed).relative_to(ROOT))]
        return [*program, config, *options, *self.overrides(label, seed), *out, *map(str, tune or [])]

    def missing(self) -> list[tuple[str, int]]:
        """Runs without a row, searches first, seed by seed: what is there when time is up is comparable."""
        done = {(r["label"], r["seed"]) for r in self.rows()}
        groups = (self.searches, self.runs)
        return [(k, seed) for group in groups for seed in self.seeds for k in group if (k, seed) not in done]

    def with_searches(self, labels: list[str]) -> set[str]:
        """Labels, and those of the searches of this study that they replay."""
        if unknown := set(labels) - self.runs.keys() - self.searches.keys():
            label = min(unknown)
            raise SystemExit(f"{self.path}: no run or search '{label}'{nearest(label, [*self.searches, *self.runs])}")
        searches = [search for label in labels if (search := self.search_of(label)) and search.study is self]
        return {*labels, *(search.label for search in searches)}

    def execute(self, label: str, seed: int, out: Path) -> dict[str, Any] | None:
        """Run one row in the folder ``out``, resuming where an earlier try has left a checkpoint. None: it failed."""
        program, *command = self.command(label, seed)
        given = str(self.out(label, seed).relative_to(ROOT))
        command = [str(out.relative_to(ROOT)) if word == given else word for word in command]
        run = [sys.executable, "-m", "distpro.cli"] if program == "distpro" else [sys.executable]
        resume = ["--resume"] if (out / "checkpoint.pt").exists() else []
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
        print(f"{self.name}: {label}, seed {seed}: {row['accuracy']:.2f} ({row['seconds']:.0f} s)", flush=True)

    def run_all(self, jobs: list[tuple[str, int]], side_by_side: int) -> None:
        """Run rows and keep them."""
        for group in (self.searches, self.runs):  # the schedules have to be there before the retrains
            with ThreadPoolExecutor(side_by_side) as pool:
                list(pool.map(lambda job: self.run(*job), [job for job in jobs if job[0] in group]))

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
        same = row is not None and (row["accuracy"], row["loss"]) == (kept["accuracy"], kept["loss"])
        print(
            f"{self.name}: {label}, seed {seed}: row of revision {kept['revision']}: {kept['accuracy']}, {kept['loss']}"
        )
        print(f"  now: {row and (row['accuracy'], row['loss'])}: {'the same' if same else 'NOT THE SAME'}")
        return same

    # The table and the figure

    def found(self) -> dict[str, dict[int, dict[str, Any]]]:
        """Rows by label and seed."""
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for row in self.rows():
            found.setdefault(row["label"], {})[row["seed"]] = row
        return found

    def seconds(self, label: str) -> float:
        """Mean seconds of a run, its search included."""
        search = self.search_of(label)
        parts = [(self, label), *([search] if search else [])]
        rows = [study.found().get(name, {}).values() for study, name in parts]
        return sum(statistics.mean(r["seconds"] for r in found) for found in rows if found)

    def render(self) -> str:
        """Markdown: mean ± standard deviation, and paired differences to the baseline with a 95 % interval."""
        rows, found = self.rows(), self.found()
        baseline = self.content.get("baseline", [])
        baselines = [baseline] if isinstance(baseline, str) else baseline
        compared = "".join(f"paired difference to {label} | " for label in baselines)
        lines = [
            f"| weights | last-epoch test accuracy, % | n | {compared}seconds a run | with its search |",
            "|---|---|---|---|---|" + "---|" * len(baselines),
        ]
        for label in [*self.runs, *self.searches]:
            if label not in found:
                continue
            mine = found[label]
            searching = label in self.searches
            against = [{} if searching or label == b else found.get(b, {}) for b in baselines]
            values = [
                f"({label})" if searching else label,
                _spread([r["accuracy"] for r in mine.values()]),
                str(len(mine)),
                *(_interval([r["accuracy"] - b[s]["accuracy"] for s, r in mine.items() if s in b]) for b in against),
                f"{statistics.mean(r['seconds'] for r in mine.values()):.0f}",
                f"{self.seconds(label):.0f}" if self.search_of(label) else "",
            ]
            lines.append(f"| {' | '.join(values)} |")
        if targets := [t for t in self.content.get("reach", []) if t in found]:
            lines += ["", *self.reached(targets)]
        lines += ["", "<details><summary>The commands of the first seed, and the versions</summary>", ""]
        lines += ["The other seeds' differ in `seed=` and paths only.", "", "```"]
        lines += [r["command"] for r in rows if r["seed"] == self.seeds[0]]
        versions = rows[0]["packages"]
        lines += ["```", "", ", ".join(f"{k} {v}" for k, v in versions.items())]
        lines[-1] += f"; device {rows[0]['device']}; {rows[0]['threads']} threads a run; revisions "
        lines[-1] += ", ".join(sorted({f"`{r['revision']}`" for r in rows})) + "."
        lines += ["", "</details>", ""]
        for kind in self.content.get("figures", []):
            path = ROOT / "docs" / "figures" / f"{self.name}_{kind}.png"
            FIGURES[kind](self, path)
            lines += [f"![{self.name}: {kind}](figures/{path.name})", ""]
        return "\n".join(lines)

    def budgets(self, base: str) -> dict[int, list[float]]:
        """Accuracies of a run's seeds by epochs, where there are any."""
        found = self.found()
        rows = {n: found.get(at_budget(base, n), {}).values() for n in sorted(self.content["epochs"])}
        return {n: [r["accuracy"] for r in there] for n, there in rows.items() if there}

    def reached(self, targets: list[str]) -> list[str]:
        """Markdown: the epochs that each run needs for the mean accuracy of the target rows.

        Between two budgets the accuracy is taken to be linear in the logarithm of the epochs.
        """
        found = self.found()
        goals = [statistics.mean(r["accuracy"] for r in found[t].values()) for t in targets]
        titles = [f"epochs to {goal:.2f} % ({target})" for goal, target in zip(goals, targets, strict=True)]
        lines = [f"| weights | {' | '.join(titles)} |", "|---|" + "---|" * len(goals)]
        for base in self.content["runs"]:
            if curve := {n: statistics.mean(accuracies) for n, accuracies in self.budgets(base).items()}:
                lines.append(f"| {base} | {' | '.join(epochs_to(goal, curve) for goal in goals)} |")
        return lines


def epochs_to(goal: float, curve: dict[int, float]) -> str:
    """Where accuracy by epochs first comes to ``goal``."""
    before: tuple[int, float] | None = None
    for epochs, accuracy in curve.items():
        if accuracy >= goal:
            if before is None or accuracy == goal:
                return f"{'at most ' if accuracy > goal else ''}{epochs}"
            share = (goal - before[1]) / (accuracy - before[1])
            return f"{before[0] * (epochs / before[0]) ** share:.1f}"
        before = epochs, accuracy
    return f"more than {max(curve)}"


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


def splice(page: Path, name: str, table: str) -> None:
    """Put the table between the page's ``<!-- study: NAME -->`` and ``<!-- end -->``, if it has such a place."""
    text = page.read_text() if page.exists() else ""
    begin, _, rest = text.partition(f"<!-- study: {name} -->\n")
    if rest:
        _, end, after = rest.partition("<!-- end -->")
        write_atomically(f"{begin}<!-- study: {name} -->\n{table}{end}{after}", page)


def cost(study: Study, label: str) -> float:
    """Multiply-accumulates of a run."""
    config = read_config(ROOT / study.config(label), study.overrides(label, 0))
    searching = label in study.searches
    description = describe(config if searching else for_retrain(config), searching)
    return (description.steps or 0) * description.step_macs


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
            text = study.render()
            write_atomically(text, study.results.with_suffix(".md"))
            print(text)
            for page in sorted((ROOT / "docs").glob("*.md")):
                splice(page, study.name, text)


if __name__ == "__main__":
    main()
