"""What the folders of runs, and the rows of studies, say of themselves. Only files are read: no code that a config names runs."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from distpro.config.flat import flat
from distpro.data.statistics import stored_facts
from distpro.schedule import Schedule
from distpro.train.tracking import read_metrics
from pathways.registry import UserError

NOT_METRICS = ("epoch", "step", "seconds", "trials", "spent", "budget", "search_seconds", "loss", "calibrated_loss")
SAME = ("seed", "name", "device", "tracking.", "retrain.schedule", "threads", "data.num_classes", "data.image_shape")
"""Keys of a config, or their beginnings, that may differ between runs of one group."""
AFTER_A_SEARCH = (*SAME, "retrain.", "tune.")
"""Those of a search's config that do not make its schedule another one."""

ITS_SEARCH = "its search: "


@dataclass(frozen=True)
class Run:
    """One run, or one row of a study.

    Attributes:
        label: what the page calls it.
        kind: search, tuning, retrain or training; of a row: "row".
        settings: its config, with dotted keys.
        metrics: final ones; empty where it has not ended.
        rows: of its metrics.jsonl.
        schedule: learned (of a search) or replayed; None: none, or not found.
        searched: of a retrain that replays a schedule: the settings of the search behind it; None: unknown.
        search_seconds: of a retrain: what the search of its schedule took; None: unknown.
        learned: of a row: ``keys`` and ``weights`` over time of a search.
        trials: of a tuning.
    """

    label: str
    kind: str
    seed: int | None = None
    folder: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    rows: Sequence[Mapping[str, float]] = ()
    schedule: Schedule | None = None
    searched: Mapping[str, Any] | None = None
    learned: Mapping[str, Any] | None = None
    trials: Sequence[Mapping[str, Any]] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    commands: Sequence[str] = ()
    search_seconds: float | None = None
    notes: Sequence[str] = ()

    @property
    def tunes(self) -> bool:
        """Whether its metrics are its best trial's, on validation data."""
        return self.kind == "tuning" or any(command.startswith("distpro tune ") for command in self.commands)

    @property
    def headline(self) -> str | None:
        """The main metric: that whose best value a training writes down as well; else the first."""
        names = [name for name in self.metrics if name not in NOT_METRICS]
        return next((name for name in names if f"best_{name}" in self.metrics), next(iter(names), None))


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone; retrains also in their schedules, where these are of searches that do."""

    label: str
    runs: Sequence[Run]

    def values(self, metric: str) -> dict[int, float]:
        """A metric of the test part, or what a run has cost, by seed, of the runs that have it."""
        found = ((n, run) for n, run in enumerate(self.runs) if metric in NOT_METRICS or not run.tunes)
        return {n if run.seed is None else run.seed: run.metrics[metric] for n, run in found if metric in run.metrics}


def gather(paths: Sequence[str | Path]) -> list[Run]:
    """The runs in folders, with those right inside them, and the rows in .jsonl files. Raises UserError where there are none."""
    runs: list[Run] = []
    for path in map(Path, paths):
        if path.suffix == ".jsonl" and path.is_file():
            runs += _rows(path)
        elif path.suffix == ".pt" and path.is_file():
            runs.append(Run(str(path), "search", schedule=Schedule.load(path)))
        elif path.is_dir():
            inner = [p for p in sorted(path.iterdir()) if (p / "config.yaml").is_file() and p.name != "trials"]
            folders = [p for p in (path, *inner) if (p / "config.yaml").is_file()]
            if not folders:
                raise UserError(f"{path}: is no run's folder: it has no config.yaml, nor has a folder in it")
            runs += [_run(p) for p in folders]
        else:
            raise UserError(f"{path}: no such run (a folder), schedule (.pt) or rows of a study (.jsonl)")
    unique = {run.folder.resolve() if run.folder else n: run for n, run in enumerate(runs)}
    return list(unique.values())


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """Runs that differ in their seed alone together, in the order given. Retrains of schedules of which nobody knows how they
    were searched are together where they replay one file."""
    found: dict[Any, list[Run]] = {}
    for run in runs:
        own = {k: v for k, v in run.settings.items() if not k.startswith(SAME)}
        if _replays(run):
            own["its search"] = _file_of(run) if run.searched is None else run.searched
        key: tuple[Any, ...] = (
            (run.kind, run.label) if run.kind == "row" else (run.kind, json.dumps(own, sort_keys=True, default=str))
        )
        if run.seed is None or any(run.seed == other.seed for other in found.get(key, ())):
            key = (*key, len(found))  # a repetition is no other seed
        found.setdefault(key, []).append(run)
    return [Group(_common([run.label for run in members]), members) for members in found.values()]


def differing(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """The settings that differ between groups: a value for each, None where it has none."""
    firsts = [_with_search(group.runs[0]) for group in groups]
    keys = [k for k in dict.fromkeys(k for one in firsts for k in one) if not k.startswith(SAME)]
    found = {key: [None if one.get(key) in ({}, []) else one.get(key) for one in firsts] for key in keys}
    searching = [group.runs[0].kind == "search" for group in groups]  # nobody else reads those keys

    def of_interest(key: str, values: list[Any]) -> bool:
        read = [v for v, reads in zip(values, searching, strict=True) if reads or not key.startswith("search.")]
        if key.startswith(ITS_SEARCH):
            read = [one[key] for one in firsts if key in one]
            values = read
        return any(v != read[0] for v in read)

    return {key: values for key, values in found.items() if of_interest(key, values)}


def _replays(run: Run) -> bool:
    """Whether it is a retrain that plays a schedule from a file, or a control of it."""
    plays = run.settings.get("retrain.weights") not in ("constant", "none")
    return run.kind == "retrain" and plays and run.settings.get("retrain.schedule") is not None


def _file_of(run: Run) -> str:
    """The schedule's file; of one that is not there nobody knows whether two runs mean the same: the run itself."""
    path = Path(str(run.settings["retrain.schedule"]))
    return f"file {path.resolve()}" if path.is_file() else f"run {run.label}"


