"""The commands as functions: search, retrain, train, evaluate. Each run has a folder that says how to repeat it.

config.yaml       the resolved config          metrics.jsonl     numbers by step, as in TensorBoard
environment.json  versions, machine, revision  checkpoint.pt     whole state, for --resume
result.json       final metrics                student.pt        the trained student's weights
alpha.pt          the schedule (search)
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from distpro import build, distributed
from distpro.checkpoint import load_safely, save_atomically, write_atomically
from distpro.config import Config, read_config
from distpro.console import note
from distpro.data import Dataset
from distpro.data.datasets import locate
from distpro.describe import teacher_name
from distpro.losses import LOSSES
from distpro.models import load_checkpoint
from distpro.objective import Objective, Term
from distpro.pair import build_network, device_of, fastest_precision, place
from distpro.plots import heatmap_figure, schedule_figure
from distpro.schedule import Schedule
from distpro.searcher import Searcher
from distpro.stages import Carry, Stage, stages_of
from distpro.tracking import Tracker
from distpro.trainer import Trainer, test
from pathways.registry import UserError
from pathways.space import parse_spec

Source = str | Path | Mapping[str, Any] | Config


@dataclass(frozen=True)
class Result:
    """What a training came to: final ``metrics`` by name, and the run's folder (None if nothing was kept)."""

    metrics: dict[str, float]
    folder: Path | None


def search(
    config: Source, out: str | Path | None = None, overrides: Sequence[str] = (), resume: bool = False
) -> Schedule:
    """Learn a schedule (Algorithm 1, lines 1-7) and write it to ``alpha.pt`` in the run's folder.

    Args:
        config: path of a YAML file, or a mapping.
        out: the run's folder; None keeps nothing on disk.
        overrides: ``key=value`` with dotted keys.
        resume: go on from the folder's checkpoint, to the numbers that an uninterrupted run gives.

    Raises UserError for bad input, `distpro.trainer.Interrupted` after SIGINT or SIGTERM (checkpoint and alpha.pt of
    the steps done are written first).
    """
    checked = _checked(config, overrides, searching=True)
    _prepare(checked)
    with distributed.started(checked.device):
        return _search(checked, out, resume)


def _search(checked: Config, out: str | Path | None, resume: bool) -> Schedule:
    folder = _open_folder(out, checked, resume)
    data = build.build_data(checked)
    trainer = build.build_search(checked, data, folder)
    searcher = trainer.weights
    assert isinstance(searcher, Searcher)
    meta = _schedule_meta(checked, data, trainer.objective)

    def write() -> None:
        if folder is not None:
            searcher.schedule(trainer.steps_per_epoch, meta).save(folder / "alpha.pt")

    trainer.on_checkpoint = write
    _run(trainer, checked, resume, searcher)
    return searcher.schedule(trainer.steps_per_epoch, meta)


def retrain(
    config: Source | None = None,
    schedule: str | Path | Schedule | None = None,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    resume: bool = False,
) -> Result:
    """Train a student with a schedule or one of its controls (lines 8-14).

    Args:
        config: as of `search`; None takes the config that the schedule was searched with.
        schedule: path of an ``alpha.pt`` or a `Schedule`; by default what ``retrain.schedule`` names, if anything.
        out, overrides, resume: as of `search`.

    Raises UserError for bad input, `distpro.trainer.Interrupted` after SIGINT or SIGTERM.
    """
    if isinstance(schedule, (str, Path)):  # for the run's folder, so that a resumed run has the same one
        overrides = [*overrides, f"retrain.schedule={json.dumps(str(schedule))}"]
    checked = retrain_config(config, schedule, overrides)
    stages = stages_of(checked)
    for stage in stages:
        _prepare(stage.config)
    learned = _schedule_of(checked, schedule)
    with distributed.started(checked.device):
        return _retrain(checked, stages, learned, out, resume)


