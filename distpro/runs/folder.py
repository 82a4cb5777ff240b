"""A run's folder: what is written there, by whom, and what says how to repeat it."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from distpro.config.flat import flat
from distpro.config.schema import Config
from distpro.data.statistics import DATA, stored_facts
from distpro.files import remove_leftovers, write_atomically
from distpro.runs.lock import locked
from distpro.train import distributed
from distpro.train.checkpoint import CHECKPOINT, read_checkpoint
from pathways.registry import UserError

CONFIG, ENVIRONMENT = "config.yaml", "environment.json"
HOUR = 3600.0
RESULTS = ("*.pt", "*.safetensors", "result.json", "trials.journal")
"""Checkpoints, a schedule, weights, results, the trials of a tuning: what is lost with a folder."""
TRIED = ("checkpoint*.pt", "result.json")
"""The same of a tuning, which writes its space and its journal at once."""


def record(config: Config, folder: Path, facts: Mapping[str, Any] | None = None) -> None:
    """What a run needs to be repeated. ``facts``: of its data, see `distpro.data.datasets.Dataset`. The config comes last: where it
    is, the run has begun, and goes on without writing this again."""
    write_atomically(json.dumps(environment(), indent=1) + "\n", folder / ENVIRONMENT)
    if facts is not None:
        write_atomically(json.dumps(facts, indent=1, default=str) + "\n", folder / DATA)
    write_atomically(as_yaml(config), folder / CONFIG)


def check_data(folder: Path, facts: Mapping[str, Any]) -> None:
    """Raise UserError where a run that is to be resumed began with other data, as far as they can be told apart."""
    before = stored_facts(folder)
    now = json.loads(json.dumps(facts, default=str))
    differing = _differences(before, {key: now.get(key) for key in before})  # runs from before say less, or nothing
    if differing:
        raise UserError(f"{folder}: the data have changed since the run began: {'; '.join(differing[:3])}")


@contextmanager
def open_folder(
    out: str | Path | None, config: Config, resume: bool, shared: bool = False, kind: str = "training"
) -> Iterator[Path | None]:
    """The run's folder, if this run may write to it; nobody else may before it is closed (but others that share it). Nothing is
    written before the run is built without an error. ``kind``: training, search or tuning. Raises UserError."""
    if out is None:
        if resume:
            raise UserError("resume needs the run's folder")
        yield None
        return
    folder = Path(out)
    if not distributed.is_main():  # rank 0 looks, and writes at once
        yield folder
        return
    _check_place(folder, resume)
    with locked(folder, shared, alone=shared and not resume) as alone:
        if resume:
            _check_kind(folder, kind)
            _check_unchanged(folder, config)
        else:
            _check_empty(folder, shared, alone)
        remove_leftovers(folder, HOUR if shared else 0.0)
        yield folder


def begun(folder: Path | None, resume: bool) -> bool:
    """Whether a training is to be gone on with in a folder: one that was stopped before its first checkpoint starts anew."""
    return resume and folder is not None and (folder / CHECKPOINT).is_file()


def goes_on(folder: Path | None, resume: bool) -> bool:
    """Whether a run of several trainings is to be gone on with in a folder: where none of them has left anything, it starts anew."""
    return resume and folder is not None and _has_results(folder)


def _has_results(folder: Path, named: Sequence[str] = RESULTS) -> bool:
    """Whether a run has left more than its config and its log."""
    return any(next(folder.rglob(name), None) for name in named)


def _check_place(folder: Path, resume: bool) -> None:
    above = next(path for path in (folder, *folder.parents) if path.exists())  # "." and "/" do
    if not above.is_dir():
        raise UserError(f"{above}: is a file, a run needs a folder{'' if above == folder else f' ({folder})'}")
    if resume and not (folder / CONFIG).is_file():
        what = "checkpoint.pt" if not (folder / CHECKPOINT).is_file() else CONFIG
        raise UserError(f"{folder}: no {what} to resume from")
    if resume or not (folder / CONFIG).exists() or _failed_at_once(folder):
        _check_writable(folder, above)


def _check_kind(folder: Path, kind: str) -> None:
    """A checkpoint is read where the files beside it are not those that a run of the kind leaves, which is rare: it may be large."""
    searched, found = (folder / "alpha.pt").is_file(), kind
    if (folder / "trials.journal").is_file():
        found = "tuning"
    elif (folder / CHECKPOINT).is_file() and (kind == "tuning" or searched == (kind == "training")):
        weights = read_checkpoint(folder / CHECKPOINT).get("weights")
        found = "search" if isinstance(weights, Mapping) and "alpha_tilde" in weights else "training"
    if found != kind:
        raise UserError(f"{folder}: holds a {found}, no {kind} that --resume could go on with; choose another --out")


def _check_unchanged(folder: Path, config: Config) -> None:
    differing = _differences(_completed(recorded(folder)), json.loads(config.model_dump_json()))
    if differing and not _failed_at_once(folder):
        raise UserError(f"{folder}: the config has changed since the run began: {'; '.join(differing[:5])}")


def _failed_at_once(folder: Path) -> bool:
    """Whether all that a folder holds is what a run writes before its first checkpoint. A config without `environment.json` is
    somebody's own file."""
    return (folder / ENVIRONMENT).is_file() and not _has_results(folder)