def _searched(schedule: Schedule | None) -> dict[str, Any] | None:
    """The settings of the search that a schedule is of; None where it says nothing."""
    stored = None if schedule is None else schedule.meta.get("config")
    if not isinstance(stored, Mapping):
        return None
    return {k: v for k, v in flat(stored).items() if not k.startswith(AFTER_A_SEARCH)}


def _with_search(run: Run) -> dict[str, Any]:
    return {**run.settings, **{f"{ITS_SEARCH}{k}": v for k, v in (run.searched or {}).items()}}


def _common(labels: Sequence[str]) -> str:
    """What a group is called: what its labels begin with."""
    if len(set(labels)) == 1:
        return labels[0]
    return os.path.commonprefix(list(labels)).removesuffix("seed").rstrip("-_/ ,.") or labels[0]


def _run(folder: Path) -> Run:
    config = _yaml(folder / "config.yaml")
    settings, environment = flat(config), _json(folder / "environment.json")
    result = _json(folder / "result.json")
    trials = _lines(folder / "trials.jsonl") if (folder / "leaderboard.md").is_file() else []
    weights = settings.get("retrain.weights")
    kind = (
        "tuning"
        if trials
        else "search"
        if (folder / "alpha.pt").is_file()
        else "training"
        if weights == "none"
        else "retrain"
    )
    notes = [] if result else [f"{folder} has not ended: its numbers are those so far"]
    notes += [f"{folder}: {said}" for said in _warnings(folder / "log.txt")]
    schedule = None
    path: Any = folder / "alpha.pt" if kind == "search" else settings.get("retrain.schedule")
    if path is not None and kind in ("search", "retrain") and weights != "constant":
        if Path(path).is_file():
            schedule = Schedule.load(path)
        else:
            notes.append(f"the schedule {path}, which runs replay, is not found from here")
    searched = (
        _json(Path(path).parent / "result.json").get("seconds") if schedule is not None and kind == "retrain" else None
    )
    rows = read_metrics(folder)
    metrics = {
        k: v for k, v in (result or _last(rows)).items() if isinstance(v, (int, float)) and not isinstance(v, bool)
    }
    return Run(
        label=str(folder),
        kind=kind,
        seed=settings.get("seed"),
        folder=folder,
        settings=settings,
        metrics=metrics,
        rows=rows,
        schedule=schedule,
        searched=_searched(schedule) if kind == "retrain" else None,
        trials=trials,
        environment=environment,
        facts=stored_facts(folder),
        commands=_commands(environment, folder, kind),
        search_seconds=searched if finite(searched) else None,
        notes=notes,
    )


def _warnings(path: Path) -> list[str]:
    """What the run warned of, once each."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    said = [line.partition(" WARNING ")[2] for line in lines]
    return list(dict.fromkeys(filter(None, said)))[:5]


def _last(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The last evaluation of a run that has not ended."""
    tested = [row for row in rows if any(name.startswith("test/") for name in row)]
    return {name.removeprefix("test/"): value for name, value in tested[-1].items()} if tested else {}


def _rows(path: Path) -> list[Run]:
    runs = []
    for row in _lines(path):
        if not isinstance(row, dict) or "label" not in row:
            raise UserError(f"{path}: is no study's results: a row has a label, a seed and metrics")
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        runs.append(
            Run(
                label=str(row["label"]),
                kind="row",
                seed=row.get("seed"),
                metrics={k: v for k, v in numbers.items() if k not in ("seed", "threads")},
                learned=row.get("learned"),
                environment={k: row[k] for k in ("packages", "device", "threads", "revision") if k in row},
                commands=[str(row["command"])] if "command" in row else [],
            )
        )
    if not runs:
        raise UserError(f"{path}: holds no rows")
    return runs


def _commands(environment: Mapping[str, Any], folder: Path, kind: str) -> list[str]:
    """The command that was given, and one that repeats this run from its resolved config."""
    found, said = [], [str(word) for word in environment.get("command", [])]
    if said:
        ours = Path(said[0]).name in ("distpro", "__main__.py")
        found.append(shlex.join(["distpro", *said[1:]] if ours else ["python", *said]))
    verb = {"search": "search", "tuning": "tune"}.get(kind, "retrain")
    return [*found, shlex.join(["distpro", verb, str(folder / "config.yaml"), "--out", f"{folder}-repeated"])]


def _yaml(path: Path) -> Any:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable ({str(error).splitlines()[0]})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: is no run's config")
    return found


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable ({error})") from None
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> list[Any]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(f"{path}: not readable ({error})") from None


def finite(value: Any) -> bool:
    """Whether a value is a number that can be drawn."""
    return isinstance(value, (int, float)) and math.isfinite(value)