def _retrain(
    checked: Config, stages: Sequence[Stage], learned: Schedule | None, out: str | Path | None, resume: bool
) -> Result:
    folder = _open_folder(out, checked, resume)
    if checked.stages:
        return _retrain_stages(checked, stages, learned, folder, resume)
    trainer = build.build_retrain(checked, build.build_data(checked), learned, folder)
    metrics = _run(trainer, checked, resume, None)
    if folder is not None:
        _save_student(trainer.objective, folder)
    return Result(metrics, folder)


def _save_student(objective: Objective, folder: Path, terms: bool = False) -> None:
    """What a finished training leaves: the student, and the terms where the student needs them or ``terms`` says so."""
    if not distributed.is_main():
        return
    if terms or any(hasattr(getattr(term, "loss", None), "predict") for term in objective.terms):
        save_atomically(_term_states(objective), folder / "terms.pt")
    save_atomically(objective.student.model.state_dict(), folder / "student.pt")


def _term_states(objective: Objective) -> dict[str, dict[str, Any]]:
    return {term.key: term.loss.state_dict() for term in objective.terms if isinstance(term, Term)}


def _retrain_stages(
    config: Config, stages: Sequence[Stage], schedule: Schedule | None, folder: Path | None, resume: bool
) -> Result:
    """One training per stage, each in a folder of its own; a resumed run skips those that have ended."""
    if folder is not None and not resume and distributed.is_main():
        _record(config, folder)
    data, carry, metrics = None, Carry(), {}
    for n, stage in enumerate(stages):
        distributed.any_of(False)  # nobody looks at the folders before everybody has left the stage before
        inner = None if folder is None else folder / stage.name
        taken = Carry(
            None if stage.fresh else carry.student, carry.student if stage.previous_teaches else None, carry.terms
        )
        if inner is not None and resume and (inner / "result.json").is_file():
            carry = Carry(load_safely(inner / "student.pt"), None, {**carry.terms, **load_safely(inner / "terms.pt")})
            metrics = json.loads((inner / "result.json").read_text())
            continue
        settings = stage.config
        if folder is not None and stage.previous_teaches and settings.teacher is not None:
            before = str(folder / stages[n - 1].name / "student.pt")
            settings = settings.model_copy(
                update={"teacher": settings.teacher.model_copy(update={"checkpoint": before})}
            )
        if data is None or settings.data != stages[n - 1].config.data:
            data = build.build_data(settings)
        going_on = inner is not None and resume and (inner / "checkpoint.pt").is_file()
        trainer = build.build_retrain(settings, data, schedule, inner, taken)
        metrics = _run(trainer, settings, going_on, None, ended=partial(_save_student, trainer.objective, terms=True))
        student = {k: v.detach().clone() for k, v in trainer.objective.student.model.state_dict().items()}
        carry = Carry(student, None, {**carry.terms, **_term_states(trainer.objective)})
    if folder is not None and distributed.is_main():
        last = folder / stages[-1].name
        for name in ("terms.pt", "student.pt"):
            save_atomically(load_safely(last / name), folder / name)
        write_atomically(json.dumps(metrics, indent=1) + "\n", folder / "result.json")
    return Result(metrics, folder)


def train(config: Source, out: str | Path | None = None, overrides: Sequence[str] = (), resume: bool = False) -> Result:
    """Plain training of the config's student: a teacher to be, or the baseline without one."""
    return retrain(config, None, out, [*overrides, "retrain.weights=none", "stages=[]"], resume)


