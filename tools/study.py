"""Run a table of trainings from one YAML file and render it.

    python tools/study.py studies/cifar10_short.yaml --dry-run     # runs, and their cost
    python tools/study.py studies/cifar10_short.yaml               # runs what is missing, then renders
    python tools/study.py studies/cifar10_short.yaml --render      # renders only

The file says:

    config: search_configs/x.yaml       # pair, data, search and training
    seeds: [0, 1, 2]
    baseline: equal                     # label that the others are compared with, seed by seed
    set: {threads: 1}                   # overrides of every run
    searches:                           # overrides of the searches by name, each run once per seed; absent: no search
      search: {}
    epochs: [2, 4, 8]                   # every run at each of these budgets; absent: at the config's
    figures: [bars]                     # see FIGURES; absent: none
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
from typing import Any

import yaml

from distpro.checkpoint import write_atomically
from distpro.config import read_config
from distpro.describe import describe
from distpro.schedule import Schedule

ROOT = Path(__file__).resolve().parent.parent
# Two-sided 95 % points of Student's t by degrees of freedom.
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}


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
        """Rows of the results file, those of this study's labels and seeds."""
        if not self.results.exists():
            return []
        rows = [json.loads(line) for line in self.results.read_text().splitlines()]
        known = self.runs.keys() | self.searches.keys()
        return [r for r in rows if r["label"] in known and r["seed"] in self.seeds]

    def config(self, label: str) -> str:
        return str({**self.runs, **self.searches}[label].get("config", self.content["config"]))

    def overrides(self, label: str, seed: int) -> list[str]:
        """``key=value`` of a run or search."""
        merged = {**self.content.get("set", {}), **{**self.runs, **self.searches}[label], "seed": seed}
        return [
            f"{key}={json.dumps(value)}" for key, value in merged.items() if key not in ("config", "search", "tune")
        ]

    def search_of(self, label: str) -> tuple[Study, str] | None:
        """The search whose schedule a run replays, and the study that it belongs to."""
        own = {**self.content.get("set", {}), **self.runs[label]}
        if own.get("retrain.weights", "searched") in ("constant", "none") and "search" not in own:
            return None
        study, _, name = own.get("search", next(iter(self.searches), "")).rpartition("/")
        return (Study(self.path.with_name(f"{study}.yaml"), self.results.parent) if study else self), name

    def out(self, label: str, seed: int) -> Path:
        return self.folder / f"{re.sub(r'[^A-Za-z0-9.]+', '_', label)}-{seed}"

    def schedule(self, label: str, seed: int) -> Path | None:
        """Path of the schedule that a run replays."""
        search = self.search_of(label)
        return search[0].out(search[1], seed) / "alpha.pt" if search else None

    def tuned(self, label: str) -> bool:
        """Whether a run takes what tools/tune.py has found."""
        search = self.search_of(label)
        return search is not None and "tune" in search[0].searches.get(search[1], {})

    def command(self, label: str, seed: int) -> list[str]:
        """The command that makes a row."""
        out = self.out(label, seed).relative_to(ROOT)
        if tune := self.searches.get(label, {}).get("tune"):
            command = ["python", "tools/tune.py", self.config(label), *self.overrides(label, seed)]
            return [*command, "--out", str(out), *map(str, tune)]
        if label in self.searches:
            command = ["distpro", "search", self.config(label)]
        elif self.tuned(label):
            schedule = self.schedule(label, seed)
            assert schedule is not None
            command = ["distpro", "retrain", str(schedule.with_name("tuned.yaml").relative_to(ROOT))]
        else:
            command = ["distpro", "retrain", self.config(label)]
            if schedule := self.schedule(label, seed):
                command += ["--schedule", str(schedule.relative_to(ROOT))]
        return [*command, *self.overrides(label, seed), "--out", str(out)]

    def missing(self) -> list[tuple[str, int]]:
        """Runs without a row, searches first, seed by seed: what is there when time is up is comparable."""
        done = {(r["label"], r["seed"]) for r in self.rows()}
        groups = (self.searches, self.runs)
        return [(k, seed) for group in groups for seed in self.seeds for k in group if (k, seed) not in done]

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
        """Run one row and keep it."""
        row = self.execute(label, seed, self.out(label, seed))
        if row is None:
            return
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with open(self.results, "a") as file:
            file.write(json.dumps(row) + "\n")
        (self.out(label, seed) / "checkpoint.pt").unlink(missing_ok=True)
        print(f"{self.name}: {label}, seed {seed}: {row['accuracy']:.2f} ({row['seconds']:.0f} s)", flush=True)

    def repeat(self, label: str, seed: int) -> bool:
        """Run a row once more, with the schedule that is in `runs/`, and say whether it comes to the same accuracy."""
        kept = next((r for r in self.rows() if (r["label"], r["seed"]) == (label, seed)), None)
        if kept is None:
            raise SystemExit(f"{self.results}: no row '{label}' with seed {seed}")
        schedule = None if label in self.searches else self.schedule(label, seed)
        if schedule and not (schedule.parent / "result.json").exists():
            study, search = self.search_of(label)  # type: ignore[misc]
            study.execute(search, seed, schedule.parent)
        out = self.out(label, seed)
        row = self.execute(label, seed, out.with_name(f"{out.name}-repeated"))
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
        search = None if label in self.searches else self.search_of(label)
        parts = [(self, label), *([search] if search else [])]
        rows = [study.found().get(name, {}).values() for study, name in parts]
        return sum(statistics.mean(r["seconds"] for r in found) for found in rows if found)

    def render(self) -> str:
        """Markdown: mean ± standard deviation, and paired differences to the baseline with a 95 % interval."""
        rows, found = self.rows(), self.found()
        baseline = self.content.get("baseline")
        against = found.get(str(baseline), {})
        compared = f"paired difference to {baseline} | " if baseline else ""
        lines = [
            f"| weights | last-epoch test accuracy, % | n | {compared}seconds a run | with its search |",
            "|---|---|---|---|---|" + ("---|" if baseline else ""),
        ]
        for label in [*self.runs, *self.searches]:
            if label not in found:
                continue
            mine = found[label]
            differences = [r["accuracy"] - against[s]["accuracy"] for s, r in mine.items() if s in against]
            searching = label in self.searches
            difference = "" if label == baseline or searching else _interval(differences)
            values = [
                f"(the search {label})" if searching else label,
                _spread([r["accuracy"] for r in mine.values()]),
                str(len(mine)),
                *([difference] if baseline else []),
                f"{statistics.mean(r['seconds'] for r in mine.values()):.0f}",
                "" if searching or not self.search_of(label) else f"{self.seconds(label):.0f}",
            ]
            lines.append(f"| {' | '.join(values)} |")
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


