"""The composition root: a checked config → live objects. The only file that knows everyone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distpro.config import Config, ModelConfig, TermConfig
from distpro.data import DATASETS, Dataset, Loader, build_augment, load_data, split
from distpro.data.datasets import locate
from distpro.hypergradient import ESTIMATORS
from distpro.losses import LOSSES, build_loss
from distpro.models import MODELS, build_model, load_checkpoint, stage_taps
from distpro.objective import Objective, Term
from distpro.retrainer import replay
from distpro.schedule import Schedule
from distpro.searcher import Searcher
from distpro.tasks import TASKS
from distpro.trainer import LearningRate, Trainer, Weights
from distpro.weighting import WEIGHTINGS
from pathways import DISTANCES, TRANSFORMS, build_pathways, connect, find_stages, probe_shapes
from pathways.registry import Registry, UserError, check_parameters
from pathways.space import parse_spec
from pathways.taps import LOGITS, check_taps

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
IMAGE_SETS = {"cifar10": (10, (3, 32, 32)), "cifar100": (100, (3, 32, 32))}


@dataclass
class Pair:
    """Teacher and student with the taps that the config's terms may read."""

    teacher: nn.Module | None
    student: nn.Module
    teacher_taps: list[str]
    student_taps: list[str]
    example_input: Tensor


def device_of(config: Config) -> torch.device:
    """The config's device; ``auto`` is CUDA if there is one. Raises UserError for one that is not there."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device: '{name}' is no device (allowed: auto, cpu, cuda, cuda:N)") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: '{name}' asked for, but CUDA is not available here")
    return device


def check_names(config: Config) -> None:
    """Look up every name and parameter that the config says. Raises UserError before anything is loaded."""
    DATASETS[config.data.name]
    build_augment(config.data.augment)
    specs: list[tuple[Registry, Any, str]] = [
        (TASKS, config.task, "task"),
        (ESTIMATORS, config.search.estimator, "search.estimator"),
        (WEIGHTINGS, config.search.weighting, "search.weighting"),
        *((LOSSES, {"name": term.loss, **term.params}, "terms") for term in config.terms),
    ]
    if config.pathways is not None:
        specs.append((DISTANCES, config.pathways.distance, "pathways.distance"))
        specs += [(TRANSFORMS, transform, "pathways.transforms") for transform in config.pathways.transforms]
    for model in (config.student, config.teacher):
        if model is not None and ":" not in model.model:
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
        seed=config.seed,
        mean=data.mean,
        std=data.std,
        **root,
        **data.params,
    )


def build_loader(config: Config, data: Dataset, part: Any, *, training: bool, batch_size: int | None = None) -> Loader:
    """Batches of a split: shuffled and augmented for training, in order and plain for evaluation."""
    return Loader(
        part,
        batch_size or config.training.batch_size,
        mean=data.mean,
        std=data.std,
        augment=config.data.augment if training else (),
        shuffle=training,
        seed=config.seed,
        drop_last=training and config.training.drop_last,
        device=device_of(config),
        channels_last=config.channels_last,
        workers=config.data.workers,
    )


def build_network(model: ModelConfig, num_classes: int, load: bool = True) -> nn.Module:
    """A model with its checkpoint, if the config names one."""
    classes = {} if "num_classes" in model.params else {"num_classes": num_classes}
    network = build_model(model.model, **classes, **model.params)
    if model.checkpoint and load:
        load_checkpoint(network, locate("checkpoint", model.checkpoint))
    return network


def place(network: nn.Module, config: Config) -> nn.Module:
    """The network on the config's device, in its memory layout."""
    network = network.to(device_of(config))
    return network.to(memory_format=torch.channels_last) if config.channels_last else network


