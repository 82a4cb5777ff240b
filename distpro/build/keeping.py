"""From a config to what chooses the student that a training leaves."""

from __future__ import annotations

from functools import partial
from typing import Any

from distpro.build.data import build_loader
from distpro.config.schema import Config
from distpro.data.loading import split
from distpro.objective import Objective
from distpro.train.keeping import Keeper, MovingAverage
from pathways.registry import UserError


def held_out(config: Config, data: Any, train: Any, judged: bool = False) -> tuple[Any, Any]:
    """(training, validation) parts of a training that chooses by validation data: the data set's own validation part, or
    `training.validation_fraction` of the training part; None where nothing is chosen.

    ``judged``: whether it is a trial, which is judged on validation data itself. Raises UserError where there are none to
    choose by.
    """
    training = config.training
    if not training.chooses and training.validation_fraction is None:
        return train, None
    key = "keep" if training.keep != "last" else "patience" if training.patience is not None else "validation_fraction"
    if judged:
        raise UserError(
            f"training.{key}: a trial of a search or a tuning is judged on the validation part, and may not choose by it before; "
            "leave it out here, and say it for the training of what is found"
        )
    if data.validation is not None:
        if training.validation_fraction is not None:
            raise UserError("training.validation_fraction: the data have a validation part of their own; leave it out")
        return train, data.validation
    if training.validation_fraction is None:
        raise UserError(
            f"training.{key}: chooses by validation data, never by test data, and these have no validation part; "
            "training.validation_fraction=0.1 holds a tenth of the training samples out"
        )
    validation, rest = split(train, training.validation_fraction, config.seed)
    return rest, validation


def build_keeper(config: Config, data: Any, objective: Objective, train: Any, validation: Any) -> Keeper | None:
    """What the config asks for; None where the student of the last step is left and nothing is looked at beside it.

    ``train``: the training's loader. ``validation``: part of the data, or None.
    """
    training = config.training
    if training.ema is None and validation is None:
        return None
    ema = None
    if training.ema is not None:
        ema = partial(MovingAverage, decay=training.ema.decay, warmup=training.ema.warmup)
    return Keeper(
        objective,
        objective.task.headline,
        objective.task.higher_is_better,
        ema,
        None if validation is None else build_loader(config, data, validation, training=False),
        training.keep,
        training.average_of,
        training.patience,
        train,
    )
