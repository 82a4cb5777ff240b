"""One training from its start to what it leaves in its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distpro.build.device import note_emulation
from distpro.config.flat import flat, setting_text
from distpro.config.schema import Config
from distpro.console import logged, note, warn
from distpro.files import save_atomically, write_atomically
from distpro.objective import Objective, Term
from distpro.report.plots import heatmap_figure, scalars_figure, schedule_figure
from distpro.runs.folder import as_yaml, check_data, record
from distpro.runs.notes import at_the_end, at_the_start, check_classes, sums_of
from distpro.search.searcher import Searcher
from distpro.train import distributed
from distpro.train.tracking import Tracker
from distpro.train.trainer import Trainer

LOG_FILE = "log.txt"
UNTOLD = ("tracking.", "device", "threads", "name", "data.num_classes", "data.image_shape")


@dataclass(frozen=True)
class Result:
    """What a training came to: final ``metrics`` by name, and the run's folder (None if nothing was kept)."""

    metrics: dict[str, float]
    folder: Path | None


def save_student(objective: Objective, folder: Path, terms: bool = False) -> None:
    """What a finished training leaves: the student, and the terms where the student needs them or ``terms`` says so."""
    if not distributed.is_main():
        return
    if terms or any(term.deploys for term in objective.terms):
        save_atomically(term_states(objective), folder / "terms.pt")
    save_atomically(objective.student.model.state_dict(), folder / "student.pt")


def term_states(objective: Objective) -> dict[str, dict[str, Any]]:
    return {term.key: term.loss.state_dict() for term in objective.terms if isinstance(term, Term)}


def run_training(
    trainer: Trainer,
    config: Config,
    resume: bool,
    searcher: Searcher | None,
    ended: Callable[[Path], None] = lambda folder: None,
    facts: Mapping[str, Any] | None = None,
    conclude: Callable[[dict[str, float]], dict[str, float]] = lambda metrics: metrics,
) -> dict[str, float]:
    """Train with tracking; everything that a finished run leaves in its folder but its weights. ``ended`` is called
    before the result is written, which says that the run has ended; ``conclude`` before that, in every process, also
    without a folder: from the training's metrics to the run's. ``facts``: what states the data; a resumed run must have the same."""
    if resume and trainer.folder is not None and facts is not None:
        check_data(trainer.folder, facts)
    note_emulation(config)
    if resume:
        trainer.resume()
    if trainer.folder is not None and trainer.why_not:
        note(f"a resumed run will not come to the same numbers: {trainer.why_not}")
    if trainer.objective.cache is not None:
        note(trainer.objective.cache.describe())
    if not resume:
        check_classes(trainer, facts)
    folder = trainer.folder if distributed.is_main() else None
    if folder is not None and not resume:
        record(config, folder, facts)
    with nullcontext() if folder is None else logged(folder / LOG_FILE, anew=not resume):
        if not resume and distributed.is_main():
            for said in at_the_start(trainer, facts, config):
                warn(said)
        if folder is None:
            return conclude(_fit(trainer))
        metrics = _tracked(trainer, config, resume, searcher, conclude)
        ended(folder)
        write_atomically(json.dumps(metrics, indent=1) + "\n", folder / "result.json")
    return metrics


def _tracked(
    trainer: Trainer,
    config: Config,
    resume: bool,
    searcher: Searcher | None,
    conclude: Callable[[dict[str, float]], dict[str, float]],
) -> dict[str, float]:
    assert trainer.folder is not None
    first = trainer.step + 1 if resume else None
    watched = config.tracking
    with Tracker(
        trainer.folder,
        resume_step=first,
        resume_rows=trainer.rows,
        tensorboard=watched.tensorboard,
        sinks=watched.sinks,
    ) as tracker:
        trainer.tracker = tracker
        if not resume:
            tracker.text("config", f"```yaml\n{as_yaml(config)}\n```")
            if searcher is not None:
                tracker.alpha_layout(
                    [e.key for e in searcher.entries], [e.level or (0, 0, 0) for e in searcher.entries]
                )
        metrics = conclude(_fit(trainer))
        if searcher is not None:
            learned = searcher.schedule(trainer.steps_per_epoch, {})
            tracker.figure("alpha/processes", schedule_figure(learned), trainer.step)
            tracker.figure("alpha/heatmap", heatmap_figure(learned), trainer.step)
            if learned.scalars:
                tracker.figure("alpha/scalars", scalars_figure(learned), trainer.step)
        headline = trainer.task.headline
        tracker.summary(told_apart(config), {name: value for name, value in metrics.items() if name == headline})
    return metrics


def told_apart(config: Config) -> dict[str, Any]:
    """The settings in which runs differ: those that are no defaults, as text where they are lists; how a run is watched is none."""
    usual = flat(Config(student=config.student.model_copy(update={"model": ""})).model_dump())
    own = {key: value for key, value in flat(config.model_dump()).items() if value != usual.get(key)}
    return {key: setting_text(value) for key, value in own.items() if not key.startswith(UNTOLD)}


def _fit(trainer: Trainer) -> dict[str, float]:
    before = [] if trainer.step else sums_of(trainer)
    metrics = trainer.fit()
    if distributed.is_main():
        for said in at_the_end(trainer, before):
            warn(said)
    return metrics
