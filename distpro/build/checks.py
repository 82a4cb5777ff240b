"""What a config says is looked up, and refused where no run could do it, before anything is loaded."""

from __future__ import annotations

from typing import Any

from distpro.build.given import OBJECT
from distpro.build.optimizer import OPTIMIZERS, find_optimizer
from distpro.build.terms import check_moving, split_processes
from distpro.config.schema import Config
from distpro.data import DATASETS, build_augment
from distpro.losses import LOSSES, DistillationLoss
from distpro.models import MODELS
from distpro.objective import Objective
from distpro.process import Clock, learned_of, reduction_of
from distpro.schedule import TASK
from distpro.search.estimators import ESTIMATORS
from distpro.search.searcher import check_learned
from distpro.search.weighting import WEIGHTINGS
from distpro.tasks import METRICS, TASKS
from distpro.train.sinks import SINKS, check_sink
from pathways import DISTANCES, TRANSFORMS
from pathways.registry import Registry, UserError, check_parameters, is_code
from pathways.space import parse_spec


def check_names(config: Config) -> None:
    """Look up every name and parameter that the config says. Raises UserError before anything is loaded."""
    if not config.data.name.startswith(OBJECT):
        DATASETS[config.data.name]
    build_augment(config.data.augment)
    models = [config.student, *([config.teacher] if config.teacher else []), *config.teachers.values()]
    specs: list[tuple[Registry, Any, str]] = [
        (TASKS, config.task, "task"),
        (ESTIMATORS, config.search.estimator, "search.estimator"),
        (WEIGHTINGS, config.search.weighting, "search.weighting"),
    ]
    terms = [(term.loss, *split_processes(term.params, Clock(1))) for term in config.terms]
    specs += [(LOSSES, {"name": loss, **params}, "terms") for loss, params, *_ in terms]
    if config.pathways is not None:
        specs.append((DISTANCES, config.pathways.distance, "pathways.distance"))
        specs += [(TRANSFORMS, transform, "pathways.transforms") for transform in config.pathways.transforms]
    specs += [(METRICS, metric, "metrics") for metric in config.metrics]
    specs += [(SINKS, sink, "tracking.sinks") for sink in config.tracking.sinks]
    for sink in config.tracking.sinks:
        check_sink(parse_spec(sink, "tracking.sinks")[0])
    find_optimizer(config.training.optimizer)
    for model in models:
        new = [parse_spec(spec, "replace") for spec in model.replace.values()]
        named = [(model.model, model.params), *new]
        specs += [(MODELS, {"name": name, **params}, "model") for name, params in named if ":" not in name]
    for registry, spec, what in specs:
        name, params = parse_spec(spec, what)
        if name.startswith(OBJECT):
            continue
        check_parameters(f"{what} '{name}'", registry[name], params)
    for loss, _, moving, learned in terms:
        kind: Any = LOSSES[loss]
        if not (isinstance(kind, type) and issubclass(kind, DistillationLoss)):
            derived = "derived from distpro.losses.DistillationLoss"
            raise UserError(f"loss '{loss}' is not a class {derived}, which says what a loss reads")
        check_moving(loss, kind, [*moving, *learned])


def check_search(config: Config) -> None:
    """Raise UserError for what a search cannot do, as far as the config alone says it."""
    if config.precision == "float16":
        raise UserError(
            "precision: a search runs in float32 or bfloat16; float16's loss scaling would scale α's gradient"
        )
    if not config.has_teacher:
        raise UserError("a search needs a teacher")
    if config.training.distill_weight == 0:
        raise UserError("training.distill_weight: at 0 no term has an effect, and a search has nothing to learn")
    if config.training.accumulate > 1:
        raise UserError("training.accumulate: a search's step is one batch; choose a larger training.batch_size")
    for key in ("ema", "keep", "patience", "validation_fraction"):
        if getattr(config.training, key) != type(config.training).model_fields[key].default:
            raise UserError(
                f"training.{key}: a search keeps a schedule and no student; for the retrain say retrain.training.{key}"
            )
    optimizer = config.training.optimizer.name
    if optimizer not in OPTIMIZERS and not is_code(optimizer):
        raise UserError(
            f"training.optimizer.name: the step of {optimizer} has no known derivative, which a search needs (allowed: "
            f"{', '.join(OPTIMIZERS)}; for the retrain alone say retrain.training.optimizer.name={optimizer})"
        )
    if config.stages:
        raise UserError("stages: a search is one training; stages are for a retrain")
    if config.retrain.weights == "uncertainty":
        raise UserError(
            "retrain.weights: uncertainty trains its weights in the retrain and would ignore those of a search; leave it out here, and "
            "say retrain.weights=uncertainty to the retrain"
        )
    for n, term in enumerate(config.terms):
        if term.weight == "schedule" or reduction_of(term.weight) is not None:
            raise UserError(
                f"terms.{n}.weight: a search has no schedule to follow (allowed: learned, a number, a process)"
            )
    if config.task_weight == 0:
        raise UserError("task_weight: a search learns from the task loss, it cannot be 0")
    name, _ = parse_spec(config.search.estimator, "search.estimator")
    if config.search.horizon != 1 and name not in ("auto", "sweep", "unrolled"):
        raise UserError(
            f"search.estimator: {name} looks one step back; with a horizon of {config.search.horizon}: sweep or unrolled"
        )

    _check_rounds(config, name)


def _check_rounds(config: Config, estimator: str) -> None:
    search = config.search
    if not search.rounds:
        return
    asks = {
        "search.weighting": (search.weighting in ("log", {"log": {}}, {"name": "log"}), "log"),
        "search.estimator": (estimator in ("auto", "sweep"), "auto, sweep"),
        "search.threshold": (search.threshold is None, "null"),
        "search.repeats": (not search.repeats, "false"),
        "search.every": (search.every == 1, "1"),
    }
    for key, (right, allowed) in asks.items():
        if not right:
            raise UserError(
                f"{key}: with search.rounds, which move the weights of a whole training (allowed: {allowed})"
            )


def check_learns(config: Config, objective: Objective) -> None:
    """Raise UserError where a search has nothing to learn, or a number beside the weights that it cannot learn."""
    name, _ = parse_spec(config.search.estimator, "search.estimator")
    if name == "auto":
        name = "forward_mode" if config.search.horizon == 1 else "sweep"
    check_learned(objective, ESTIMATORS[name], learned_scalars(config, objective))  # type: ignore[arg-type]


def check_accumulate(config: Config, batches: int) -> None:
    """Raise UserError where a step of a retrain is to take more batches than an epoch has."""
    if config.training.accumulate > batches:
        raise UserError(
            f"training.accumulate is {config.training.accumulate}, but an epoch has {batches} batches: no step could take "
            "more (a step ends with its epoch)"
        )


def learned_scalars(config: Config, objective: Objective) -> list[str]:
    """Names of the numbers beside the weights that a search learns, as a schedule has them. Raises UserError where it cannot."""
    task = [TASK] if learned_of(config.task_weight) is not None else []
    found = task + [f"{term.key}.{path}" for term in objective.terms for path in getattr(term, "learned", ())]
    if found and config.search.rounds:
        raise UserError(
            f"search.rounds: {', '.join(found)} can be learned by a search in one pass alone (search.rounds: 0)"
        )
    return found
