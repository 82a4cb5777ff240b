"""The composition root: a checked config → live objects. The only file that knows everyone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distpro import distributed
from distpro.cache import TeacherCache, digest, digest_data
from distpro.config import Config
from distpro.data import DATASETS, Dataset, Loader, Mixing, Split, build_augment, load_data, split
from distpro.hypergradient import ESTIMATORS
from distpro.losses import LOSSES
from distpro.models import MODELS
from distpro.normalise import measure_scales
from distpro.objective import Objective, Term
from distpro.pair import build_pair, device_of
from distpro.process import Clock, reduction_of
from distpro.retrainer import replay
from distpro.schedule import Schedule
from distpro.searcher import Searcher
from distpro.stages import Carry
from distpro.tasks import TASKS
from distpro.terms import build_terms, split_processes, weight_of
from distpro.trainer import LearningRate, Trainer, Weights
from distpro.weighting import WEIGHTINGS
from pathways import DISTANCES, TRANSFORMS
from pathways.registry import Registry, UserError, check_parameters
from pathways.space import parse_spec
from pathways.taps import check_taps

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": None}
"""dtype of autocast; a run has put its own in the place of ``auto``."""
IMAGE_SETS = {"cifar10": (10, (3, 32, 32)), "cifar100": (100, (3, 32, 32))}


def check_names(config: Config) -> None:
    """Look up every name and parameter that the config says. Raises UserError before anything is loaded."""
    DATASETS[config.data.name]
    build_augment(config.data.augment)
    models = [config.student, *([config.teacher] if config.teacher else []), *config.teachers.values()]
    specs: list[tuple[Registry, Any, str]] = [
        (TASKS, config.task, "task"),
        (ESTIMATORS, config.search.estimator, "search.estimator"),
        (WEIGHTINGS, config.search.weighting, "search.weighting"),
        *((LOSSES, {"name": term.loss, **split_processes(term.params, Clock(1))[0]}, "terms") for term in config.terms),
    ]
    if config.pathways is not None:
        specs.append((DISTANCES, config.pathways.distance, "pathways.distance"))
        specs += [(TRANSFORMS, transform, "pathways.transforms") for transform in config.pathways.transforms]
    for model in models:
        if ":" not in model.model:
            specs.append((MODELS, {"name": model.model, **model.params}, "model"))
    for registry, spec, what in specs:
        name, params = parse_spec(spec, what)
        check_parameters(f"{what} '{name}'", registry[name], params)


def build_data(config: Config) -> Dataset:
    """The config's data set."""
    data = config.data
    root = {} if data.root is None else {"root": data.root}
    return load_data(
        data.name,
        samples=data.samples,
        classes=data.classes,
        seed=config.seed if data.seed is None else data.seed,
        mean=data.mean,
        std=data.std,
        **root,
        **data.params,
    )


def build_loader(config: Config, data: Dataset, part: Any, *, training: bool, batch_size: int | None = None) -> Loader:
    """Batches of a split: shuffled and augmented for training, in order and plain for evaluation. Training images are
    followed by their rotations where a term reads them."""
    return Loader(
        part,
        distributed.share(batch_size or config.training.batch_size),
        mean=data.mean,
        std=data.std,
        augment=config.data.augment if training else (),
        shuffle=training,
        seed=config.seed,
        drop_last=training and config.training.drop_last,
        device=device_of(config),
        channels_last=config.channels_last,
        workers=config.data.workers,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        rotations=training and any(LOSSES[term.loss].views > 1 for term in config.terms),  # type: ignore[attr-defined]
        augment_epochs=config.data.augment_epochs if training else None,
        num_classes=data.num_classes,
    )


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


