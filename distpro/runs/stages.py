"""A recipe's trainings one after the other, each in a folder of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from distpro import build
from distpro.build.carry import Carry
from distpro.build.given import Given
from distpro.config.schema import Config
from distpro.config.stages import Stage
from distpro.data.statistics import DATA
from distpro.files import load_safely, save_atomically, write_atomically
from distpro.runs.folder import begun, goes_on, record
from distpro.runs.training import Result, run_training, save_student, term_states
from distpro.schedule import Schedule
from distpro.train import distributed


def retrain_stages(
    config: Config,
    stages: Sequence[Stage],
    schedule: Schedule | None,
    folder: Path | None,
    resume: bool,
    given: Given,
    facts: Mapping[str, Any],
) -> Result:
    """One training per stage, each in a folder of its own; a resumed run skips those that have ended. ``facts``: of the data of
    the schedule's search, where these are the same."""
    resume = goes_on(folder, resume)
    if folder is not None and not resume and distributed.is_main():
        record(config, folder)
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
            recorded = build.as_stored(settings, inner) if resume else settings
            data = build.build_data(
                build.as_stored(recorded, None, facts if settings.data == config.data else {}), given
            )
        going_on = begun(inner, resume)
        first = Given(given.data, given.teacher, None if n else given.student, given.task)
        trainer = build.build_retrain(settings, data, schedule, inner, taken, first)
        metrics = run_training(
            trainer,
            settings,
            going_on,
            None,
            ended=partial(save_student, trainer.objective, terms=True),
            facts=data.facts,
        )
        student = {k: v.detach().clone() for k, v in trainer.objective.student.model.state_dict().items()}
        carry = Carry(student, None, {**carry.terms, **term_states(trainer.objective)})
    if folder is not None and distributed.is_main():
        last = folder / stages[-1].name
        for name in ("terms.pt", "student.pt"):
            save_atomically(load_safely(last / name), folder / name)
        if (last / DATA).is_file():
            write_atomically((last / DATA).read_text(encoding="utf-8"), folder / DATA)
        write_atomically(json.dumps(metrics, indent=1) + "\n", folder / "result.json")
    return Result(metrics, folder)
