"""From a config to a trainer that is ready to run: the composition root."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from distpro.batch import Batch
from distpro.build.cache import build_cache
from distpro.build.carry import Carry
from distpro.build.checks import check_accumulate, check_search, learned_scalars
from distpro.build.data import build_loader, example_of, search_parts
from distpro.build.given import Given
from distpro.build.keeping import build_keeper, held_out
from distpro.build.objective import build_objective
from distpro.build.optimizer import build_optimizer
from distpro.build.task import metrics_of
from distpro.config.schema import Config, SearchConfig
from distpro.console import note
from distpro.data import Split
from distpro.objective import Objective
from distpro.process import Clock, learned_of
from distpro.schedule import TASK, Said, Schedule, warmed_up
from distpro.search.derivatives import obstacles
from distpro.search.estimators import ESTIMATORS, Room, obstacle, second_obstacle
from distpro.search.scales import measure_scales
from distpro.search.searcher import Searcher
from distpro.search.weighting import WEIGHTINGS
from distpro.task import Task
from distpro.train import distributed
from distpro.train.checks import check_last_batch, check_last_validation_batch
from distpro.train.rates import LearningRate
from distpro.train.trainer import Trainer
from distpro.weights import CONTROLS, NOTHING_TO_WEIGH, OF_TIME, Scale, Weights, constants_of, replay
from pathways.registry import UserError
from pathways.space import parse_spec

REACH, REACH_FROM_TRIALS = 4.0, 2.0
"""How far the logarithm of a weight may move in a search by relative steps, all of them together; and where trials have
chosen the strength that it starts from, so that it has no way to go to it."""

VALIDATION_SAMPLES = 1024
"""On so many samples at most a gradient over a horizon looks at the validation loss; it is far dearer than they are."""


def distill_scale(config: Config, steps_per_epoch: int) -> Callable[[int], float]:
    """λ as a function of the step, as the config says it."""
    return warmed_up(config.training.distill_weight, config.training.distill_warmup or 0.0, steps_per_epoch)


def clock_of(config: Config, loader: Any) -> Clock:
    """How long a training on the loader's batches is, in steps."""
    per_epoch = math.ceil(len(loader) / config.training.accumulate)
    total = config.training.epochs * per_epoch
    return Clock(min(total, config.training.max_steps or total), per_epoch)


def _trainer(
    config: Config,
    objective: Objective,
    optimizer: Any,
    weights: Weights,
    train: Any,
    test: Any,
    folder: Path | None,
    name: str,
    why_not: str,
) -> Trainer:
    rate = config.training.learning_rate
    return Trainer(
        objective,
        objective.task,
        optimizer,
        weights,
        train,
        test,
        epochs=config.training.epochs,
        learning_rate=LearningRate(**rate.model_dump()),
        folder=folder,
        max_steps=config.training.max_steps,
        clip_norm=config.training.clip_norm,
        clip_by=config.training.clip_by,
        accumulate=config.training.accumulate,
        metrics=metrics_of(config, objective.task),
        log_every=config.tracking.log_every,
        evaluate_every=config.tracking.evaluate_every,
        checkpoint_every=config.tracking.checkpoint_every,
        name=name,
        why_not=why_not,
    )


