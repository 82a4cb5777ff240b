"""From a config to the objective of its pair, its task and the teacher's cache."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distpro.build.carry import Carry
from distpro.build.models import build_pair
from distpro.build.terms import build_terms, weight_of
from distpro.config.schema import Config
from distpro.data import Dataset, Mixing, Split, build_augment
from distpro.objective import Objective, Term
from distpro.process import Clock
from distpro.tasks import TASKS
from distpro.train.cache import TeacherCache, digest, digest_data
from pathways.registry import UserError
from pathways.space import parse_spec
from pathways.taps import check_taps

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": None}
"""dtype of autocast; a run has put its own in the place of ``auto``."""


def build_objective(config: Config, data: Dataset, train: Split, clock: Clock, carry: Carry | None = None) -> Objective:
    """Objective of the config's pair and terms, for a training on ``train`` that lasts as ``clock`` says.

    ``carry``: what it takes over from the stage before.
    """
    taken = carry or Carry()
    pair = build_pair(
        config, data.num_classes, data.image_shape, True, data.mean, data.std, taken.student, taken.teacher
    )
    terms = build_terms(config, pair, data.num_classes, train, clock)
    taken.give(terms)
    return Objective(
        pair.teacher,
        pair.student,
        terms,
        example_input=pair.example_input,
        task_loss=build_task(config).loss,
        precision=PRECISIONS[config.precision],
        teacher_training=config.teacher_training,
        task_weight=weight_of(config.task_weight, clock),  # type: ignore[arg-type]
        frozen=frozen_modules(config, pair.student),
        prune=config.prune,
        clock=clock,
        compile=config.compile,
    )


def versions_of(config: Config, epochs: int) -> int:
    """How many different images a training of ``epochs`` makes of each sample."""
    return min(config.data.augment_epochs or epochs, epochs) if config.data.augment else 1


def build_cache(config: Config, data: Dataset, objective: Objective) -> TeacherCache | None:
    """The cache that the config asks for, of the taps that the objective reads; None where it asks for none.

    Raises UserError for a teacher whose answers cannot be kept, and as `TeacherCache` does.
    """
    if config.cache is None or not objective.entries:
        return None
    assert objective.teacher is not None and objective.clock is not None
    if config.teacher_training:
        raise UserError("cache: teacher_training makes the teacher's answer depend on the rest of the batch")
    if any(isinstance(a, Mixing) for a in build_augment(config.data.augment).values()):
        raise UserError("cache: mixup and cutmix give every sample another partner; leave them or the cache out")
    if data.train.streamed:
        raise UserError("cache: for data in memory, not for a streamed set")
    versions = versions_of(config, math.ceil(objective.clock.total_steps / objective.clock.steps_per_epoch))
    views = max((getattr(term.loss, "views", 1) for term in objective.terms if isinstance(term, Term)), default=1)
    example = objective.example_input
    assert example is not None and isinstance(data.train.images, Tensor)
    members = {"": config.teacher} if config.teacher is not None else dict(config.teachers)
    fingerprint = {
        "teacher weights": digest(objective.teacher.model),
        "teacher": {
            name: m.model_dump(include={"model", "params", "input", "weight"}) for name, m in members.items() if m
        },
        "combine": config.combine,
        "precision": config.precision,
        "channels_last": config.channels_last,
        "device": example.device.type,
        "data": digest_data(data.train.images, data.train.labels, data.train.index),
        "mean and std": [list(data.mean), list(data.std)],
        "augment": config.data.augment,
        "seed": config.seed if config.data.augment else None,
        "image shape": list(data.image_shape),
    }
    taught = objective.teach(example)
    taps = {tap: taught[tap] for term in objective.terms for tap in term.teacher_taps}  # type: ignore[union-attr]
    return TeacherCache(
        config.cache.folder, data.train.index, versions, taps, fingerprint, views=views, device=example.device
    )


def build_deployed(config: Config, data: Dataset, student: nn.Module, terms: Mapping[str, Any]) -> Objective:
    """The objective of a trained student that answers through one of its terms, without the teacher's weights.

    ``terms``: saved weights of the terms by key.
    """
    pair = build_pair(config, data.num_classes, data.image_shape, load=False, mean=data.mean, std=data.std)
    pair.student.load_state_dict(student.state_dict())
    built = build_terms(config, pair, data.num_classes)
    Carry(terms=terms).give(built)
    return Objective(pair.teacher, pair.student, built, pair.example_input, precision=PRECISIONS[config.precision])


def build_task(config: Config) -> Any:
    """The config's task."""
    name, params = parse_spec(config.task, "task")
    return TASKS.build(name, **params)


def frozen_modules(config: Config, student: nn.Module) -> list[nn.Module]:
    """The student's modules that ``freeze`` names. Raises UserError for one that it does not have."""
    check_taps(student, config.freeze, config.student.model)
    return [student.get_submodule(name) for name in config.freeze]
