"""What is wrong with a config, in one line for each key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from distpro.config.schema import Config
from distpro.config.section import Section, is_section
from distpro.console import shortened
from pathways.registry import nearest

MEANT = {
    "learning_rate": "training.optimizer.lr",
    "wd": "training.optimizer.weight_decay",
    "lambda": "training.distill_weight",
}
"""What other tools call a key."""


def explain(errors: Sequence[Any], content: Mapping[str, Any], where: str) -> list[str]:
    """One line for each wrong key of pydantic's errors, which come one for each type that a value might have had."""
    lines: dict[str, str] = {}
    for error in errors:
        path, value = _follow(error["loc"], content)
        key = (
            ".".join(shortened(part, 80) for part in path)
            if error["type"] not in ("missing", "invalid_key")
            else ".".join(map(str, error["loc"]))
        )
        expected = error["msg"].partition(" or instance of")[0].replace("dictionary", "mapping")
        named = re.findall(r"'(.*?)'", expected) if error["type"] == "literal_error" else []
        if error["type"] == "extra_forbidden" or error["loc"][-1:] == ("[key]",):
            allowed = named or _keys_of(path[:-1])
            near = nearest(path[-1], allowed) or _elsewhere(path[-1])
            lines[key] = f"{where}: unknown key '{key}'{near} (allowed here: {', '.join(allowed)})"
        elif error["type"] == "value_error":
            at = f"'{key}': " if key else ""
            lines[key] = f"{where}: {at}{error['msg'].removeprefix('Value error, ')}"
        elif error["type"] == "missing":
            lines[key] = f"{where}: '{key}' is missing"
        elif key in lines:
            lines[key] += f", or {expected.removeprefix('Input should be ')}"
        else:
            near = nearest(value, named)
            if not isinstance(value, Mapping) and _is_section(key):
                meant = _meant(key, value, _keys_of(path))
                near = f"; did you mean '{meant}'?" if meant else f" (of {', '.join(_keys_of(path))})"
            lines[key] = f"{where}: '{key}' is {shortened(repr(value), 200)}: {expected[0].lower()}{expected[1:]}{near}"
    return [line for key, line in lines.items() if not any(deeper.startswith(f"{key}.") for deeper in lines)]


def _meant(key: str, value: Any, inner: Sequence[str]) -> str | None:
    """The key of a section that a word in the section's place is probably for, or that a number is."""
    if isinstance(value, str):
        return next((f"{key}.{name}" for name in ("name", "model") if name in inner), None)
    return MEANT.get(key.rpartition(".")[2])


def keys_called(name: str) -> list[str]:
    """The dotted keys whose last part is ``name``, or else those that it is nearest to; sections are not among them."""
    if name in MEANT:
        return [MEANT[name]]
    keys = list(_values_of(Config))
    close = nearest(name, {key.rpartition(".")[2] for key in keys})
    last = close.split("'")[1] if close else ""
    return [key for key in keys if key.rpartition(".")[2] == last]


def _elsewhere(name: str) -> str:
    found = " or ".join(repr(key) for key in keys_called(name)[:3])
    return f"; did you mean {found}?" if found else ""


def _values_of(section: type[Section], above: str = "") -> Iterator[str]:
    """The dotted keys of a section and of those in it, but for lists."""
    for name, field in section.model_fields.items():
        inner = [a for a in _arguments(field.annotation) if is_section(a)]
        if not inner:
            yield above + name
        elif not any(getattr(a, "__origin__", a) in (list, dict) for a in _arguments(field.annotation)):
            yield from _values_of(inner[0], f"{above}{name}.")


def _is_section(key: str) -> bool:
    return any(other.startswith(f"{key}.") for other in _values_of(Config))


def _follow(loc: Sequence[str | int], content: Any) -> tuple[list[str], Any]:
    """The keys of ``loc`` that lead somewhere, and where: pydantic adds the names of the types that it has tried."""
    path = []
    for part in loc:
        inside = range(len(content)) if isinstance(content, (list, tuple)) else content
        if isinstance(inside, (Mapping, range)) and part in inside:
            content = content[part]
            path.append(str(part))
    return path, content


def _keys_of(path: Sequence[str]) -> list[str]:
    section: Any = Config
    for part in path:
        field = getattr(section, "model_fields", {}).get(part)
        if field is None:
            continue  # an index in a list
        section = next((a for a in _arguments(field.annotation) if hasattr(a, "model_fields")), section)
    return list(section.model_fields)


def _arguments(annotation: Any) -> list[Any]:
    found = [annotation]
    for argument in getattr(annotation, "__args__", ()):
        found += _arguments(argument)
    return found