def build_pair(config: Config, num_classes: int, image_shape: tuple[int, ...], load: bool = True) -> Pair:
    """Teacher (if any term needs one) and student, on the device, the student initialised from the seed."""
    device = device_of(config)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    torch.manual_seed(config.seed)
    student = build_network(config.student, num_classes, load)
    teacher = None
    if config.teacher is not None and needs_teacher(config):
        if load and config.teacher.checkpoint is None:
            raise UserError("teacher.checkpoint is missing: a teacher with random weights teaches nothing")
        teacher = place(build_network(config.teacher, num_classes, load), config).eval()
    student = place(student, config)
    x = torch.zeros(2, *image_shape, device=device).contiguous(memory_format=memory_format)
    return Pair(
        teacher,
        student,
        taps_of(config.teacher, teacher, x, before_relu=True) if teacher is not None and config.teacher else [],
        taps_of(config.student, student, x, before_relu=False) if needs_teacher(config) else [],
        x,
    )


def needs_teacher(config: Config) -> bool:
    """Whether the config has any distillation term."""
    return config.retrain.weights != "none" and bool(config.pathways or config.terms)


def taps_of(config: ModelConfig, model: nn.Module, x: Tensor, before_relu: bool) -> list[str]:
    """The taps that the config names; else those that the model states; else its stages as found by a probe, read
    before their last ReLU where asked and where they end in one."""
    if config.taps is not None:
        check_taps(model, config.taps, config.model)
        return config.taps
    stated = stage_taps(model)
    if stated is not None:
        return list(stated.pre if before_relu else stated.post)
    return [_before_relu(model, tap, x) if before_relu else tap for tap in find_stages(model, x)]


def _before_relu(model: nn.Module, tap: str, x: Tensor) -> str:
    try:
        probe_shapes(model, [f"{tap}:pre_relu"], x)
        return f"{tap}:pre_relu"
    except UserError:
        return tap


def build_terms(config: Config, pair: Pair) -> list[nn.Module]:
    """Pathways and other terms of the config, new parameters initialised from the seed (but not from the student's)."""
    terms: list[nn.Module] = []
    if not needs_teacher(config):
        return terms
    if pair.teacher is None:
        raise UserError("the config has distillation terms but no teacher")
    torch.manual_seed(config.seed + 1)
    if config.pathways is not None:
        space = config.pathways
        for pathway in build_pathways(
            pair.teacher,
            pair.student,
            pair.example_input,
            pair.teacher_taps,
            pair.student_taps,
            space.connect,
            space.transforms,
            space.distance,
        ):
            pathway.weight = space.weight  # type: ignore[assignment]
            terms.append(pathway)
    for term in config.terms:
        terms += _build_term(term, pair)
    return terms


def _build_term(config: TermConfig, pair: Pair) -> list[nn.Module]:
    kind = LOSSES[config.loss]
    student_taps = config.student_taps or _default_taps(kind.reads, pair.student, pair.student_taps)  # type: ignore[attr-defined]
    teacher_taps = config.teacher_taps or _default_taps(kind.reads, pair.teacher, pair.teacher_taps)  # type: ignore[attr-defined]
    assert pair.teacher is not None
    student_shapes = probe_shapes(pair.student, student_taps, pair.example_input)
    teacher_shapes = probe_shapes(pair.teacher, teacher_taps, pair.example_input)
    reduction = config.weight["schedule"] if isinstance(config.weight, dict) else None
    weight = float(config.weight) if isinstance(config.weight, (int, float)) else None
    key = config.key or config.loss
    groups: list[tuple[str, list[str], list[str], tuple[int, int, int] | None]]
    if config.connect is None:
        groups = [(key, student_taps, teacher_taps, None)]
    else:
        groups = [
            (f"{key}:{teacher_taps[i]}<-{student_taps[j]}", [student_taps[j]], [teacher_taps[i]], (i + 1, j + 1, 0))
            for i, j in connect(config.connect, teacher_taps, student_taps)
        ]
    terms: list[nn.Module] = []
    for name, ours, theirs, level in groups:
        loss = build_loss(
            config.loss, [student_shapes[t] for t in ours], [teacher_shapes[t] for t in theirs], **config.params
        ).to(pair.example_input.device)
        per_level = reduction == "teacher_level" and level is None
        terms.append(Term(loss, name, ours, theirs, weight, level, per_level, reduction))
    return terms