def _revision(described: str) -> str:
    """Without the "-dirty" that comes of the rows, tables and figures themselves."""
    command = ["git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs"]
    changed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    return described if changed else described.removesuffix("-dirty")


def at_budget(label: str, epochs: int) -> str:
    return f"{label}, {epochs} epochs"


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


def draw_budgets(study: Study, path: Path) -> None:
    """Accuracy against epochs, and against seconds with the search's; a training of its own at every point."""
    plt = _pyplot()
    found = study.found()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for base in study.content["runs"]:
        points = []
        for epochs in study.content["epochs"]:
            label = at_budget(base, epochs)
            if label in found:
                values = [r["accuracy"] for r in found[label].values()]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                points.append((epochs, study.seconds(label), statistics.mean(values), spread))
        if points:
            epochs, seconds, means, spreads = zip(*points, strict=True)
            for axis, x in zip(axes, (epochs, seconds), strict=True):
                axis.errorbar(x, means, spreads, marker="o", markersize=4, capsize=3, label=base)
    axes[0].set(xlabel="epochs of the training, each with its own learning-rate schedule", ylabel="test accuracy, %")
    axes[1].set(xlabel="seconds, the search included")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0].set_xticks(study.content["epochs"], [str(e) for e in study.content["epochs"]])
    axes[0].legend(frameon=False)
    _save(figure, path)


def draw_bars(study: Study, path: Path) -> None:
    """Accuracy of every run: mean, and a dot per seed."""
    plt = _pyplot()
    found = {k: [r["accuracy"] for r in rows.values()] for k, rows in study.found().items() if k in study.runs}
    found = dict(sorted(found.items(), key=lambda item: -statistics.mean(item[1])))
    figure, axis = plt.subplots(figsize=(8, 0.6 + 0.27 * len(found)))
    means = [statistics.mean(values) for values in found.values()]
    learned = [
        study.search_of(k) is not None and study.runs[k].get("retrain.weights", "searched") == "searched" for k in found
    ]
    axis.barh(range(len(found)), means, color=["C0" if x else "0.8" for x in learned])
    for place, values in enumerate(found.values()):
        axis.plot(values, [place] * len(values), "o", markersize=3, color="black")
    axis.set_yticks(range(len(found)), list(found))
    axis.invert_yaxis()
    lowest = min(min(values) for values in found.values())
    axis.set(xlim=(lowest - 3, None), xlabel="test accuracy, %; dots: seeds; blue: learned schedules")
    axis.grid(axis="x", alpha=0.3)
    _save(figure, path)