def _check_empty(folder: Path, shared: bool = False, alone: bool = False) -> None:
    """``shared``: others may be at work there that have no results yet, unless this process is ``alone``; it begins a tuning anew
    of which no trial has ended."""
    begun = _has_results(folder, TRIED) or not alone if shared else not _failed_at_once(folder)
    if (folder / CONFIG).exists() and begun:
        raise UserError(f"{folder}: holds a run already; continue it with --resume or choose another --out")


def check_free(folder: Path) -> None:
    """Raise UserError where a new run could not take a folder, before what comes before that run is computed."""
    _check_place(folder, resume=False)
    _check_empty(folder)


def recorded(folder: Path) -> Mapping[str, Any]:
    """The config that a run's folder records; {} where there is none. Raises UserError for a damaged file."""
    written = folder / CONFIG
    if not written.is_file():
        return {}
    try:
        content = yaml.safe_load(written.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        content = None
    if not isinstance(content, Mapping):
        raise UserError(f"{written}: damaged: no mapping of keys to values")
    return content


def student_of(folder: Path) -> Path:
    """The file of a finished run's student. Raises UserError where there is none, with what to do."""
    path = folder / "student.pt"
    if path.is_file():
        return path
    if folder.is_file():
        of_run = (folder.parent / CONFIG).is_file()
        raise UserError(
            f"{folder}: is a file, not a run's folder{f'; did you mean {folder.parent}?' if of_run else ''}"
        )
    if not folder.is_dir():
        raise UserError(f"{folder}: no such run")
    if (folder / "alpha.pt").is_file():
        raise UserError(
            f"{folder}: is a search, which leaves a schedule and no student: distpro retrain --schedule "
            f"{shlex.quote(str(folder / 'alpha.pt'))} trains one"
        )
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: is not a run's folder: no student.pt and no config.yaml")
    raise UserError(f"{folder}: no student.pt; has the training ended?")


def _check_writable(folder: Path, above: Path) -> None:
    """Before anything is computed. ``above``: what there is of the folder's path."""
    try:
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({above}: {error.strerror})") from None


def recorded_estimator(folder: Path) -> Any:
    """The ``search.estimator`` that a run's folder records; None where it says nothing."""
    searching = recorded(folder).get("search")
    return searching.get("estimator") if isinstance(searching, Mapping) else None


def _completed(old: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recorded config with the defaults of keys that have come since."""
    try:
        completed: dict[str, Any] = json.loads(Config(**old).model_dump_json())
    except (ValidationError, UserError, TypeError):  # a key that is gone, which is named as a difference
        return old
    return completed


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    before, after = flat(old), flat(new)
    keys = [k for k in {**before, **after} if before.get(k) != after.get(k)]
    return [f"{k} was {before.get(k)!r}, is {after.get(k)!r}" for k in keys]


def as_yaml(config: Config) -> str:
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
