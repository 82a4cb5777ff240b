"""The commands as functions: search, retrain, tune, train, evaluate. Each run has a folder that says how to repeat it.

config.yaml       the resolved config          metrics.jsonl     numbers by step, as in TensorBoard
environment.json  versions, machine, revision  checkpoint.pt     whole state, for --resume
result.json       final metrics                student.pt        the trained student's weights
alpha.pt          the schedule (search)        data.json         what the data were
log.txt           notes, warnings, evaluations
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distpro import build
from distpro.build.device import settle_precision
from distpro.build.given import OBJECT, Given
from distpro.build.models import adapted, build_network, place
from distpro.config.reading import default_space, for_retrain, merge, of_retrain, read_config
from distpro.config.schema import Config, ModelConfig
from distpro.config.stages import Stage, stages_of
from distpro.console import warn
from distpro.data.datasets import locate
from distpro.files import load_safely
from distpro.losses import LOSSES
from distpro.models import LIBRARIES, load_checkpoint
from distpro.objective import Objective
from distpro.runs.folder import begun, open_folder, student_of
from distpro.runs.searching import run_search
from distpro.runs.stages import retrain_stages
from distpro.runs.training import Result, run_training, save_student
from distpro.runs.tuning import Request, Tuned, run_tune
from distpro.runs.unlike import said_of_schedule
from distpro.schedule import Schedule
from distpro.task import Task
from distpro.train import distributed
from distpro.train.evaluation import evaluate as evaluate_student
from pathways.registry import UserError
from pathways.space import parse_spec

Source = str | Path | Mapping[str, Any] | Config


def search(
    config: Source,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    *,
    data: Any = None,
    teacher: nn.Module | None = None,
    student: nn.Module | None = None,
    task: Task | None = None,
) -> Schedule:
    """Learn a schedule (Algorithm 1, lines 1-7) and write it to ``alpha.pt`` in the run's folder.

    Args:
        config: path of a YAML file, or a mapping.
        out: the run's folder; None keeps nothing on disk.
        overrides: ``key=value`` with dotted keys.
        resume: go on from the folder's checkpoint, to the numbers that an uninterrupted run gives.
        data: (train, test) or (train, validation, test), each a ``torch.utils.data.Dataset`` or ``DataLoader``, in
            place of the config's ``data``.
        teacher, student, task: objects in place of what the config names. A search trains a copy of the student; a
            retrain trains it in place, from the weights that it has.

    Raises UserError for bad input, `distpro.train.trainer.Interrupted` after SIGINT or SIGTERM (checkpoint and alpha.pt of
    the steps done are written first).
    """
    given = Given.of(data, teacher, student, task).copied()
    checked = _checked(config, overrides, searching=True, given=given)
    _check_schedule(checked, out)
    _prepare(checked)
    with distributed.started(checked.device):
        return run_search(checked, out, resume, given)


def retrain(
    config: Source | None = None,
    schedule: str | Path | Schedule | None = None,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    *,
    data: Any = None,
    teacher: nn.Module | None = None,
    student: nn.Module | None = None,
    task: Task | None = None,
) -> Result:
    """Train a student with a schedule or one of its controls (lines 8-14).

    Args:
        config: as of `search`; None takes the config that the schedule was searched with.
        schedule: path of an ``alpha.pt`` or a `Schedule`; by default what ``retrain.schedule`` names, if anything.
        out, overrides, resume, data, teacher, student, task: as of `search`.

    Raises UserError for bad input, `distpro.train.trainer.Interrupted` after SIGINT or SIGTERM.
    """
    given = Given.of(data, teacher, student, task)
    learned = schedule if isinstance(schedule, Schedule) else None if schedule is None else Schedule.load(schedule)
    checked = retrain_config(config, learned, overrides, given)
    stages = stages_of(checked)
    for stage in stages:
        _prepare(stage.config)
    if learned is None and checked.retrain.schedule is not None:
        learned = Schedule.load(checked.retrain.schedule)
    facts = _facts_of(learned, checked) if config is None and learned is not None else {}
    with distributed.started(checked.device):
        return _retrain(checked, stages, learned, out, resume, given, facts)


def _retrain(
    checked: Config,
    stages: Sequence[Stage],
    learned: Schedule | None,
    out: str | Path | None,
    resume: bool,
    given: Given,
    facts: Mapping[str, Any],
) -> Result:
    with open_folder(out, checked, resume) as folder:
        for doubt in said_of_schedule(learned, checked) if learned is not None else ():
            warn(doubt)
        if checked.stages:
            return retrain_stages(checked, stages, learned, folder, resume, given, facts)
        going_on = begun(folder, resume)
        recorded = build.as_stored(checked, folder) if going_on else checked
        data = build.build_data(build.as_stored(recorded, None, facts), given)
        trainer = build.build_retrain(checked, data, learned, folder, given=given)
        ended = partial(save_student, trainer.objective)
        metrics = run_training(trainer, checked, going_on, None, ended=ended, facts=data.facts)
        return Result(metrics, folder)


def tune(
    config: Source,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    *,
    schedule: str | Path | Schedule | None = None,
    workers: int = 1,
    data: Any = None,
    teacher: nn.Module | None = None,
    student: nn.Module | None = None,
    task: Task | None = None,
) -> Tuned:
    """Let single methods, constant weights and a learned schedule compete on validation data under one budget of trainings, by
    Optuna, and write leaderboard and ``best.yaml`` to the run's folder, which `retrain` trains on the whole training part.

    Args:
        config, out, overrides, resume, data, teacher, student, task: as of `search`; what is tried is under ``tune``. A run that
            is resumed may have another ``tune.trials``.
        schedule: an ``alpha.pt`` or a `Schedule` that takes part with its controls; by default what ``tune.schedule`` names.
        workers: processes on this machine, which import the main module anew: a script needs ``if __name__ == "__main__"``.

    Raises UserError for bad input and where Optuna is missing, `distpro.train.trainer.Interrupted` after SIGINT or SIGTERM.
    """
    given = Given.of(data, teacher, student, task).copied()
    request = tune_request(config, overrides, schedule, given)
    _prepare(request.config)
    with distributed.started(request.config.device):
        return run_tune(request, out, resume, workers)


def tune_request(
    config: Source, overrides: Sequence[str], schedule: str | Path | Schedule | None, given: Given
) -> Request:
    """What a tuning is about: the checked config, and a retrain's for each control of the learned schedule."""
    checked = _checked(config, overrides, searching=True, given=given)
    schedule = checked.tune.schedule if schedule is None else schedule
    if schedule is None or "learned" not in checked.tune.families:
        return Request(checked, {}, None, given)
    learned = schedule if isinstance(schedule, Schedule) else Schedule.load(schedule)
    if learned.path is not None:
        checked = checked.model_copy(update={"tune": checked.tune.model_copy(update={"schedule": learned.path})})
    plays = {
        control: retrain_config(config, learned, [*overrides, f"retrain.weights={control}"], given)
        for control in checked.tune.controls
    }
    same = {"precision": checked.precision, "search": checked.search}  # what is validated on, and how it is judged
    return Request(checked, {name: one.model_copy(update=same) for name, one in plays.items()}, learned, given)


