"""What is wrong with a config, in one line for each key."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from distpro.config.schema import Config
from pathways.registry import nearest


def explain(errors: Sequence[Any], content: Mapping[str, Any], where: str) -> list[str]:
    """One line for each wrong key of pydantic's errors, which come one for each type that a value might have had."""
    lines: dict[str, str] = {}
    for error in errors:
        path, value = _follow(error["loc"], content)
        key = ".".join(path) if error["type"] not in ("missing", "invalid_key") else ".".join(map(str, error["loc"]))
        expected = error["msg"].partition(" or instance of")[0].replace("dictionary", "mapping")
        named = re.findall(r"'(.*?)'", expected) if error["type"] == "literal_error" else []
        if error["type"] == "extra_forbidden" or error["loc"][-1:] == ("[key]",):
            allowed = named or _keys_of(path[:-1])
            near = nearest(path[-1], allowed)
            lines[key] = f"{where}: unknown key '{key}'{near} (allowed here: {', '.join(allowed)})"
        elif error["type"] == "value_error":
            at = f"'{key}': " if key else ""
            lines[key] = f"{where}: {at}{error['msg'].removeprefix('Value error, ')}"
        elif error["type"] == "missing":
            lines[key] = f"{where}: '{key}' is missing"
        elif key in lines:
            lines[key] += f", or {expected.removeprefix('Input should be ')}"
        else:
            lines[key] = f"{where}: '{key}' is {value!r}: {expected[0].lower()}{expected[1:]}{nearest(value, named)}"
    return [line for key, line in lines.items() if not any(deeper.startswith(f"{key}.") for deeper in lines)]


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
