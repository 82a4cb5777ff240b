"""Every name and parameter of a config is looked up before anything is loaded."""

from __future__ import annotations

from typing import Any

from distpro.build.given import OBJECT
from distpro.build.optimizer import find_optimizer
from distpro.build.terms import check_moving, split_processes
from distpro.config.schema import Config
from distpro.data import DATASETS, build_augment
from distpro.losses import LOSSES
from distpro.models import MODELS
from distpro.process import Clock
from distpro.search.estimators.base import ESTIMATORS
from distpro.search.weighting import WEIGHTINGS
from distpro.tasks import METRICS, TASKS
from pathways import DISTANCES, TRANSFORMS
from pathways.registry import Registry, check_parameters
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
    find_optimizer(config.training.optimizer)
    for model in models:
        if ":" not in model.model:
            specs.append((MODELS, {"name": model.model, **model.params}, "model"))
    for registry, spec, what in specs:
        name, params = parse_spec(spec, what)
        if name.startswith(OBJECT):
            continue
        check_parameters(f"{what} '{name}'", registry[name], params)
    for loss, _, moving, learned in terms:
        check_moving(loss, LOSSES[loss], [*moving, *learned])  # type: ignore[arg-type]