def train(
    config: Source,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
    *,
    data: Any = None,
    student: nn.Module | None = None,
    task: Task | None = None,
) -> Result:
    """Plain training of the config's student: a teacher to be, or the baseline without one."""
    plain = [*overrides, "retrain.weights=none", "stages=[]"]
    return retrain(config, None, out, plain, resume, data=data, student=student, task=task)


def evaluate(
    target: str | Path,
    overrides: Sequence[str] = (),
    config: str | Path | None = None,
    *,
    data: Any = None,
    student: nn.Module | None = None,
    task: Task | None = None,
) -> dict[str, float]:
    """Metrics on the test set of a run's student, of a config's teacher, or of a checkpoint.

    Args:
        target: a run's folder; a config, whose teacher is evaluated; a checkpoint, which is loaded into the student of
            ``config``; or a folder of transformers, whose model takes that student's place.
        overrides: ``key=value`` on the config.
        data, student, task: objects, as of `search`; the student's architecture, into which the weights are loaded.

    Raises UserError if there is nothing to evaluate at ``target``.
    """
    path, given = Path(target), Given.of(data, None, student, task)
    teaches = (
        path.suffix in (".yaml", ".yml") and not path.is_dir()
    )  # then it sees what a student's images are made into
    of_hf = (path / "config.json").is_file() and not (path / "config.yaml").is_file()
    checkpoint: Path | None
    if of_hf and config is not None:
        student_config = {"model": f"hf:{path}", "params": {"pretrained": True}}
        checked, checkpoint = _checked(config, overrides, given=given), None
        checked = checked.model_copy(update={"student": ModelConfig.model_validate(student_config)})
    elif path.is_dir() and not of_hf:
        checkpoint = student_of(path)
        _refuse_another(config, path)
        checked = stages_of(_checked(path / "config.yaml", overrides, given=given))[-1].config
    elif teaches:
        _refuse_another(config, path)
        checked = _checked(path, overrides, given=given)
        if checked.teacher is None or checked.teacher.checkpoint is None:
            raise UserError(f"{path}: its teacher has no checkpoint to evaluate")
        checkpoint = locate("checkpoint", checked.teacher.checkpoint)
        checked = checked.model_copy(update={"student": checked.teacher})
    elif config is None and not path.exists():
        raise UserError(f"{path}: no such run or config (and a checkpoint needs --config CFG)")
    elif config is None:
        raise UserError(f"{path}: a checkpoint says nothing about its model and data: give --config CFG as well")
    else:
        checked, checkpoint = _checked(config, overrides, given=given), locate("checkpoint", path)
    _prepare(checked)
    if not teaches:
        checked = build.as_stored(checked, path if checkpoint is None or path.is_dir() else checkpoint.parent)
    loaded, does = build.build_data(checked, given), build.build_task(checked, given)
    model = given.student
    if model is None:
        model = build_network(checked.student, does.model_arguments(loaded), load=False)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint, weights=checked.student.weights)
    if checked.student.input is not None:
        model = adapted(model, checked.student, loaded)
    terms = path / "terms.pt" if path.is_dir() else None
    if terms is not None and any(LOSSES[term.loss].deploys for term in checked.terms):  # type: ignore[attr-defined]
        objective = build.build_deployed(checked, loaded, model, load_safely(terms))
    else:
        objective = Objective(None, place(model, checked), precision=build.PRECISIONS[checked.precision], task=does)
    loader = build.build_loader(checked, loaded, loaded.test, training=False)
    return evaluate_student(objective, build.metrics_of(checked, does)(), loader)