def build_search(
    config: Config,
    data: Any,
    folder: Path | None = None,
    given: Given | None = None,
    parts: tuple[Any, Any] | None = None,
) -> Trainer:
    """A trainer whose weights are searched (Algorithm 1, lines 1-7). Its `weights` is the `Searcher`. ``parts``: (validation,
    training) in the place of the config's."""
    check_search(config)
    search = config.search
    assert search.weighting is not None and search.optimizer is not None and search.momentum is not None
    validation_part, train_part = parts or search_parts(config, data)
    train = build_loader(config, data, train_part, training=True)
    validation = build_loader(
        config, data, validation_part, training=True, batch_size=search.validation_batch_size, plain_order=True
    )
    clock = clock_of(config, train)
    total = clock.total_steps
    objective = build_objective(config, data, train_part, clock, given=given)
    optimizer = build_optimizer(config, objective.trainable_parameters(), objective.student.model)
    full_rate = optimizer.param_groups[0]["lr"]
    example = example_of(config, data)
    horizon, stretch, _ = fitting(config, total, objective, example)
    estimator_name, estimator_params = _choose_estimator(config, objective, example, horizon, stretch, train)
    clip_norm, clip_by = config.training.clip_norm, config.training.clip_by
    estimator = ESTIMATORS.build(estimator_name, objective, optimizer, clip_norm, clip_by, **estimator_params)
    estimator.calibrated = calibrates(search, objective.task)
    weighting_name, weighting_params = parse_spec(search.weighting, "search.weighting")
    how = search.normalise or ("gradient" if config.terms else "none")

    def measure() -> Tensor:
        return measure_scales(objective, islice(train.endless(), search.normalise_batches), how)

    searcher = Searcher(
        objective,
        estimator,
        WEIGHTINGS.build(weighting_name, **weighting_params),
        validation.endless,
        total_steps=total,
        learning_rate=search.learning_rate or _learning_rate(search, total // max(search.every, horizon)),
        optimizer=search.optimizer,
        betas=search.betas,
        momentum=search.momentum,
        every=search.every,
        threshold=search.threshold,
        revive_every=search.revive_every,
        repeats=search.repeats,
        validation_batches=search.validation_batches or _validation_batches(config, validation, horizon),
        shows_last_update=horizon > 1,
        scale=distill_scale(config, len(train)),
        measure=None if how == "none" else measure,
        rate=(lambda: optimizer.param_groups[0]["lr"] / full_rate) if search.per_rate else lambda: 1.0,
        scalars=learned_scalars(config, objective),
    )
    if searcher.beside.names not in ((), (TASK,)):
        _check_derivatives(searcher, next(iter(train.endless())))
    objective.cache = build_cache(config, data, objective, example)
    test = build_loader(config, data, data.test, training=False)
    why_not = train.why_not or validation.why_not
    trainer = _trainer(config, objective, optimizer, searcher, train, test, folder, "search", why_not)
    _check_last_batch(trainer, config, train_part)
    samples = len(validation_part) if isinstance(validation_part, Split) else None
    size = search.validation_batch_size or config.training.batch_size
    check_last_validation_batch(trainer, validation, samples, size, config.training.drop_last)
    return trainer


def _check_derivatives(searcher: Searcher, batch: Batch) -> None:
    """Raise UserError for a scalar whose derivative its loss does not have."""
    found, forward = obstacles(searcher.objective, searcher.beside, batch)
    said = next(filter(None, distributed.gather("; ".join(found))), "")
    if said:
        raise UserError(f"search: {said}")
    if distributed.any_of(not forward):
        searcher.estimator.over_reverse = False  # type: ignore[attr-defined]


def calibrates(search: SearchConfig, task: Task) -> bool:
    """Whether a search judges by the calibrated loss. Raises UserError where the config asks for that and the task has none."""
    able = hasattr(task, "rows")
    if search.criterion == "calibrated" and not able and "criterion" in search.model_fields_set:
        raise UserError(
            f"search.criterion: calibrated is for a cross entropy; {type(task).__name__} has no rows (allowed: task)"
        )
    return search.criterion == "calibrated" and able


def fitting(config: Config, total: int, objective: Objective, example: Batch) -> tuple[int, int, int]:
    """What of the horizon `search.memory` holds in a training of ``total`` steps: its steps, the stretch of those of which the
    first alone is kept whole, and the bytes that they take."""
    horizon = config.search.steps_back(total)
    if horizon == 1:
        return 1, 1, 0
    room = Room.of(objective, config.training.batch_size, example)
    steps, stretch = room.fit(horizon, config.search.memory * 1e9)
    if steps < horizon and distributed.is_main():
        note(
            f"search.horizon: {horizon} steps do not fit into search.memory, {config.search.memory:g} GB, one takes "
            f"{room.takes(1, 1) / 1e6:.1f} MB; {steps} are taken"
        )
    return steps, stretch, room.takes(steps, stretch)


def _learning_rate(search: SearchConfig, updates: int) -> float:
    """γ where the config says none."""
    if search.optimizer != "relative":
        return 0.05
    return (REACH_FROM_TRIALS if search.trials_before else REACH) / max(1, updates)


def _validation_batches(config: Config, validation: Any, horizon: int) -> int:
    """Of the validation part: one batch for every step's gradient; for one over a horizon all, up to some samples."""
    size = config.search.validation_batch_size or config.training.batch_size
    return 1 if horizon == 1 else max(1, min(len(validation), VALIDATION_SAMPLES // size))


def _choose_estimator(
    config: Config, objective: Objective, example: Batch, horizon: int, stretch: int, train: Any
) -> tuple[str, dict[str, Any]]:
    """Name and parameters of the hypergradient estimator; in the place of ``auto`` the sweep where the horizon is more
    than one step, else forward_mode, or finite_difference where that cannot be. Raises UserError where the config asks
    for what cannot be."""
    name, params = parse_spec(config.search.estimator, "search.estimator")
    several = distributed.world_size() > 1
    if several and name == "unrolled":
        raise UserError("search.estimator: unrolled runs in one process (allowed: forward_mode, finite_difference)")
    if horizon > 1:
        first = next(iter(train.endless()))  # a loss may want to know which samples they are, or rotated ones
        without = next(filter(None, distributed.gather(second_obstacle(objective, first))), "")
        if without:
            raise UserError(
                f"search.horizon: {without} has no second derivative in PyTorch, which a horizon of several steps needs; "
                "use search.horizon=1, or leave out what uses it"
            )
        if name in ("auto", "sweep"):
            return "sweep", {"steps": horizon, "stretch": stretch, **params}
        return name, {"steps": horizon, **params}
    if name not in ("auto", "forward_mode"):
        return name, params
    if several and config.sync_batch_norm:
        why_not = "with sync_batch_norm, forward_mode cannot see through batch statistics of several processes"
    else:
        clipped = config.training.clip_norm is not None
        why_not = next(filter(None, distributed.gather(obstacle(objective, example, clipped))), "")
        why_not = why_not and f"forward_mode cannot be used with this student: {why_not}"
    if not why_not:
        return "forward_mode", params
    if name == "forward_mode":
        raise UserError(f"search.estimator: {why_not}; use search.estimator=finite_difference")
    if distributed.is_main():
        note(f"search.estimator: finite_difference is taken; {why_not}")
    return "finite_difference", {}


def build_retrain(
    config: Config,
    data: Any,
    schedule: Schedule | None,
    folder: Path | None = None,
    carry: Carry | None = None,
    given: Given | None = None,
    parts: tuple[Any, Any] | None = None,
) -> Trainer:
    """A trainer whose weights replay a schedule or a control (lines 8-14), on the whole training set but for what
    `training.validation_fraction` holds out.

    ``carry``: what a stage takes over from the one before. ``parts``: (training, test) in the place of the data set's.
    """
    retrain = config.retrain
    assert retrain.start is not None
    train_part, test_part = parts or (data.train, data.test)
    train_part, validation_part = held_out(config, data, train_part, judged=parts is not None)
    train = build_loader(config, data, train_part, training=True)
    check_accumulate(config, len(train))
    clock = clock_of(config, train)
    objective = build_objective(config, data, train_part, clock, carry, given)
    scale: Scale | Said = distill_scale(config, int(clock.steps_per_epoch))
    if schedule is not None and config.training.distill_warmup is None:
        schedule, scale = replace(schedule, strength=config.training.distill_weight), "schedule"
    replays = schedule is not None and retrain.weights in CONTROLS
    if replays and retrain.start == 1 and retrain.weights in OF_TIME and distributed.is_main():
        note(
            f"retrain.weights: {retrain.weights} is what searched plays: of this schedule a replay takes the last weights alone "
            "(retrain.start is 1; retrain.start=0 replays all of it)"
        )
    if learned_of(config.task_weight) is not None and replays and TASK not in schedule.scalars:  # type: ignore[union-attr]
        raise UserError("task_weight: it is learned, but the schedule has no scalar 'task': state a number")
    if retrain.weights == "equal" and config.has_teacher and None not in constants_of(objective.terms, 0):
        raise UserError(NOTHING_TO_WEIGH.format("equal"))
    weights = replay(
        objective,
        retrain.weights,
        clock.total_steps,
        schedule,
        retrain.threshold,
        scale,
        retrain.mapping,
        retrain.start,
        config.seed,
    )
    if not objective.computes_task and not objective.entries:
        raise UserError("task_weight is 0 and there is no term: nothing to train")
    objective.cache = build_cache(config, data, objective, example_of(config, data))
    trained = [] if objective.uncertainty is None else [*objective.uncertainty.parameters()]
    optimizer = build_optimizer(config, objective.trainable_parameters(), objective.student.model, trained)
    test = build_loader(config, data, test_part, training=False)
    name = "train" if retrain.weights == "none" else f"retrain ({retrain.weights})"
    trainer = _trainer(config, objective, optimizer, weights, train, test, folder, name, train.why_not)
    trainer.keeper = build_keeper(config, data, objective, train, validation_part)
    _check_last_batch(trainer, config, train_part)
    return trainer


def _check_last_batch(trainer: Trainer, config: Config, part: Any) -> None:
    samples = len(part) if isinstance(part, Split) else None
    check_last_batch(trainer, samples, config.training.batch_size, config.training.drop_last)
