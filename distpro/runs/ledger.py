"""The trials of a tuning as all its workers see them: who trains which, what each has cost, what is left of the budget.

All of it is in Optuna's journal, one file that any number of processes append to, on one machine or on several that share the
folder. A trial whose worker has died is taken over, with its number, its values and its checkpoint, so that nothing that was
begun is lost and a run that goes on comes to the same trials.
"""

from __future__ import annotations

import importlib
import math
import os
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distpro.config.schema import Config
from distpro.console import pip_install
from distpro.runs.candidates import Candidate
from pathways.registry import UserError

BEAT, DEAD = 15.0, 120.0  # seconds between two signs of life, and without one
REDUCTION = 3  # of a rung's trials one in so many goes on
RUNGS = 2  # at which a training may be pruned: a ninth and a third of its epochs
STUDIES = ("learned", "tuned")
"""Candidates without free numbers are apart: they would be the best of the sampler's examples, and tell it nothing."""


@dataclass
class Turn:
    """A trial that is this worker's: its number, the name of its candidate, and the values of the candidate's numbers."""

    study: Any
    trial: Any
    candidate: str
    values: dict[str, float]

    @property
    def label(self) -> str:
        return f"{self.candidate} {self.trial.number}" if self.study.study_name == "tuned" else self.candidate