def _refuse_another(config: str | Path | None, path: Path) -> None:
    if config is not None:
        raise UserError(
            f"{path}: has a config already, --config {config} is for a bare checkpoint: other data are given by overrides, "
            "data.root=..."
        )


def retrain_config(
    config: Source | None, schedule: Schedule | None, overrides: Sequence[str], given: Given | None = None
) -> Config:
    """The checked config of a retrain: the one given, or the schedule's own. λ with its warm-up, threshold and start are
    the schedule's where the given config and the overrides say nothing of them. A schedule that was read from a file is
    named in it, so that a resumed run has the same one."""
    if schedule is not None and schedule.path is not None:
        checked = retrain_config(config, replace(schedule), overrides, given)
        named = checked.retrain.model_copy(update={"schedule": schedule.path})  # as it is: YAML would not take any path
        return checked.model_copy(update={"retrain": named})
    if config is not None:
        checked = for_retrain(_checked(config, of_retrain(overrides), given=given, schedule=schedule))
        if schedule is None and checked.retrain.schedule is not None:
            return retrain_config(config, Schedule.load(checked.retrain.schedule), overrides, given)
        return checked
    if schedule is None:
        raise UserError("retrain needs a config, a schedule, or both")
    stored = schedule.meta.get("config")
    if not isinstance(stored, Mapping):
        raise UserError("this schedule holds no config: give one")
    its_own = {f"{key}={name}" for key, name in _code_of_all(for_retrain(read_config(stored)))}
    others = [said for said in overrides if said not in its_own]  # to repeat a name changes nothing, it trusts it
    checked = for_retrain(_checked(_with_said(stored, schedule), of_retrain(others), given=given))
    said = " ".join(override.partition("=")[2] for override in overrides)
    for key, name in _code_of_all(checked):
        if not re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.]|:\w)", said):
            raise UserError(
                f"the schedule's config names code of its own, {key} '{name}'. A schedule file never runs code by "
                f"itself: if you trust it, repeat it as {key}={name}, or give a config"
            )
    return checked