def evaluate(target: str | Path, overrides: Sequence[str] = (), config: str | Path | None = None) -> dict[str, float]:
    """Metrics on the test set of a run's student, of a config's teacher, or of a checkpoint.

    Args:
        target: a run's folder; a config, whose teacher is evaluated; or a checkpoint, which is loaded into the student
            of ``config``.
        overrides: ``key=value`` on the config.

    Raises UserError if there is nothing to evaluate at ``target``.
    """
    path = Path(target)
    if path.is_dir():
        checked, checkpoint = read_config(path / "config.yaml", overrides), path / "student.pt"
        checked = stages_of(checked)[-1].config
        if not checkpoint.is_file():
            raise UserError(f"{path}: no student.pt; has the training ended?")
    elif path.suffix in (".yaml", ".yml"):
        checked = read_config(path, overrides)
        if checked.teacher is None or checked.teacher.checkpoint is None:
            raise UserError(f"{path}: its teacher has no checkpoint to evaluate")
        checkpoint = locate("checkpoint", checked.teacher.checkpoint)
        checked = checked.model_copy(update={"student": checked.teacher})
    elif config is None:
        raise UserError(f"{path}: a checkpoint says nothing about its model and data: give --config CFG as well")
    else:
        checked, checkpoint = read_config(config, overrides), locate("checkpoint", path)
    _prepare(checked)
    data = build.build_data(checked)
    model = build_network(checked.student, data.num_classes, load=False)
    load_checkpoint(model, checkpoint)
    terms = path / "terms.pt" if path.is_dir() else None
    if terms is not None and any(hasattr(LOSSES[term.loss], "predict") for term in checked.terms):
        objective = build.build_deployed(checked, data, model, load_safely(terms))
    else:
        objective = Objective(None, place(model, checked), precision=build.PRECISIONS[checked.precision])
    task, loader = build.build_task(checked), build.build_loader(checked, data, data.test, training=False)
    return test(objective, task, loader)


def retrain_config(config: Source | None, schedule: str | Path | Schedule | None, overrides: Sequence[str]) -> Config:
    """The checked config of a retrain: the one given, or the schedule's own."""
    if config is not None:
        return _checked(config, overrides).for_retrain()
    if schedule is None:
        raise UserError("retrain needs a config, a schedule, or both")
    learned = schedule if isinstance(schedule, Schedule) else Schedule.load(schedule)
    stored = learned.meta.get("config")
    if not isinstance(stored, Mapping):
        raise UserError("this schedule holds no config: give one")
    checked = _checked(stored, overrides).for_retrain()
    for key, name in _code_named_in(checked):
        if f"{key}={name}" not in overrides:
            repeat = f"repeat it as {key}={name}, or " if key.endswith(".model") else ""
            raise UserError(
                f"the schedule's config names code of its own, {key} '{name}'. A schedule file never runs code by "
                f"itself: if you trust it, {repeat}give a config"
            )
    return checked


def _code_named_in(config: Config) -> list[tuple[str, str]]:
    """(key, name) of everything in a config that is imported and run."""
    models = {"teacher.model": config.teacher, "student.model": config.student}
    models |= {f"teachers.{name}.model": member for name, member in config.teachers.items()}
    named = [(key, m.model) for key, m in models.items() if m and not m.model.startswith(("torchvision:", "timm:"))]
    named += [(f"terms.{n}.loss", term.loss) for n, term in enumerate(config.terms)]
    if config.pathways is not None:
        named += [("pathways.transforms", parse_spec(t, "transform")[0]) for t in config.pathways.transforms]
        named += [("pathways.distance", parse_spec(config.pathways.distance, "distance")[0])]
    return [(key, name) for key, name in named if ":" in name]


def _checked(config: Source, overrides: Sequence[str], searching: bool = False) -> Config:
    checked = read_config(config.model_dump() if isinstance(config, Config) else config, overrides)
    if checked.precision != "auto":
        return checked
    return checked.model_copy(update={"precision": fastest_precision(device_of(checked), searching)})


def _schedule_of(config: Config, schedule: str | Path | Schedule | None) -> Schedule | None:
    source = schedule if schedule is not None else config.retrain.schedule
    return source if isinstance(source, Schedule) or source is None else Schedule.load(source)