def _default_taps(reads: str, model: nn.Module | None, stages: list[str]) -> list[str]:
    if reads.startswith("logits"):
        return [LOGITS]
    if reads.startswith("embedding"):
        stated = stage_taps(model) if model is not None else None
        if stated is None:
            raise UserError("this loss reads an embedding: name student_taps and teacher_taps (for instance fc:input)")
        return [stated.embedding]
    return stages


def build_objective(config: Config, pair: Pair) -> Objective:
    """Objective of the pair with the config's terms."""
    name, params = parse_spec(config.task, "task")
    return Objective(
        pair.teacher,
        pair.student,
        build_terms(config, pair),
        example_input=pair.example_input,
        task_loss=TASKS.build(name, **params).loss,
        precision=PRECISIONS[config.precision],
        teacher_training=config.teacher_training,
    )


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
    task_name, params = parse_spec(config.task, "task")
    rate = config.training.learning_rate
    return Trainer(
        objective,
        TASKS.build(task_name, **params),
        optimizer,
        weights,
        train,
        test,
        epochs=config.training.epochs,
        learning_rate=LearningRate(rate.name, rate.milestones, rate.gamma, rate.warmup_epochs),
        folder=folder,
        max_steps=config.training.max_steps,
        clip_norm=config.training.clip_norm,
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
    if config.teacher is None:
        raise UserError("a search needs a teacher")
    search = config.search
    validation_part, train_part = split(data.train, search.validation_fraction, config.seed)
    train = build_loader(config, data, train_part, training=True)
    validation = build_loader(config, data, validation_part, training=True, batch_size=search.validation_batch_size)
    objective = build_objective(config, build_pair(config, data.num_classes, data.image_shape))
    optimizer = build_optimizer(config, objective.trainable_parameters())
    estimator_name, estimator_params = parse_spec(search.estimator, "search.estimator")
    estimator = ESTIMATORS.build(estimator_name, objective, optimizer, config.training.clip_norm, **estimator_params)
    weighting_name, weighting_params = parse_spec(search.weighting, "search.weighting")
    total = config.training.epochs * len(train)
    searcher = Searcher(
        objective,
        estimator,
        WEIGHTINGS.build(weighting_name, **weighting_params),
        validation.endless,
        total_steps=min(total, config.training.max_steps or total),
        learning_rate=search.learning_rate,
        optimizer=search.optimizer,
        betas=search.betas,
        momentum=search.momentum,
        every=search.every,
        threshold=search.threshold,
        revive_every=search.revive_every,
        repeats=search.repeats,
        scale=distill_scale(config, len(train)),
    )
    test = build_loader(config, data, data.test, training=False)
    return _trainer(config, objective, optimizer, searcher, train, test, folder, "search")


def build_retrain(config: Config, data: Dataset, schedule: Schedule | None, folder: Path | None = None) -> Trainer:
    """A trainer whose weights replay a schedule or a control (lines 8-14), on the whole training set."""
    retrain = config.retrain
    train = build_loader(config, data, data.train, training=True)
    objective = build_objective(config, build_pair(config, data.num_classes, data.image_shape))
    total = config.training.epochs * len(train)
    weights = replay(
        objective,
        retrain.weights,
        min(total, config.training.max_steps or total),
        schedule,
        retrain.threshold,
        distill_scale(config, len(train)),
        retrain.mapping,
    )
    optimizer = build_optimizer(config, objective.trainable_parameters())
    test = build_loader(config, data, data.test, training=False)
    return _trainer(config, objective, optimizer, weights, train, test, folder, f"retrain ({retrain.weights})")
