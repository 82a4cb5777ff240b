"""Candidates against each other on validation data, under one budget: what one does without a schedule search, and its rival.

leaderboard.md   all trials, the best first     trials.jsonl     one row a trial, in the order of their ends
best.yaml        the best, to be retrained      best.pt          the schedule that it plays, if it plays one
tune.png         what the budget has bought     result.json      the best one's metrics, and what all has cost
trials.journal   Optuna's, for --resume         space.pt         the search space as it was measured
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distpro import build
from distpro.build.given import Given
from distpro.config.schema import Config
from distpro.console import note
from distpro.files import write_atomically
from distpro.report.tuning import leaderboard, save_tuning_figure, values_text
from distpro.runs.candidates import Candidate, buildable, candidates_of, identity_of, measured_space, training_part
from distpro.runs.folder import as_yaml, check_data, open_folder, record, recorded
from distpro.runs.ledger import Ledger, Turn, require_optuna
from distpro.runs.trials import Pruned, Trials, judged, words_of
from distpro.runs.workers import run_workers
from distpro.schedule import Schedule
from distpro.train import distributed
from distpro.train.trainer import Interrupted
from pathways.registry import UserError

BY = ("calibrated_loss", "loss")  # what trials are judged by, the first of these that they have


@dataclass(frozen=True)
class Tuned:
    """What a tuning came to.

    Attributes:
        metrics: the best trial's, on the validation part.
        config, schedule: of a retrain with what the best trial had, on the whole training part.
        rows: the trials, see trials.jsonl.
        headline: name of the task's main metric.
        folder: None if nothing was kept.
    """

    metrics: dict[str, float]
    config: Config
    schedule: Schedule | None
    rows: list[dict[str, Any]]
    headline: str
    folder: Path | None


@dataclass
class Request:
    """All that a worker has to know; it can be handed to another process.

    Attributes:
        config: checked, with its precision settled.
        learned: what `distpro retrain` makes of config and schedule, for each control.
        schedule: the learned one, or None.
    """

    config: Config
    learned: Mapping[str, Config]
    schedule: Schedule | None
    given: Given


def run_tune(request: Request, out: str | Path | None, resume: bool, workers: int) -> Tuned:
    """Tune, write everything to the folder, and return the best."""
    require_optuna()
    config = request.config
    if distributed.world_size() > 1:
        raise UserError("tune: a trial runs in one process; --workers N runs N of them side by side")
    if workers < 1:
        raise UserError(f"workers is {workers}: expected 1 or more")
    if not config.has_teacher:
        raise UserError("tune: the candidates need a teacher")
    if config.stages:
        raise UserError("stages: tune compares trainings of one stage")
    with ExitStack() as stack:
        if out is None:
            if resume:
                raise UserError("resume needs the run's folder")
            out = stack.enter_context(tempfile.TemporaryDirectory())
            tuning = Tuning(request, Path(out), resume)
            tuning.run(workers)
            return replace(tuning.conclude(), folder=None)
        known = _with_budget_of(config, Path(out)) if resume else config
        stack.enter_context(open_folder(out, known, resume, shared=True, kind="tuning"))
        tuning = Tuning(request, Path(out), resume)
        tuning.run(workers)
        return tuning.conclude()


class Tuning:
    """One worker's view of a tuning in a folder.

    Args:
        resume: whether the folder holds one that has begun.
    """

    def __init__(self, request: Request, folder: Path, resume: bool):
        self.request, self.folder, self.config = request, folder, request.config
        self.data = build.build_data(build.as_stored(self.config, folder) if resume else self.config, request.given)
        self.task = build.build_task(self.config, request.given)
        self.epochs = self.config.tune.epochs or self.config.training.epochs
        self.clock = training_part(self._short(self.config), self.data)[1]
        self.last = math.ceil(
            self.clock.total_steps / self.clock.steps_per_epoch
        )  # a step may end it before its epochs
        self.trials = Trials(self.config, self.data, request.given, folder / "trials")
        self.candidates: dict[str, Candidate] = {}
        if resume:
            check_data(folder, self.data.facts)
            self.ledger = Ledger(folder, self.config, self.last)
            if self.ledger.spent() > self.config.tune.trials:
                raise UserError(
                    f"tune.trials is {self.config.tune.trials}, but {self.ledger.spent():.3g} trainings are spent: it goes on with more"
                )
            space = Schedule.load(folder / "space.pt") if (folder / "space.pt").is_file() else None
            known = {candidate.name: candidate for candidate in self._candidates(space)}
            self.candidates = {name: known[name] for name in self.ledger.names}
        else:
            self._begin()

    def _candidates(self, space: Schedule | None) -> list[Candidate]:
        return candidates_of(self.config, space, self.request.learned, self.request.schedule)

    def _begin(self) -> None:
        """Measure, look whether all can be built, and write down what is to be tried; the config last, which says that it has
        begun."""
        families = set(self.config.tune.families)
        space = measured_space(self.config, self.data, self.request.given) if {"equal", "static"} & families else None
        found, why_not = buildable(self._candidates(space), self.data, self.request.given)
        if not found:
            raise UserError("tune: there is no candidate: " + ("; ".join(why_not.values()) or "see tune.families"))
        for name, reason in why_not.items():
            note(f"candidate '{name}' is left out: {reason}")
        self.candidates = {candidate.name: candidate for candidate in found}
        check_trials(self.config, list(self.candidates))
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "trials.journal").unlink(missing_ok=True)  # of one that was stopped before it had begun
        self.ledger = Ledger(self.folder, self.config, self.last)
        self.ledger.begin(found)
        if space is not None:
            space.save(self.folder / "space.pt")
        (self.folder / "trials").mkdir(exist_ok=True)
        record(self.config, self.folder, self.data.facts)

    def run(self, workers: int) -> None:
        """Train until the budget is spent, in this process or in several others."""
        if workers == 1:
            self.work()
        else:
            with _stopping(self.ledger):
                failed = run_workers(work_alone, (self.request, self.folder), workers)
            if failed and (self.ledger.running() or self.ledger.spent() + 1 <= self.config.tune.trials):
                raise UserError(
                    f"{len(failed)} of {workers} workers have failed, with status {failed[0]}; --resume goes on"
                )

    def work(self) -> None:
        """Train what is to be trained, as long as there is any."""
        with self.ledger.at_work(), _stopping(self.ledger):
            while (turn := self.ledger.take(self.candidates)) is not None:
                self._train(turn)

    def _short(self, config: Config) -> Config:
        """A trial's config: the teacher's answers are not kept, for candidates read different ones."""
        training = config.training.model_copy(update={"epochs": self.epochs})
        return config.model_copy(update={"training": training, "cache": None})

    def _train(self, turn: Turn) -> None:
        config, schedule = self.candidates[turn.candidate].at(turn.values)
        by = self.config.tune.by

        def watch(row: dict[str, float]) -> None:
            epoch = int(row["epoch"])
            if epoch < self.last and self.ledger.falls_behind(turn, epoch, judged(row, self.task, by)):
                raise Pruned

        metrics = self.ledger.twin(turn, identity_of(config, schedule, self.clock.total_steps))
        cost = 0.0
        if metrics is None:
            prunes = self.config.tune.pruner == "hyperband"
            options: dict[str, Any] = {"watch": watch, "every": self.ledger.least} if prunes else {}
            metrics = self.trials.run(turn.label, schedule, self._short(config), **options)
            cost = metrics["step"] / self.clock.total_steps
        pruned = "epoch" in metrics and metrics["step"] < self.clock.total_steps
        self.ledger.end(turn, metrics, judged(metrics, self.task, by), cost, pruned)
        values = f" ({values_text(turn.values, 3)})" if turn.values else ""
        ended = f", pruned after {metrics['epoch']:g} epochs" if pruned else ""
        note(
            f"{self.ledger.spent():.4g} of {self.config.tune.trials} trainings: {turn.label}{values}: "
            f"{words_of(metrics) or 'diverged'}{ended}"
        )
        self._write()

    def _write(self) -> list[dict[str, Any]]:
        """The trials so far, for who looks meanwhile."""
        rows = self.ledger.rows()
        for row in rows:
            row["epochs"] = row.pop("epoch", row["step"] / self.clock.steps_per_epoch)
        write_atomically("".join(json.dumps(row) + "\n" for row in rows), self.folder / "trials.jsonl")
        write_atomically(leaderboard(rows, self._summary(rows)), self.folder / "leaderboard.md")
        return rows

    def _summary(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        schedule = self.request.schedule
        seconds = None if schedule is None or schedule.path is None else searched_seconds(Path(schedule.path).parent)
        return {
            "budget": self.config.tune.trials,
            "spent": self.ledger.spent(),
            "epochs": self.last,
            "by": next(
                (by for by in BY if self.config.tune.by == "loss" and any(by in row for row in rows)), "headline"
            ),
            "headline": self.task.headline,
            "schedule": None if schedule is None else schedule.path or "handed over",
            "search_seconds": seconds,
            "running": self.ledger.running(),
        }

    def conclude(self) -> Tuned:
        """Write what the trials came to. Raises UserError where all of them have diverged."""
        rows = self._write()
        summary = self._summary(rows)
        complete = [row for row in rows if row["state"] == "complete"]
        if not complete:
            raise UserError(
                f"{self.folder}: no trial has come to an end ({len(rows)} diverged): lower the learning rate?"
            )
        best = min(complete, key=lambda row: row["judged"])
        config, schedule = self.candidates[best["candidate"]].at(best["values"])
        if schedule is not None:
            if best["candidate"] in ("equal", "static"):
                meant = config.training
                schedule = replace(schedule, strength=meant.distill_weight, warmup=meant.distill_warmup or 0.0)
            schedule.save(self.folder / "best.pt")
            played = config.retrain.model_copy(update={"schedule": str((self.folder / "best.pt").resolve())})
            write_atomically(as_yaml(config.model_copy(update={"retrain": played})), self.folder / "best.yaml")
        else:
            write_atomically(as_yaml(config), self.folder / "best.yaml")
        save_tuning_figure(rows, summary, self.folder / "tune.png")
        numbers = ("judged", "cost", "step", "seconds", "epochs", "trial")
        metrics = {k: v for k, v in best.items() if isinstance(v, (int, float)) and k not in numbers}
        result = {
            **metrics,
            "seconds": sum(row["seconds"] for row in rows if row["cost"]),
            "trials": len(rows),
            **{key: summary[key] for key in ("spent", "budget", "search_seconds")},
            "best": {key: best[key] for key in ("candidate", "values", "judged", "trial")},
        }
        write_atomically(json.dumps(result, indent=1) + "\n", self.folder / "result.json")
        return Tuned(metrics, config, schedule, rows, self.task.headline, self.folder)


class Stopped(Interrupted):
    """A tuning was told to stop."""

    def __init__(self, signal_number: int, spent: float, budget: int):
        Exception.__init__(self, f"stopped after {spent:.4g} of {budget} trainings; --resume goes on from here")
        self.signal_number = signal_number


@contextmanager
def _stopping(ledger: Ledger) -> Iterator[None]:
    """Say how much is done, where a training says that it was told to stop."""
    try:
        yield
    except Interrupted as error:
        raise Stopped(error.signal_number, ledger.spent(), ledger.config.tune.trials) from None


def work_alone(request: Request, folder: Path) -> None:
    """What a process of its own does."""
    Tuning(request, folder, resume=True).work()


def searched_seconds(folder: Path) -> float | None:
    """What a search has cost, its own trials included, as its folder says; None where it does not."""
    file = folder / "result.json"
    if not file.is_file() or not (folder / "alpha.pt").is_file():
        return None
    seconds = json.loads(file.read_text(encoding="utf-8")).get("seconds")
    return None if seconds is None else float(seconds)


def check_trials(config: Config, candidates: Sequence[str]) -> None:
    """Raise UserError where the budget does not train each candidate once."""
    if len(candidates) > config.tune.trials:
        raise UserError(
            f"tune.trials is {config.tune.trials}, which does not train each candidate once; there are {len(candidates)}: "
            f"{'; '.join(candidates)} (fewer: tune.families, tune.methods, tune.controls)"
        )


def _with_budget_of(config: Config, folder: Path) -> Config:
    """The config with the budget that a run has begun with: it may go on with another."""
    begun = recorded(folder).get("tune", {}).get("trials", config.tune.trials)
    return config.model_copy(update={"tune": config.tune.model_copy(update={"trials": begun})})
