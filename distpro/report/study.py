"""A study's file: its runs, their commands, and the rows that are there.

    config: search_configs/x.yaml       # pair, data, search and training
    metric: accuracy                    # what tables show, in percent or its own unit; absent: accuracy, `distpro compare`: the task's
    seeds: [0, 1, 2]
    baseline: equal                     # label, or list of them, that the others are compared with, seed by seed
    set: {threads: 1}                   # overrides of every run
    searches:                           # overrides of the searches by name, each run once per seed; absent: no search
      search: {}
    epochs: [2, 4, 8]                   # every run at each of these budgets; absent: at the config's
    shared: {"KD, 2 epochs": other/KD}  # rows that another study has, the label here first
    runs:
      KD: {pathways: null, terms: [{loss: kd, weight: 1}], retrain.weights: constant}
      searched: {search: search}        # which search's schedule it replays; may be left out if there is one search only
      foreign: {search: other/search}   # or another study's: so a schedule is taken to another pair or data

A search or a run may have a `config:` of its own. A search that says `tune: {...}` is a `distpro tune`, and a run of it
trains the `best.yaml` that it has written.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from distpro.config.reading import read_yaml
from distpro.report.study_file import check_content, check_names
from pathways.registry import UserError, nearest


def at_budget(label: str, epochs: int) -> str:
    """The label of a run at one of a study's budgets."""
    return f"{label}, {epochs} epochs"


def _folder(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "_", label)


class Search(NamedTuple):
    """A search of a study, which runs of it or of another study replay."""

    study: StudyFile
    label: str

    def schedule(self, seed: int) -> Path:
        return self.study.out(self.label, seed) / "alpha.pt"

    def ended(self, seed: int) -> bool:
        return self.study.out(self.label, seed).joinpath("result.json").exists()

    @property
    def tunes(self) -> bool:
        """Whether it is a `distpro tune`, which finds no schedule but a config."""
        return "tune" in self.study.searches.get(self.label, {})


class StudyFile:
    """The runs of a study file, their commands, and the rows that are there.

    Args:
        path: the file.
        results: folder of the rows, ``<name>.jsonl``.
        root: folder in which commands run; configs are relative to it, and runs go to ``runs/<name>`` in it.

    Raises UserError for a file that is none.
    """

    def __init__(self, path: Path, results: Path, root: Path):
        self.name, self.path, self.root = path.stem, path, root
        self.content: dict[str, Any] = read_yaml(path)
        check_content(path, self.content)
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
            raise UserError(f"{path}: name of a search and of a run: {', '.join(both)}")
        check_names(path, self.content, self.searches, {k: _folder(k) for k in (*self.searches, *self.runs)})
        self.results = results / f"{self.name}.jsonl"
        self.folder = root / "runs" / self.name
        self.metric = str(self.content.get("metric", "accuracy"))

    def own_rows(self) -> list[dict[str, Any]]:
        """All rows of its results file."""
        lines = self.results.read_text().splitlines() if self.results.exists() else []
        return [json.loads(line) for line in lines]

    def rows(self) -> list[dict[str, Any]]:
        """Rows of this study's labels and seeds: of its results file, and those that it shares with other studies."""
        rows = self.own_rows()
        for label, source in self.content.get("shared", {}).items():
            study, _, theirs = source.partition("/")
            rows += [{**r, "label": label} for r in self.other(study).rows() if r["label"] == theirs]
        known = self.runs.keys() | self.searches.keys()
        return [r for r in rows if r["label"] in known and r["seed"] in self.seeds]

    def other(self, name: str) -> StudyFile:
        """The study in the file beside this one."""
        return type(self)(self.path.with_name(f"{name}.yaml"), self.results.parent, self.root)

    def config(self, label: str) -> str:
        return str({**self.runs, **self.searches}[label].get("config", self.content["config"]))

    def overrides(self, label: str, seed: int) -> list[str]:
        """``key=value`` of a run or search."""
        merged = {**self.content.get("set", {}), **{**self.runs, **self.searches}[label], "seed": seed}
        return [f"{key}={json.dumps(value)}" for key, value in merged.items() if key not in ("config", "search")]

    def search_of(self, label: str) -> Search | None:
        """The search that a run replays. None: it needs no search, or is one."""
        if label in self.searches:
            return None
        own = {**self.content.get("set", {}), **self.runs[label]}
        if own.get("retrain.weights", "searched") in ("constant", "none") and "search" not in own:
            return None
        search = own.get("search", next(iter(self.searches), ""))
        if not search:
            return None
        study, _, name = search.partition("/")
        if not name or search in self.searches:  # names may have a / in them
            return Search(self, search)
        other = self.other(study)
        if name not in other.searches:
            raise UserError(
                f"{self.path}: runs: {label}: {other.path} has no search '{name}'{nearest(name, other.searches)}"
            )
        return Search(other, name)

    def out(self, label: str, seed: int) -> Path:
        return self.folder / f"{_folder(label)}-{seed}"

    def command(self, label: str, seed: int) -> list[str]:
        """The command that makes a row."""
        search = self.search_of(label)
        config, options = self.config(label), []
        if Search(self, label).tunes:
            program = ["distpro", "tune"]
        elif label in self.searches:
            program = ["distpro", "search"]
        else:
            program = ["distpro", "retrain"]
        if search and search.tunes:
            config = str(search.schedule(seed).with_name("best.yaml").relative_to(self.root))
        elif search:
            options = ["--schedule", str(search.schedule(seed).relative_to(self.root))]
        out = ["--out", str(self.out(label, seed).relative_to(self.root))]
        return [*program, config, *options, *self.overrides(label, seed), *out]

    def missing(self) -> list[tuple[str, int]]:
        """Runs without a row, searches first, seed by seed: what is there when time is up is comparable."""
        done = {(r["label"], r["seed"]) for r in self.rows()}
        groups = (self.searches, self.runs)
        return [(k, seed) for group in groups for seed in self.seeds for k in group if (k, seed) not in done]

    def with_searches(self, labels: list[str]) -> set[str]:
        """Labels, and those of the searches of this study that they replay."""
        if unknown := set(labels) - self.runs.keys() - self.searches.keys():
            label = min(unknown)
            raise UserError(f"{self.path}: no run or search '{label}'{nearest(label, [*self.searches, *self.runs])}")
        searches = [search for label in labels if (search := self.search_of(label)) and search.study is self]
        return {*labels, *(search.label for search in searches)}

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

    def budgets(self, base: str) -> dict[int, list[float]]:
        """Accuracies of a run's seeds by epochs, where there are any."""
        found = self.found()
        rows = {n: found.get(at_budget(base, n), {}).values() for n in sorted(self.content["epochs"])}
        return {n: [r[self.metric] for r in there] for n, there in rows.items() if there}
