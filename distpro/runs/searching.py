"""A search from its start to its schedule: the pass over a training, and the trials around it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distpro import build
from distpro.build.data import search_parts
from distpro.build.given import Given
from distpro.build.runs import REACH_FROM_TRIALS, clock_of
from distpro.config.reading import for_retrain
from distpro.config.schema import Config
from distpro.config.searching import JUDGED_BY
from distpro.console import note
from distpro.objective import Objective
from distpro.report.cost import teacher_name
from distpro.runs.folder import begun, environment, goes_on, open_folder, record, recorded_estimator
from distpro.runs.rounds import Rounds
from distpro.runs.training import run_training
from distpro.runs.trials import Trials
from distpro.schedule import Schedule
from distpro.schedule_file import meaning_of
from distpro.search.learned import Constants
from distpro.search.searcher import Searcher
from distpro.search.strength import Strength
from distpro.train import distributed
from distpro.train.state import random_state, set_random_state
from distpro.train.trainer import Trainer
from pathways.registry import UserError
from pathways.space import parse_spec

BELOW = 0.1
"""One pass starts from this part of the best strength of equal weights; rounds, which are judged each, from all of it."""


def run_search(checked: Config, out: str | Path | None, resume: bool, given: Given) -> Schedule:
    """Learn a schedule, write it to the folder, and return it."""
    if resume and out is not None:
        checked = _with_estimator(checked, distributed.gather(recorded_estimator(Path(out)))[0])
    with open_folder(out, checked, resume, kind="search") as folder:
        return _search(checked, folder, goes_on(folder, resume), given)


def _search(checked: Config, folder: Path | None, resume: bool, given: Given) -> Schedule:
    data = build.build_data(build.as_stored(checked, folder) if resume else checked, given)
    before, rounds = checked.search.trials_before, checked.search.rounds
    trials = Trials(checked, data, given, None if folder is None else folder / "trials", checked.search.most_trials)
    trainer = build.build_search(checked, data, folder, given)
    searcher = trainer.weights
    assert isinstance(searcher, Searcher)
    checked = _with_estimator(checked, searcher.estimator.name)
    meta = schedule_meta(checked, data, trainer.objective)
    meaning = meaning_of(meta["config"])

    def learned(values: Constants | None = None, process: Tensor | None = None) -> Schedule:
        return searcher.schedule(trainer.steps_per_epoch, meta, values, process, **meaning)

    def write() -> None:
        if folder is not None:
            learned().save(folder / "alpha.pt")

    trainer.on_checkpoint = write
    going_on = begun(folder, resume)
    around = _Around(trials, searcher, learned, before, 1.0 if rounds else BELOW)
    if before:
        if folder is not None and not resume and distributed.is_main():
            record(checked, folder, data.facts)  # a run that is killed in a trial can be gone on with
        state = random_state(trainer.objective.student)
        around.choose_start()
        set_random_state(state)

    outer = (
        _rounds(checked, data, trainer, trials, folder, lambda process: learned(process=process)) if rounds else None
    )

    def conclude(metrics: dict[str, float]) -> dict[str, float]:
        if outer is not None:
            searcher.play(outer.run())
            searcher.signal = outer.signal
        elif trials.most:
            around.choose_end()
        if distributed.is_main():
            write()  # also where the run was killed between its last checkpoint and this
        if not trials.most:
            return metrics
        seconds = metrics["seconds"] + trials.seconds
        if distributed.is_main() and trials.seconds:
            note(_cost(checked, data, seconds, trials))
        return {**metrics, "trials": len(trials.rows), "seconds": seconds}

    run_training(trainer, checked, going_on, searcher, facts=data.facts, conclude=conclude)
    return learned()


def _cost(config: Config, data: Any, seconds: float, trials: Trials) -> str:
    """What a search has taken beside one retrain of its config, whose steps take as long as those of the trials."""
    retrain = for_retrain(config)
    whole = clock_of(retrain, build.build_loader(retrain, data, data.train, training=True)).total_steps
    steps = round(whole * (1 - (retrain.training.validation_fraction or 0.0)))
    takes = steps * trials.seconds / sum(row["step"] for row in trials.rows)
    return f"the search took {seconds:.0f} s, a retrain of {steps:,} steps takes about {takes:.0f} s: {seconds / takes:.0%} of one"


def _rounds(
    config: Config,
    data: Any,
    first: Trainer,
    trials: Trials,
    folder: Path | None,
    schedule: Callable[[Tensor], Schedule],
) -> Rounds:
    """The rounds of a search, of which the run's own training, ``first``, is the first. Its weights are set to their start.

    Args:
        schedule: of a process log w (T, N).
    """
    searcher, search, parts = first.weights, config.search, search_parts(config, data)
    assert isinstance(searcher, Searcher)
    if searcher.estimator.window < first.total_steps:
        raise UserError(
            f"search.rounds: a gradient is of the whole training, {first.total_steps} steps, of which search.memory, "
            f"{search.memory:g} GB, holds {searcher.estimator.window}: more of it, or a shorter training"
        )

    def gradient(number: int, process: Tensor) -> Tensor:
        trainer, of = first, searcher
        if number > 1:
            seeded = config.model_copy(update={"seed": config.seed + number - 1})
            trainer = build.build_search(seeded, data, None, trials.given.copied(), parts)
            trainer.name = f"round {number}"
            of = trainer.weights  # type: ignore[assignment]
            of.measured(searcher.scales)
            of.path = process.to(of.history)
            trainer.fit()
        h = of.estimator.per_step.clone()  # type: ignore[attr-defined]
        distributed.average([h])
        return h[:, of.learned]

    def judge(number: int, process: Tensor) -> float:
        played = schedule(process)
        return (
            sum(trials.judge(f"round {number}, seed {n}", played, config.seed + n) for n in range(JUDGED_BY))
            / JUDGED_BY
        )

    outer = Rounds(
        searcher.alpha_tilde.detach().double(),
        first.total_steps,
        search.knots,
        search.rounds,
        search.learning_rate or REACH_FROM_TRIALS / search.rounds,
        gradient,
        judge,
        None if folder is None else folder / "rounds",
    )
    searcher.path = outer.process().to(searcher.history)
    return outer


class _Around:
    """The trials around a search's pass: how strong the terms are, which a gradient is least to be trusted with, and whether
    what the pass has learned is better than equal weights.

    Before: equal weights at the strength at which a training with them is best. The pass starts from a part of it: near where
    trainings diverge a gradient says nothing. After: what the pass has made of the weights' shares, at that best strength and near
    it; where it is worse than equal weights, half of the way too. The best of all is what the schedule ends with. Where there are too
    few trials for both, all come after: of what the pass has learned, at its own strength and at powers of ten of it.

    Args:
        schedule: of constant weights and scalars.
        before: trials for the start, at most; 0: the pass starts where the config says.
        below: part of the best strength that the weights start from.
    """

    def __init__(
        self, trials: Trials, searcher: Searcher, schedule: Callable[[Constants], Schedule], before: int, below: float
    ):
        self.trials, self.searcher, self.schedule, self.before, self.below = trials, searcher, schedule, before, below
        self.equal, self._of_equal = searcher.last(), math.inf

    def choose_start(self) -> None:
        """Find the strength, and let the pass start below it."""
        self.searcher.measure()
        strength = Strength(self._judge("equal weights", self.equal), self.before)
        self.equal = self.equal.times(strength.best())
        self._of_equal = min(strength.judged.values())
        self.searcher.start_from(self.equal.weights * self.below)

    def choose_end(self) -> None:
        """Let the schedule end with the best weights that were found; with what was learned, where no trial is left."""
        last = self.searcher.last()
        learned = last.times((self.equal.weights.sum() / last.weights.sum()).item()) if self.before else last
        found = {math.inf: learned}
        if self._left():
            strength = Strength(self._judge("learned", learned), self._left())
            factor = strength.best(coarse=not self.before)
            found = {self._of_equal: self.equal, min(strength.judged.values()): learned.times(factor)}
        if min(found) == self._of_equal and self._left():
            half = learned.halfway(self.equal)
            found[self._judge("half of the way", half)(1.0)] = half
        self.searcher.end_with(found[min(found)])

    def _left(self) -> int:
        return self.trials.most - len(self.trials.rows)

    def _judge(self, what: str, values: Constants) -> Callable[[float], float]:
        def judge(factor: float) -> float:
            name = what if factor == 1 else f"{what} times {factor:.3g}"
            return self.trials.judge(name, self.schedule(values.times(factor)))

        return judge


def _with_estimator(config: Config, taken: Any) -> Config:
    """The config with the estimator that a run has taken in the place of ``auto``."""
    if taken is None or parse_spec(config.search.estimator, "search.estimator")[0] != "auto":
        return config
    return config.model_copy(update={"search": config.search.model_copy(update={"estimator": taken})})


def schedule_meta(config: Config, data: Any, objective: Objective) -> dict[str, Any]:
    """What `alpha.pt` says beside the numbers."""
    assert objective.teacher is not None
    facts = environment()
    return {
        "config": json.loads(config.model_dump_json()),
        "weighting": json.loads(json.dumps(config.search.weighting)),
        "threshold": config.retrain.threshold,
        "lambda": config.training.distill_weight,
        "teacher": _model_signature(teacher_name(config), objective.teacher.model),
        "student": _model_signature(config.student.model, objective.student.model),
        "data": data.facts,
        "versions": facts["packages"],
        "revision": facts["revision"],
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _model_signature(name: str, model: nn.Module) -> dict[str, Any]:
    return {"model": name, "parameters": sum(p.numel() for p in model.parameters())}