def _facts_of(schedule: Schedule, config: Config) -> Mapping[str, Any]:
    """What a schedule says of its search's data, where a retrain by its own config is on the same ones; else {}."""
    same = {"name", "root", "params"}
    searched = read_config(schedule.meta["config"]).data.model_dump(include=same)
    return schedule.meta.get("data", {}) if config.data.model_dump(include=same) == searched else {}


def _code_of_all(config: Config) -> list[tuple[str, str]]:
    """`_code_named_in` of every training that a config asks for."""
    return [found for stage in stages_of(config) for found in _code_named_in(stage.config)]


def _code_named_in(config: Config) -> list[tuple[str, str]]:
    """(key, name) of everything in a config that is imported and run."""
    models = {"teacher.model": config.teacher, "student.model": config.student}
    models |= {f"teachers.{name}.model": member for name, member in config.teachers.items()}
    known = {key: m for key, m in models.items() if m is not None}
    named = [(key, m.model) for key, m in known.items()]
    new = [(f"{key[:-6]}.replace.{path}", spec) for key, m in known.items() for path, spec in m.replace.items()]
    named += [(key, parse_spec(spec, key)[0]) for key, spec in new]
    named = [(key, name) for key, name in named if name.partition(":")[0] not in LIBRARIES]
    named += [("data.name", config.data.name), ("task", parse_spec(config.task, "task")[0])]
    named += [("metrics", parse_spec(metric, "metrics")[0]) for metric in config.metrics]
    named += [("training.optimizer.name", config.training.optimizer.name)]
    named += [(f"terms.{n}.loss", term.loss) for n, term in enumerate(config.terms)]
    if config.pathways is not None:
        named += [("pathways.transforms", parse_spec(t, "transform")[0]) for t in config.pathways.transforms]
        named += [("pathways.distance", parse_spec(config.pathways.distance, "distance")[0])]
    return [(key, name) for key, name in named if ":" in name and not name.startswith(OBJECT)]


def _checked(
    config: Source,
    overrides: Sequence[str],
    searching: bool = False,
    given: Given | None = None,
    schedule: Schedule | None = None,
) -> Config:
    objects = given.overrides() if given is not None else []
    source = config.model_dump(exclude_unset=True) if isinstance(config, Config) else config
    below = {} if schedule is None else _said_by(schedule)
    space: Any = default_space if searching else None if schedule is None else _space_of(schedule)
    return settle_precision(read_config(source, [*overrides, *objects], below, space), searching)


def _space_of(schedule: Schedule) -> dict[str, Any] | None:
    """The pathways and terms that a schedule was searched with; None where they name code of somebody's own, which a file
    does not run."""
    stored = schedule.meta.get("config")
    if not isinstance(stored, Mapping):
        return None
    space = {key: stored[key] for key in ("pathways", "terms") if key in stored}
    config = read_config({"student": {"model": ""}, **space})
    return None if any(key.startswith(("terms", "pathways")) for key, _ in _code_named_in(config)) else space


def _said_by(schedule: Schedule) -> dict[str, Any]:
    """What a schedule says of its replay, as a config says it. Its warm-up is null: it is stretched with the schedule."""
    return {
        "training": {"distill_weight": schedule.strength, "distill_warmup": None if schedule.warmup else 0.0},
        "retrain": {"threshold": schedule.threshold, "start": schedule.start},
    }


def _with_said(config: Mapping[str, Any], schedule: Schedule) -> dict[str, Any]:
    """A schedule's own config with what the schedule says."""
    said = merge(config, _said_by(schedule))
    different = said["retrain"].get("training") or {}
    kept = {name: value for name, value in different.items() if name not in ("distill_weight", "distill_warmup")}
    return {**said, "retrain": {**said["retrain"], "training": kept}}


def _check_schedule(config: Config, out: str | Path | None) -> None:
    """Of a search, whose retrain is to follow a schedule: what is there, or what the search will write."""
    named = config.retrain.schedule
    if named is not None and not Path(named).exists() and (out is None or Path(named) != Path(out) / "alpha.pt"):
        raise UserError(f"retrain.schedule: no such file {named} (a search writes its own, and has no use for it)")


def _prepare(config: Config) -> None:
    """What comes before anything is loaded."""
    build.check_names(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