def build_optimizer(config: Config, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The config's optimiser, in its fused form where there is one that serves."""
    o = config.training.optimizer
    if o.name == "sgd":
        nesterov = o.nesterov and o.momentum > 0 and o.dampening == 0
        fused = (
            o.dampening == 0
        )  # dampening treats a first step apart, and a fused step cannot mix first and later ones
        sgd = torch.optim.SGD(params, o.lr, o.momentum, o.dampening, o.weight_decay, nesterov=nesterov, fused=fused)
        if fused and o.momentum:
            for p in params:  # of a term that is dropped at first, the first gradient comes late
                sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return sgd
    kind = torch.optim.AdamW if o.name == "adamw" else torch.optim.Adam
    return kind(params, o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=True)


def distill_scale(config: Config, steps_per_epoch: int) -> Callable[[int], float]:
    """λ as a function of the step: `distill_weight`, after ReviewKD's warm-up min(epoch / W, 1), epochs from 1."""
    weight, warmup = config.training.distill_weight, config.training.distill_warmup
    return lambda step: weight * (min(1.0, (step // steps_per_epoch + 1) / warmup) if warmup else 1.0)


def _trainer(
    config: Config,
    objective: Objective,
    optimizer: Any,
    weights: Weights,
    train: Loader,
    test: Loader,
    folder: Path | None,
    name: str,
) -> Trainer:
    rate = config.training.learning_rate
    return Trainer(
        objective,
        build_task(config),
        optimizer,
        weights,
        train,
        test,
        epochs=config.training.epochs,
        learning_rate=LearningRate(rate.name, rate.milestones, rate.gamma, rate.warmup_epochs),
        folder=folder,
        max_steps=config.training.max_steps,
        clip_norm=config.training.clip_norm,
        clip_by=config.training.clip_by,
        log_every=config.tracking.log_every,
        evaluate_every=config.tracking.evaluate_every,
        checkpoint_every=config.tracking.checkpoint_every,
        name=name,
    )


def build_search(config: Config, data: Dataset, folder: Path | None = None) -> Trainer:
    """A trainer whose weights are searched (Algorithm 1, lines 1-7). Its `weights` is the `Searcher`."""
    if config.precision == "float16":
        raise UserError(
            "precision: a search runs in float32 or bfloat16; float16's loss scaling would scale α's gradient"
        )
    if not config.has_teacher:
        raise UserError("a search needs a teacher")
    if config.stages:
        raise UserError("stages: a search is one training; stages are for a retrain")
    for n, term in enumerate(config.terms):
        if term.weight == "schedule" or reduction_of(term.weight) is not None:
            raise UserError(
                f"terms.{n}.weight: a search has no schedule to follow (allowed: learned, a number, a process)"
            )
    if config.task_weight == 0:
        raise UserError("task_weight: a search learns from the task loss, it cannot be 0")
    search = config.search
    validation_part, train_part = split(data.train, search.validation_fraction, config.seed)
    train = build_loader(config, data, train_part, training=True)
    validation = build_loader(config, data, validation_part, training=True, batch_size=search.validation_batch_size)
    total = config.training.epochs * len(train)
    total = min(total, config.training.max_steps or total)
    objective = build_objective(config, data, train_part, Clock(total, len(train)))
    optimizer = build_optimizer(config, objective.trainable_parameters())
    estimator_name, estimator_params = parse_spec(search.estimator, "search.estimator")
    if distributed.world_size() > 1:
        if estimator_name == "unrolled":
            raise UserError("search.estimator: unrolled runs in one process (allowed: forward_mode, finite_difference)")
        if estimator_name == "forward_mode" and config.sync_batch_norm:
            raise UserError(
                "sync_batch_norm: forward_mode cannot see through it; use finite_difference, or leave it out"
            )
    clip_norm, clip_by = config.training.clip_norm, config.training.clip_by
    estimator = ESTIMATORS.build(estimator_name, objective, optimizer, clip_norm, clip_by, **estimator_params)
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
        learning_rate=search.learning_rate,
        optimizer=search.optimizer,
        betas=search.betas,
        momentum=search.momentum,
        every=search.every,
        threshold=search.threshold,
        revive_every=search.revive_every,
        repeats=search.repeats,
        scale=distill_scale(config, len(train)),
        measure=None if how == "none" else measure,
        rate=(lambda: optimizer.param_groups[0]["lr"] / config.training.optimizer.lr)
        if search.per_rate
        else lambda: 1.0,
    )
    objective.cache = build_cache(config, data, objective)
    test = build_loader(config, data, data.test, training=False)
    return _trainer(config, objective, optimizer, searcher, train, test, folder, "search")


def build_retrain(
    config: Config,
    data: Dataset,
    schedule: Schedule | None,
    folder: Path | None = None,
    carry: Carry | None = None,
) -> Trainer:
    """A trainer whose weights replay a schedule or a control (lines 8-14), on the whole training set.

    ``carry``: what a stage takes over from the one before.
    """
    retrain = config.retrain
    train = build_loader(config, data, data.train, training=True)
    total = config.training.epochs * len(train)
    total = min(total, config.training.max_steps or total)
    objective = build_objective(config, data, data.train, Clock(total, len(train)), carry)
    weights = replay(
        objective,
        retrain.weights,
        total,
        schedule,
        retrain.threshold,
        distill_scale(config, len(train)),
        retrain.mapping,
        retrain.start,
        config.seed,
    )
    if not objective.computes_task and not objective.entries:
        raise UserError("task_weight is 0 and there is no term: nothing to train")
    objective.cache = build_cache(config, data, objective)
    optimizer = build_optimizer(config, objective.trainable_parameters())
    test = build_loader(config, data, data.test, training=False)
    return _trainer(config, objective, optimizer, weights, train, test, folder, f"retrain ({retrain.weights})")
