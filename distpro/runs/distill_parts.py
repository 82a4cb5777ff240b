"""The trainings that one call of `distpro.distill` is made of, and what is refused before the first of them begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distpro import build
from distpro.build.given import OBJECT, Given
from distpro.build.keeping import held_out
from distpro.config.reading import default_space, for_retrain, read_config
from distpro.config.schema import Config
from distpro.runs.composing import Plan, Wish
from distpro.runs.folder import check_free


class Part(NamedTuple):
    """One of them: a config with its overrides, and the folder of its run.

    ``space``: whether its terms are those of a search's default space.
    """

    what: str
    config: Mapping[str, Any]
    overrides: Sequence[str]
    folder: Path
    searching: bool = False
    space: bool = False

    def checked(self) -> Config:
        """Its config as it is run."""
        config = read_config(self.config, self.overrides, space=default_space if self.space else None)
        return config if self.searching else for_retrain(config)


def parts_of(plan: Plan, folder: Path, overrides: Sequence[str], search: bool, baseline: bool) -> dict[str, Part]:
    """The trainings in their order: ``teacher``, ``alone``, ``search``, ``student``, of which the last is always there."""
    found = {}
    if plan.teacher is not None:
        found["teacher"] = Part("teacher, trained first", plan.teacher, plan.of_teacher, folder / "teacher")
    if baseline:
        alone = [*overrides, "retrain.weights=none"]
        found["alone"] = Part("student without its teacher", plan.student, alone, folder / "alone")
    if not search:
        found["student"] = Part("student", plan.student, [*overrides, "retrain.weights=constant"], folder)
        return found
    config = {key: value for key, value in plan.student.items() if key != "terms"}
    found["search"] = Part("search", config, overrides, folder / "search", searching=True, space=True)
    found["student"] = Part("student, with what the search learns", config, overrides, folder, space=True)
    return found


def check_parts(parts: Mapping[str, Part], wish: Wish, resume: bool) -> None:
    """Raise UserError for what one of the trainings could not do, before any of them begins."""
    for part in parts.values():
        if not resume:
            check_free(part.folder)
        config = part.checked()
        if part.searching:
            _check_search(config)
        elif config.training.chooses or config.training.validation_fraction is not None:
            given = Given.of(None if isinstance(wish.data, (str, Path)) else wish.data)
            data = build.build_data(config, given)
            held_out(config, data, data.train)


def _check_search(config: Config) -> None:
    build.check_search(config)
    members = [member for member in (config.teacher, config.student) if member is not None]
    unknown = config.data.num_classes is None or config.data.image_shape is None
    if unknown or any(member.model.startswith(OBJECT) for member in members):
        return
    for member in members:  # nothing is fetched
        member.params = {k: v for k, v in member.params.items() if k not in ("pretrained", "weights")}
    data, _ = build.blank_data(config)
    build.check_learns(config, build.compose(config, data, load=False)[1])
