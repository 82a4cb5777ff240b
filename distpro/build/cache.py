"""From a config to the cache of its teacher's outputs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from distpro.batch import Batch
from distpro.config.schema import Config
from distpro.data import Mixing, Split, build_augment
from distpro.data.collating import stored_numbers
from distpro.data.text import TextData, digest_of_part
from distpro.objective import Objective
from distpro.train.cache import TeacherCache, digest, digest_data
from pathways.probing import untouched
from pathways.registry import UserError

TOLERANCE = {"bfloat16": 0.08}
"""How far a teacher's answers may lie from those on another machine, as a part of their root mean square: 0.01 in 11 bits of
mantissa (float16, and float32 where a GPU multiplies in TF32), 8 times that in the 8 of bfloat16."""


def versions_of(config: Config, epochs: int) -> int:
    """How many different images a training of ``epochs`` makes of each sample."""
    return min(config.data.augment_epochs or epochs, epochs) if config.data.augment else 1


def rows_per_sample(objective: Objective) -> int:
    """Rows of a training batch per sample: 4 where a loss wants each image's rotations."""
    return 4 if any(getattr(getattr(term, "loss", None), "expand", "") for term in objective.terms) else 1


def build_cache(config: Config, data: Any, objective: Objective, example: Batch) -> TeacherCache | None:
    """The cache that the config asks for, of the taps that the objective reads; None where it asks for none.

    ``example``: a batch of two samples. Raises UserError for a teacher whose answers cannot be kept, and as
    `TeacherCache` does.
    """
    if config.cache is None or not objective.entries:
        return None
    assert objective.teacher is not None and objective.clock is not None
    if config.teacher_training:
        raise UserError("cache: teacher_training makes the teacher's answer depend on the rest of the batch")
    if isinstance(example.inputs, list):
        raise UserError(
            "cache: images of several sizes are padded to the largest of their batch, so what a teacher says of one depends on "
            "the others; leave the cache out"
        )
    if any(isinstance(a, Mixing) for a in build_augment(config.data.augment).values()):
        raise UserError("cache: mixup and cutmix give every sample another partner; leave them or the cache out")
    if config.data.repeats > 1 or config.data.sampler is not None:
        raise UserError(
            "cache: data.repeats and data.sampler augment copies of a sample apart; leave them or the cache out"
        )
    index, of_data = _samples_of(config, data)
    versions = versions_of(config, math.ceil(objective.clock.total_steps / objective.clock.steps_per_epoch))
    members = {"": config.teacher} if config.teacher is not None else dict(config.teachers)
    fingerprint = {
        "teacher weights": digest(objective.teacher.model),
        "teacher": {
            name: m.model_dump(include={"model", "params", "input", "weight"}) for name, m in members.items() if m
        },
        "combine": config.combine,
        "precision": config.precision,
        "channels_last": config.channels_last,
        "device": objective.device.type,
        **of_data,
    }
    tolerance = TOLERANCE.get(config.precision, 0.01)
    names = dict.fromkeys(tap for term in objective.terms for tap in term.teacher_taps)  # type: ignore[union-attr]
    _check_answers(objective, example, list(names), tolerance)
    taught = objective.run_teacher(example)
    taps = {tap: taught[tap] for tap in names}
    tokens = next((tap for tap, x in taps.items() if x.dim() > 2), None) if isinstance(data, TextData) else None
    if tokens is not None:
        raise UserError(
            f"cache: '{tokens}' of the teacher are tokens, as many as the batch's longest text has; of texts the cache keeps "
            "what has one size (logits, an embedding)"
        )
    views = rows_per_sample(objective)
    return TeacherCache(
        config.cache.folder,
        index,
        versions,
        taps,
        fingerprint,
        views=views,
        device=objective.device,
        answers=taps,
        tolerance=tolerance,
    )


def _check_answers(objective: Objective, example: Batch, taps: list[str], tolerance: float) -> None:
    """Raise UserError for a teacher that answers a sample otherwise the next time, or in another batch. All batches here are of one
    size, so that rounding is mostly the same; ``tolerance`` is for kernels that add in any order, in each of many layers."""
    assert objective.teacher is not None

    def answers(batch: Batch) -> dict[str, Tensor]:
        taught = objective.run_teacher(batch)
        return {tap: taught[tap].clone() for tap in taps}  # the next pass of a CUDA graph writes over them

    with untouched(objective.teacher.model):
        before, again = answers(example), answers(example)
        alone = answers(example.to(lambda tensor: tensor[[0] * len(tensor)]))
    for tap in taps:
        if not _alike(before[tap], again[tap], tolerance):
            raise UserError(
                f"cache: the teacher gives another '{tap}' of the same samples each time (dropout that is on in evaluation mode?), of "
                "which a cache would keep one; leave it out"
            )
    for tap in taps:
        if not _alike(before[tap][:1], alone[tap][:1], tolerance):
            raise UserError(
                f"cache: the teacher's '{tap}' of a sample depends on the rest of its batch (BatchNorm in training mode or without "
                "running statistics, a mean over the batch?), which is another one in each epoch; leave the cache out"
            )


def _alike(before: Tensor, now: Tensor, tolerance: float) -> bool:
    """Whether two answers are the same but for ``tolerance`` times the root mean square of the first."""
    before, now = before.double(), now.double()
    size = before.nan_to_num(posinf=0.0, neginf=0.0).square().mean().sqrt().item()
    return torch.allclose(before, now, rtol=0.0, atol=tolerance * size, equal_nan=True)


def _samples_of(config: Config, data: Any) -> tuple[Tensor, dict[str, Any]]:
    """The numbers of the samples that a training sees, and what of the data decides the teacher's answers. Raises UserError for
    data that cannot be known."""
    if isinstance(data, TextData):
        return stored_numbers(data.train), {"data": digest_of_part(data.train), "tokenizer": data.vocabulary.digest}
    if not isinstance(data.train, Split):
        raise UserError("cache: for distpro's own data sets; what another Dataset gives for a sample cannot be known")
    if data.train.streamed:
        raise UserError("cache: for data in memory, not for a streamed set")
    assert isinstance(data.train.images, Tensor)
    return data.train.index, {
        "data": digest_data(data.train.images, data.train.labels, data.train.index),
        "mean and std": [list(data.mean), list(data.std)],
        "augment": config.data.augment,
        "seed": config.seed if config.data.augment else None,
        "image shape": list(data.image_shape),
    }
