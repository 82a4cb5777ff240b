"""Recipes of several trainings, one after the other: hints before distillation, a teacher's paraphraser before its
student, an assistant in between, generations of one network.

A config's ``stages`` is a list of mappings. Each is merged over the config of the stage before (the first over the
config itself), and so names only what is different: ``training``, ``data``, ``terms``, ``task_weight``, ``freeze``, ...
Lists are replaced whole. Four keys belong to a stage alone:

    name: hint             names its folder
    teacher: previous      the student of the stage before teaches (Born-Again Networks; Teacher Assistant)
    fresh: true            a new student in place of the one so far; so does a ``student`` that is another one
    seed: 1                as in the config: a fresh student of the same seed would be the same network

The student and the terms that both stages have, by key and loss, go on with the weights that they have.
"""

from __future__ import annotations

from dataclasses import dataclass

from distpro.config.reading import check, for_retrain, merge
from distpro.config.schema import Config
from pathways.registry import UserError


@dataclass(frozen=True)
class Stage:
    """One training of a recipe: its name, its whole config, and what it takes from the stage before."""

    name: str
    config: Config
    fresh: bool = False
    previous_teaches: bool = False


def stages_of(config: Config, where: str = "config") -> list[Stage]:
    """The trainings that a config asks for, in order: itself alone without ``stages``.

    Raises UserError as `distpro.config.read_config` does, naming the stage.
    """
    if not config.stages:
        return [Stage("", config)]
    found: list[Stage] = []
    before = {**config.model_dump(), "stages": []}
    for n, given in enumerate(config.stages, start=1):
        content = dict(given)
        name = str(content.pop("name", f"stage{n}"))
        at = f"{where}, stages.{n - 1} ({name})"
        if not name.replace("_", "").replace("-", "").isalnum():
            raise UserError(f"{at}: a stage's name becomes a folder's: letters, digits, - and _ only")
        fresh, previous = bool(content.pop("fresh", False)), content.get("teacher") == "previous"
        if previous:
            if not found:
                raise UserError(f"{at}: teacher is 'previous', but there is no stage before")
            del content["teacher"]
        if "stages" in content or "base" in content or "preset" in content:
            raise UserError(f"{at}: a stage has no stages, base or preset of its own")
        after = merge(before, content)
        if previous:
            after["teacher"], after["teachers"] = dict(before["student"]), {}
        if after["data"].get("seed") is None:  # another seed is another student, not another choice of samples
            after["data"] = {**after["data"], "seed": config.seed}
        fresh = fresh or bool(found and after["student"] != before["student"])
        found.append(Stage(f"{n}_{name}", for_retrain(check(after, at), at), fresh or not found, previous))
        before = after
    return found
