"""`distpro compare`: run what a study's file asks for, each row in a process of its own, and keep a row of each."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from distpro import build
from distpro.build.data import example_of
from distpro.build.models import build_network
from distpro.config.reading import default_space, for_retrain, of_retrain, read_config
from distpro.config.schema import Config
from distpro.report.cost import describe
from distpro.report.page import write_page
from distpro.report.study import Search, StudyFile
from distpro.schedule import Schedule
from distpro.task import ask
from pathways.registry import UserError, nearest


class RunsFailed(UserError):
    """Of a study whose other runs have ended. ``status``: 2 where bad input was the cause of all failures, else 1."""

    def __init__(self, study: Study, page: str):
        named = [f"{label}, seed {seed}" for label, seed in study.failed]
        more = f"; and {len(named) - NAMED} more" if len(named) > NAMED else ""
        super().__init__(
            f"{study.name}: {len(named)} failed ({'; '.join(named[:NAMED])}{more}): the logs are in {study.folder}{page}"
        )
        self.status = 2 if set(study.failed.values()) == {2} else 1


class Study(StudyFile):
    """A study that can be run.

    Attributes:
        failed: by label and seed, the status that a run ended with, or that of the search without which it could not begin.
    """

    def __init__(self, path: Path, results: Path, root: Path):
        super().__init__(path, results, root)
        self.failed: dict[tuple[str, int], int] = {}

    def revision(self, described: str) -> str:
        """What a row says of the code's revision."""
        return described

    def execute(self, label: str, seed: int, out: Path) -> dict[str, Any] | None:
        """Run one row in the folder ``out``, resuming where an earlier try has left a checkpoint. None: it failed."""
        program, *command = self.command(label, seed)
        given = str(self.out(label, seed).relative_to(self.root))
        command = [str(out.relative_to(self.root)) if word == given else word for word in command]
        run = [sys.executable, "-m", "distpro.cli"] if program == "distpro" else [sys.executable]
        begun = (out / "checkpoint.pt").exists() or ((out / "trials").is_dir() and (out / "config.yaml").exists())
        resume = ["--resume"] if begun else []
        if not resume and out.exists():
            shutil.rmtree(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out.parent / f"{out.name}.log", "a") as log:
            status = subprocess.run(
                [*run, *command, *resume],
                cwd=self.root,
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        if status:
            print(f"{self.name}: {label}, seed {seed} ended with status {status}; see {log.name}", flush=True)
            self.failed[label, seed] = status
            return None
        environment = json.loads((out / "environment.json").read_text())
        row = {
            "label": label,
            "seed": seed,
            **json.loads((out / "result.json").read_text()),
            "command": shlex.join(self.command(label, seed)),
            "packages": environment["packages"],
            "revision": self.revision(environment["revision"]),
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
            self.failed[label, seed] = self.failed.get((search.label, seed), 1)
            return
        row = self.execute(label, seed, self.out(label, seed))
        if row is None:
            return
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with open(self.results, "a") as file:
            file.write(json.dumps(row) + "\n")
        (self.out(label, seed) / "checkpoint.pt").unlink(missing_ok=True)
        check_metric(self, row)
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


POINTS = 25
NAMED = 8  # failed runs in a message


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
    said = study.overrides(label, 0)
    said = said if searching or tunes else of_retrain(said)
    config = read_config(study.root / study.config(label), said, space=default_space)
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


def compare(path: str | Path, out: str | Path | None = None, jobs: int = 1, only: list[str] | None = None) -> Path:
    """Run the rows of a study that are missing and write a page about all of them.

    Args:
        path: the study's file, see `distpro.report.study`; what it names is relative to the current folder.
        out: folder of the rows, ``<name>.jsonl``, and of the page; default: ``runs/<name>``, where the runs are.
        jobs: runs side by side.
        only: labels of runs; their searches come along.

    Returns the page's path. Raises UserError for bad input, and where runs have failed, after the others and the page.
    """
    study = open_study(path, out)
    study.run_all(missing(study, only), jobs)
    if not study.rows():
        raise RunsFailed(study, "")
    base = study.content.get("baseline")
    first = str(base[0] if isinstance(base, list) and base else base)
    labels = {row["label"] for row in study.rows()}
    page = write_page(
        [study.results], study.results.with_suffix(".html"), study.name, first if first in labels else None
    )
    if study.failed:
        raise RunsFailed(study, f", those that have ended in {page}")
    return page


def open_study(path: str | Path, out: str | Path | None = None) -> Study:
    """The study in a file, with its rows in ``out``. Raises UserError for rows that are not its own, and for a metric that no run
    gives."""
    path, here = Path(path), Path.cwd()
    study = Study(path, here / "runs" / path.stem if out is None else Path(out), here)
    check_configs(study)
    check_rows(study)
    configs = {study.config(label): label for label in reversed([*study.runs])}
    for n, label in enumerate(reversed(configs.values())):
        config = for_retrain(read_config(study.root / study.config(label), study.overrides(label, study.seeds[0])))
        if n == 0 and "metric" not in study.content:
            study.metric = build.build_task(config).headline
        known = _metrics_of(config, study.metric)
        if known is not None:
            check_metric(study, known)
    return study


def check_configs(study: StudyFile) -> None:
    """Raise UserError where a run could not begin with the config that its overrides make."""
    for label in (*study.searches, *study.runs):
        try:
            build.check_names(
                read_config(
                    study.root / study.config(label), study.overrides(label, study.seeds[0]), space=default_space
                )
            )
        except UserError as error:
            raise UserError(f"{study.path}: {label}: {error}") from None


def check_rows(study: StudyFile, only: Collection[str] | None = None) -> None:
    """Raise UserError where rows, of ``only`` these labels, are not of what a study would run now: it has been edited since, or is
    another one of the same name."""
    rows = {(row["label"], row["seed"]): row for row in study.own_rows()}
    replaying: dict[str, list[str]] = {}
    for label in study.runs:
        if (search := study.search_of(label)) and search.study is study:
            replaying.setdefault(search.label, []).append(label)
    for label in [*study.searches, *study.runs]:
        for seed in study.seeds if only is None or label in only else ():
            if (row := rows.get((label, seed))) is None:
                continue
            before, now = _essence(str(row.get("command", ""))), _essence(shlex.join(study.command(label, seed)))
            if before != now:
                gone, new = (
                    " ".join(w for w in a if w not in b) or "nothing" for a, b in ((before, now), (now, before))
                )
                too = f" and those of what replays it ({', '.join(replaying[label])})" if label in replaying else ""
                raise UserError(
                    f"{study.results}: the row of '{label}' with seed {seed} is of another command than {study.path} says now "
                    f"(in the row alone: {gone}; now: {new}): remove the row{too}, or give the study's file another name"
                )
            search = study.search_of(label)
            if search and search.study is study and (search.label, seed) not in rows:
                raise UserError(
                    f"{study.results}: the row of '{label}' with seed {seed} replays '{search.label}', which has no row and would be "
                    "run anew: remove that row as well"
                )
    for label, source in study.content.get("shared", {}).items():
        name, _, theirs = source.partition("/")
        if only is None or label in only:
            check_rows(study.other(name), {theirs})


def _essence(command: str) -> list[str]:
    """The words of a command from its verb on, without --out."""
    try:
        words = shlex.split(command)
    except ValueError:
        return [command]
    verb = next((n for n, word in enumerate(words) if word in ("search", "retrain", "tune")), 0)
    words = words[verb:]
    if "--out" in words:
        at = words.index("--out")
        words = words[:at] + words[at + 2 :]
    return words


def check_metric(study: StudyFile, row: Mapping[str, Any]) -> None:
    """Raise UserError where a row has no such metric."""
    if not isinstance(row.get(study.metric), (int, float)):
        names = [name for name, value in row.items() if isinstance(value, float)]
        raise UserError(
            f"{study.path}: metric: the runs give no '{study.metric}'{nearest(study.metric, names)} (there are: {', '.join(names)})"
        )


def _metrics_of(config: Config, wanted: str) -> dict[str, float] | None:
    """The metrics of a config's runs, by an evaluation of two made-up samples; None where these do not tell, or need not."""
    task = build.build_task(config)
    if wanted == task.headline or wanted.startswith(("best_", "last_", "kept_", "ema_", "validation_")):
        return None
    try:
        config = config.model_copy(update={"device": "cpu"})
        data, _ = build.blank_data(config)
        batch = example_of(config, data)
        student = build_network(config.student, task.model_arguments(data), load=False).eval()
        metrics = build.metrics_of(config, task)()
        metrics.update(ask(task, student, batch), batch)
        metrics.merge([metrics.state()])
        found = {name: float(value) for name, value in metrics.compute().items()}
    except Exception:  # whatever a metric makes of samples that are none
        return None
    return {**found, "seconds": 0.0} if task.headline in found else None


def missing(study: Study, only: list[str] | None = None) -> list[tuple[str, int]]:
    """Runs without a row: (label, seed)."""
    wanted = study.with_searches(only) if only else study.runs.keys() | study.searches.keys()
    return [job for job in study.missing() if job[0] in wanted]
