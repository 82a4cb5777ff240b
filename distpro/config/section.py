"""What every part of a config is: unknown keys are errors, and numbers are numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator

from distpro.process import parse_process, reduction_of
from distpro.schedule import REDUCTIONS

ProcessSpec = float | dict[str, Any]
"""A number, or a process {name: {parameters}}, see `distpro.process`."""


Params = Annotated[dict[str, Any], BeforeValidator(lambda value: {} if value is None else value)]
"""Parameters of what is named beside them. null: none, whatever a base has for another name."""


class Section(BaseModel):
    """Part of a config. Unknown keys are errors, and so are numbers that are none: .nan, .inf, yes and no."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_are_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = _kinds(cls.model_fields[info.field_name or ""].annotation)
        if any(map(is_section, kinds)):
            return value  # looks at its own
        for path, leaf in _leaves(value):
            if isinstance(leaf, float) and not math.isfinite(leaf):
                raise ValueError(f"{path}expected a finite number, found {leaf}")
            named = not path or Any not in kinds  # of parameters, their owner says which may be true or false
            if isinstance(leaf, bool) and named and {int, float} & kinds and bool not in kinds:
                raise ValueError(f"{path}expected a number, found {leaf} (YAML's yes, no, on, off are truth values)")
        return value


def is_section(kind: Any) -> bool:
    """Whether a type is a section. To Python 3.10 ``list[int]`` is a type too, but no class."""
    return isinstance(kind, type) and get_origin(kind) is None and issubclass(kind, Section)


def _kinds(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    return {annotation}.union(*(_kinds(inner) for inner in get_args(annotation)))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """What is no list and no mapping in a value, after its place there, ``a.0: ``."""
    if isinstance(value, Mapping | list | tuple):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _leaves(inner, f"{path.removesuffix(': ')}{'.' if path else ''}{key}: ")
    else:
        yield path, value


def check_process(value: Any) -> Any:
    """A weight as it is. Raises UserError if it is a mapping that is no process."""
    if isinstance(value, dict) and reduction_of(value) not in REDUCTIONS:
        parse_process(value)
    return value