def draw_levels(study: Study, path: Path) -> None:
    """Each teacher level's share of the weight over a search, a panel per search: mean and spread over seeds."""
    plt = _pyplot()
    found = {k: rows for k, rows in study.found().items() if "learned" in rows[min(rows)]}
    figure, axes = plt.subplots(1, len(found), figsize=(4.5 * len(found), 3.5), sharey=True, squeeze=False)
    for axis, (name, rows) in zip(axes[0], found.items(), strict=True):
        levels = sorted({i for r in rows.values() for i in r["learned"]["teacher_levels"] if i})
        for level in levels:
            shares = [_share(r["learned"], level) for r in rows.values()]
            mean = [statistics.mean(x) for x in zip(*shares, strict=True)]
            time = [n / (len(mean) - 1) for n in range(len(mean))]
            (line,) = axis.plot(time, mean, label=f"teacher level {level}")
            for share in shares:
                axis.plot(time, share, color=line.get_color(), alpha=0.25, linewidth=0.8)
        axis.set(title=f"{name}, {len(rows)} seeds", xlabel="fraction of the search")
        axis.grid(alpha=0.3)
    axes[0][0].set(ylabel="share of the terms that read a level")
    axes[0][0].legend(frameon=False)
    _save(figure, path)


def _share(learned: dict[str, Any], level: int) -> list[float]:
    placed = learned["teacher_levels"]
    mine = [[w for w, i in zip(row, placed, strict=True) if i == level] for row in learned["weights"]]
    everyone = [[w for w, i in zip(row, placed, strict=True) if i] for row in learned["weights"]]
    return [sum(a) / sum(b) for a, b in zip(mine, everyone, strict=True)]


def draw_weights(study: Study, path: Path) -> None:
    """The weight that each term of a search ends with, relative to where it began: mean and every seed."""
    plt = _pyplot()
    from matplotlib.ticker import NullLocator

    found = {k: rows for k, rows in study.found().items() if "learned" in rows[min(rows)]}
    figure, axes = plt.subplots(1, len(found), figsize=(5.5 * len(found), 5), squeeze=False, layout="constrained")
    for axis, (name, rows) in zip(axes[0], found.items(), strict=True):
        keys = next(iter(rows.values()))["learned"]["keys"]
        gains = [
            [e / b for b, e in zip(*(r["learned"]["weights"][n] for n in (0, -1)), strict=True)] for r in rows.values()
        ]
        places = list(range(len(keys)))
        axis.barh(places, [statistics.geometric_mean(x) for x in zip(*gains, strict=True)], color="0.8")
        for gain in gains:
            axis.plot(gain, places, "o", markersize=3, color="C0")
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_yticks(places, keys, fontsize=7)
        axis.invert_yaxis()
        axis.set(xscale="log", xlabel="last weight / first weight", title=f"{name}, {len(rows)} seeds")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xticks([0.1, 0.3, 1, 3], ["0.1", "0.3", "1", "3"])
    _save(figure, path)


FIGURES = {"bars": draw_bars, "budgets": draw_budgets, "levels": draw_levels, "weights": draw_weights}


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    if figure.get_layout_engine() is None:
        figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


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
    description = describe(config if searching else config.for_retrain(), searching)
    return (description.steps or 0) * description.step_macs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--jobs", type=int, default=max(1, os.cpu_count() or 1))
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results", help="folder of rows and tables")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="LABEL", help="these runs and searches, of those that are missing")
    parser.add_argument("--repeat", nargs=2, metavar=("LABEL", "SEED"), help="run a row once more and compare")
    options = parser.parse_args()
    study = Study(options.study, options.results)
    if options.repeat:
        sys.exit(not study.repeat(options.repeat[0], int(options.repeat[1])))
    missing = [job for job in study.missing() if not options.only or job[0] in options.only]
    if options.dry_run:
        total = 0.0
        for label, seed in missing:
            macs = cost(study, label)
            total += macs
            print(f"{macs / 1e12:8.1f} TMAC   {shlex.join(study.command(label, seed))}")
        hours = total / 40e9 / 3600
        print(f"{total / 1e12:8.1f} TMAC   in {len(missing)} runs; at 40 GMAC/s a core about {hours:.1f} core hours")
        return
    if not options.render:
        for group in (study.searches, study.runs):  # the schedules have to be there before the retrains
            with ThreadPoolExecutor(options.jobs) as pool:
                list(pool.map(lambda job: study.run(*job), [job for job in missing if job[0] in group]))
    if study.rows():
        text = study.render()
        write_atomically(text, study.results.with_suffix(".md"))
        print(text)
        for page in sorted((ROOT / "docs").glob("*.md")):
            splice(page, study.name, text)


if __name__ == "__main__":
    main()