class Ledger:
    """The trials in a folder.

    Args:
        config: what it says under `tune`, and the seed.
        epochs: of a trial.
    """

    def __init__(self, folder: Path, config: Config, epochs: int):
        self.optuna = require_optuna()
        journal = importlib.import_module("optuna.storages.journal")
        self.folder, self.config, self.epochs = folder, config, epochs
        self.worker = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        folder.mkdir(parents=True, exist_ok=True)
        file = str(folder / "trials.journal")  # links are no locks on every system, so the locks are files
        self._storage = journal.JournalStorage(journal.JournalFileBackend(file, journal.JournalFileOpenLock(file)))
        self._turn = journal.JournalFileOpenLock(str(folder / "turn"))
        self.least = math.ceil(epochs / REDUCTION**RUNGS)
        """Epochs after which a training may be pruned for the first time; also later only after a multiple of them."""
        self._pruner = self.optuna.pruners.HyperbandPruner(self.least, epochs, REDUCTION)
        create = self.optuna.create_study
        # The pruner is asked apart from the study: a study with Hyperband lets its sampler see only the trials of one bracket.
        self.studies = {
            name: create(
                storage=self._storage, study_name=name, load_if_exists=True, pruner=self.optuna.pruners.NopPruner()
            )
            for name in STUDIES
        }

    # The beginning

    def begin(self, candidates: Sequence[Candidate]) -> None:
        """Let every candidate be trained once before any is trained again."""
        self.studies["tuned"].set_user_attr("candidates", [candidate.name for candidate in candidates])
        for candidate in candidates:
            values = {f"{candidate.name}.{name}": centre for name, centre in candidate.centres.items()}
            tuned = {"candidate": candidate.name, **values} if values else {}
            attributes = {"candidate": candidate.name, "first": True}
            self.studies["tuned" if values else "learned"].enqueue_trial(tuned, user_attrs=attributes)

    @property
    def names(self) -> list[str]:
        """Of the candidates that there were at the beginning."""
        return list(self.studies["tuned"].user_attrs["candidates"])

    # Turns

    def take(self, candidates: Mapping[str, Candidate]) -> Turn | None:
        """A trial for this worker: one that was left, else a new one; None where the budget has none."""
        with self._alone():
            free = [candidate.name for candidate in candidates.values() if candidate.centres]
            found = self._left() or self._new(bool(free))
            if found is None:
                return None
            study, trial = found
            trial.set_user_attr("worker", self.worker)
            name = trial.user_attrs.get("candidate")
            # A sampler of its own for each trial: one that is asked again after a stop says the same.
            study.sampler = self.optuna.samplers.TPESampler(
                seed=(self.config.seed * 100_003 + trial.number) % 2**32,
                n_startup_trials=max(10, len(candidates)),
                multivariate=False,
                constant_liar=True,
            )
            if study.study_name == "tuned":
                name = trial.suggest_categorical("candidate", free)
            low, high = self.config.tune.span
            values = {
                key: trial.suggest_float(f"{name}.{key}", low * centre, high * centre, log=True)
                for key, centre in candidates[str(name)].centres.items()
            }
            return Turn(study, trial, str(name), values)

    def _left(self) -> tuple[Any, Any] | None:
        """A trial that has been begun, and nobody is at."""
        for study in self.studies.values():
            for trial in self._in(study, "RUNNING"):
                if not self._lives(trial.user_attrs.get("worker")):
                    return study, self.optuna.trial.Trial(study, trial._trial_id)
        return None

    def _new(self, more: bool) -> tuple[Any, Any] | None:
        """One that nobody has begun, if the budget has a whole training left; ``more``: also beyond the first of each candidate."""
        if self.spent() + self.running() + 1 > self.config.tune.trials + 1e-6:
            return None
        waiting = [study for study in self.studies.values() if self._in(study, "WAITING")]
        study = next(iter(waiting or ([self.studies["tuned"]] if more else [])), None)
        return None if study is None else (study, study.ask())

    def spent(self) -> float:
        """What the trials that have ended have cost, in whole trainings."""
        return sum(t.user_attrs["cost"] for s in self.studies.values() for t in self._in(s, "COMPLETE", "PRUNED"))

    def _in(self, study: Any, *states: str) -> list[Any]:
        kinds = tuple(self.optuna.trial.TrialState[state] for state in states) or None
        return list(study.get_trials(deepcopy=False, states=kinds))

    # A trial's way

    def falls_behind(self, turn: Turn, epoch: int, value: float) -> bool:
        """Whether a training that was judged ``value`` after so many epochs is to be pruned. A candidate's first one is not, so
        that the board compares all of them at their ends."""
        frozen = self._in(turn.study)[turn.trial.number]
        if epoch not in frozen.intermediate_values:
            turn.trial.report(value, epoch)
            frozen = self._in(turn.study)[turn.trial.number]
        behind = frozen.user_attrs.get("behind", self._pruner.prune(turn.study, frozen))
        if not behind or frozen.user_attrs.get("first"):
            return False
        turn.trial.set_user_attr("behind", True)  # the pruner would not say it again to who goes on from here
        return True

    def twin(self, turn: Turn, training: str) -> dict[str, Any] | None:
        """What an earlier trial of the very same training came to, if there is one; ``training`` identifies it."""
        turn.trial.set_user_attr("training", training)
        for study in self.studies.values():
            for trial in self._in(study, "COMPLETE"):
                if trial.user_attrs["training"] == training:
                    return dict(trial.user_attrs["metrics"])
        return None

    def end(self, turn: Turn, metrics: Mapping[str, float], judged: float, cost: float, pruned: bool) -> None:
        """Write down what a trial came to, and what it has cost."""
        turn.trial.set_user_attr("metrics", dict(metrics))
        turn.trial.set_user_attr("cost", cost)
        states = self.optuna.trial.TrialState
        if pruned:
            turn.study.tell(turn.trial, state=states.PRUNED)
        else:
            turn.study.tell(turn.trial, judged)

    def rows(self) -> list[dict[str, Any]]:
        """The trials that have ended, in the order of their ends."""
        ended = [(t, s) for s in self.studies.values() for t in self._in(s, "COMPLETE", "PRUNED")]
        return [_row(trial, study) for trial, study in sorted(ended, key=lambda pair: pair[0].datetime_complete)]

    def running(self) -> int:
        """How many trials have been begun and not ended."""
        return sum(len(self._in(study, "RUNNING")) for study in self.studies.values())

    # Workers

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Give signs of life meanwhile."""
        done, mine = threading.Event(), self.folder / "workers" / self.worker
        mine.parent.mkdir(exist_ok=True)
        mine.touch()
        for other in mine.parent.glob("*-*-*"):
            if not self._lives(other.name):
                other.unlink(missing_ok=True)

        def beat() -> None:
            while not done.wait(BEAT):
                mine.touch()

        threading.Thread(target=beat, daemon=True).start()
        try:
            yield
        finally:
            done.set()
            mine.unlink(missing_ok=True)

    def _lives(self, worker: str | None) -> bool:
        theirs, mine = (self.folder / "workers" / name for name in (worker or "nobody", self.worker))
        if not theirs.is_file():
            return False
        host, pid, _ = theirs.name.rsplit("-", 2)
        if host == socket.gethostname() and os.name == "posix" and not _runs(int(pid)):
            return False
        mine.touch()  # both times are then of one clock, the file system's
        return mine.stat().st_mtime - theirs.stat().st_mtime < DEAD

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One worker at a time. The lock of one that has died is broken after half a minute."""
        self._turn.acquire()
        try:
            yield
        finally:
            self._turn.release()


def _row(trial: Any, study: Any) -> dict[str, Any]:
    """A trial as a row of trials.jsonl."""
    about = trial.user_attrs
    name = trial.params.get("candidate", about.get("candidate"))
    pruned = trial.state.name == "PRUNED"
    value = trial.value if trial.value is not None and math.isfinite(trial.value) else None
    return {
        "trial": trial.number,
        "study": study.study_name,
        "candidate": name,
        "values": {key.removeprefix(f"{name}."): v for key, v in trial.params.items() if key != "candidate"},
        "state": "pruned" if pruned else "diverged" if value is None else "complete",
        "judged": value,
        "cost": about["cost"],
        **about["metrics"],
    }


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def require_optuna() -> Any:
    """Optuna, quiet. Raises UserError where it is not installed."""
    try:
        optuna = importlib.import_module("optuna")
    except ImportError:
        raise UserError(f"tune needs optuna: {pip_install('tune')}") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