def _prepare(config: Config) -> None:
    """What comes before anything is loaded."""
    build.check_names(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)


def _record(config: Config, folder: Path) -> None:
    """What a run needs to be repeated."""
    write_atomically(_as_yaml(config), folder / "config.yaml")
    write_atomically(json.dumps(environment(), indent=1) + "\n", folder / "environment.json")


def _run(
    trainer: Trainer,
    config: Config,
    resume: bool,
    searcher: Searcher | None,
    ended: Callable[[Path], None] = lambda folder: None,
) -> dict[str, float]:
    """Train with tracking; everything that a finished run leaves in its folder but its weights. ``ended`` is called
    before the result is written, which says that the training has ended."""
    if resume:
        trainer.resume()
    if trainer.objective.cache is not None:
        note(trainer.objective.cache.describe())
    if trainer.folder is None or not distributed.is_main():
        return trainer.fit()
    if not resume:
        _record(config, trainer.folder)
    first = trainer.step + 1 if resume else None
    with Tracker(trainer.folder, resume_step=first, tensorboard=config.tracking.tensorboard) as tracker:
        trainer.tracker = tracker
        if not resume:
            tracker.text("config", f"```yaml\n{_as_yaml(config)}\n```")
            if searcher is not None:
                tracker.alpha_layout(
                    [e.key for e in searcher.entries], [e.level or (0, 0, 0) for e in searcher.entries]
                )
        metrics = trainer.fit()
        if searcher is not None:
            learned = searcher.schedule(trainer.steps_per_epoch, {})
            tracker.figure("alpha/processes", schedule_figure(learned), trainer.step)
            tracker.figure("alpha/heatmap", heatmap_figure(learned), trainer.step)
        tracker.hparams(_flat(config.model_dump()), metrics)
    ended(trainer.folder)
    write_atomically(json.dumps(metrics, indent=1) + "\n", trainer.folder / "result.json")
    return metrics


def _open_folder(out: str | Path | None, config: Config, resume: bool) -> Path | None:
    """The run's folder, if this run may write to it. Nothing is written before the run is built without an error."""
    if out is None:
        if resume:
            raise UserError("resume needs the run's folder")
        return None
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, a run needs a folder")
    written = folder / "config.yaml"
    if not distributed.is_main():  # rank 0 looks, and writes at once
        return folder
    if resume:
        for needed in [written] if config.stages else [folder / "checkpoint.pt", written]:
            if not needed.is_file():
                raise UserError(f"{folder}: no {needed.name} to resume from")
        differing = _differences(yaml.safe_load(written.read_text()), json.loads(config.model_dump_json()))
        if differing:
            raise UserError(f"{folder}: the config has changed since the run began: {'; '.join(differing[:5])}")
        return folder
    if written.exists():
        way = (
            "continue it with --resume"
            if config.stages or (folder / "checkpoint.pt").is_file()
            else "remove it, it has no checkpoint,"
        )
        raise UserError(f"{folder}: holds a run already; {way} or choose another --out")
    return folder


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    before, after = _flat(old), _flat(new)
    keys = [k for k in {**before, **after} if before.get(k) != after.get(k)]
    return [f"{k} was {before.get(k)!r}, is {after.get(k)!r}" for k in keys]


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _as_yaml(config: Config) -> str:
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False)


def environment() -> dict[str, Any]:
    """Versions, machine and code revision of this process."""
    packages = {}
    for name in ("distpro", "torch", "torchvision", "numpy", "higher"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "packages": packages,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "revision": git.stdout.strip() or "unknown",
        "command": sys.argv,
    }


def _schedule_meta(config: Config, data: Dataset, objective: Objective) -> dict[str, Any]:
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
        "data": data.signature,
        "versions": facts["packages"],
        "revision": facts["revision"],
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _model_signature(name: str, model: nn.Module) -> dict[str, Any]:
    return {"model": name, "parameters": sum(p.numel() for p in model.parameters())}
