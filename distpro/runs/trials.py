"""Trainings that judge weights: on the part of the data that a search trains on, by the part that it validates on."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distpro import build
from distpro.build.data import search_parts
from distpro.build.given import Given
from distpro.config.schema import Config
from distpro.console import note
from distpro.files import remove_leftovers, write_atomically
from distpro.runs.folder import begun
from distpro.schedule import Schedule
from distpro.task import Task
from distpro.tasks import CalibratedLoss, Together
from distpro.train import distributed
from distpro.train.checkpoint import CHECKPOINT, PREVIOUS
from distpro.train.trainer import Diverged


class Pruned(Exception):
    """Raised by who watches a training that is not worth its end, see `Trials.run`."""


@dataclass
class Trials:
    """Trains a search's config with weights that are to be judged; each from its own start, all with the config's seed.

    Args:
        config, data, given: of the search.
        folder: where each trial has a folder of its own while it runs, and ``result.json`` when it has ended: it is not trained
            again then, and goes on from its checkpoint before that. None keeps nothing.
        most: how many there will be at most, for what is printed.

    Attributes:
        rows: name, what it was judged, and metrics of every trial so far, in order; of one that diverged its seconds only.
    """

    config: Config
    data: Any
    given: Given
    folder: Path | None = None
    most: int = 0

    def __post_init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.given = self.given.copied()  # before a search trains it

    def judge(self, name: str, schedule: Schedule, seed: int | None = None) -> float:
        """What is to be small of the training that plays ``schedule``, see `judged`; with the config's seed, or another."""
        metrics = self.run(name, schedule, title=f"trial {len(self.rows) + 1}", seed=seed)
        value = judged(metrics, build.build_task(self.config, self.given))
        self.rows.append({"name": name, "judged": value, **metrics})
        if distributed.is_main():
            said = words_of(metrics)
            note(f"trial {len(self.rows)} of {self.most} at most: {name}: {said or 'diverged'}")
        return value

    @property
    def seconds(self) -> float:
        """What all of them took."""
        return sum(row["seconds"] for row in self.rows)

    def run(
        self,
        name: str,
        schedule: Schedule | None = None,
        config: Config | None = None,
        watch: Callable[[dict[str, float]], None] | None = None,
        every: int | None = None,
        title: str = "",
        seed: int | None = None,
    ) -> dict[str, float]:
        """Metrics of a training at its end, with its ``step`` and ``seconds``; these two alone where it has diverged.

        Args:
            config: another training; it says itself how ``schedule`` is played, which is played as it is else.
            watch: called with the metrics after ``every`` so many epochs; it may raise `Pruned` to end the training there.
            title: what the progress line says; by default the name.
            seed: of the training, by default the config's; the parts of the data stay.
        """
        folder = None if self.folder is None else self.folder / re.sub(r"[^\w.+-]+", "_", name)
        done = None if folder is None or not (folder / "result.json").is_file() else folder / "result.json"
        if distributed.any_of(done is not None):
            if folder is not None and distributed.is_main():
                _remove_checkpoints(folder)  # it may have been killed before it could
            found: dict[str, float] = distributed.gather(
                None if done is None else json.loads(done.read_text(encoding="utf-8"))
            )[0]
            return found
        if config is None:
            config = self.config
            if schedule is not None:
                replayed = {
                    "weights": "searched",
                    "start": schedule.start,
                    "threshold": schedule.threshold,
                    "mapping": {},
                }
                config = config.model_copy(update={"retrain": config.retrain.model_copy(update=replayed)})
        evaluated = {"evaluate_every": every or config.training.epochs}
        seeded = {} if seed is None else {"seed": seed}
        checked = config.model_copy(update={"tracking": config.tracking.model_copy(update=evaluated), **seeded})
        given = self.given.copied()
        validation, train = search_parts(self.config, self.data)
        trainer = build.build_retrain(checked, self.data, schedule, folder, given=given, parts=(train, validation))
        trainer.name = title or name
        trainer.on_evaluation = watch or trainer.on_evaluation
        task, of_task = trainer.task, trainer.metrics or trainer.task.metrics
        if build.calibrates(self.config.search, task):
            trainer.metrics = lambda: Together([of_task(), CalibratedLoss(task.rows)])  # type: ignore[attr-defined]
        if folder is not None and folder.is_dir():
            remove_leftovers(folder)
        if begun(folder, True):
            trainer.resume()
        try:
            metrics = trainer.fit()
        except Pruned:
            metrics = trainer.result()
        except Diverged:
            metrics = {"step": trainer.step, "seconds": trainer.seconds}
        metrics = {k: v for k, v in metrics.items() if not k.startswith("best_")}
        if folder is not None and distributed.is_main():
            write_atomically(json.dumps(metrics, indent=1) + "\n", folder / "result.json")
            _remove_checkpoints(folder)
        return metrics


def _remove_checkpoints(folder: Path) -> None:
    for name in (CHECKPOINT, PREVIOUS):
        (folder / name).unlink(missing_ok=True)


def judged(metrics: Mapping[str, float], task: Task, by: str = "loss") -> float:
    """What is to be small: the calibrated loss, else the validation loss where the task's metrics have one, else (or ``by`` the
    ``headline``) the headline, by its sign; inf of a training that has diverged."""
    if task.headline not in metrics:
        return math.inf
    worth = metrics[task.headline] * (-1 if task.higher_is_better else 1)
    value = metrics.get("calibrated_loss", metrics.get("loss", worth)) if by == "loss" else worth
    return value if math.isfinite(value) else math.inf


def words_of(metrics: Mapping[str, float]) -> str:
    """The metrics in a line; nothing of a training that has diverged."""
    return "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if k not in ("epoch", "step", "seconds"))
