"""From files, bases, presets and overrides to one checked config."""

from __future__ import annotations

import importlib.resources
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from distpro.config.errors import explain
from distpro.config.schema import Config
from pathways.registry import UserError, nearest

NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"


def merge(below: Mapping[str, Any], above: Mapping[str, Any], clears: bool = True) -> dict[str, Any]:
    """Deep merge of mappings; where they disagree, ``above`` wins. Lists are replaced whole. ``clears``: an empty mapping in
    ``above`` takes everything away that ``below`` has under its key; else it says nothing."""
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping) and (value or not clears)
        result[key] = merge(result[key], value, clears) if both else value
    return result


def presets() -> list[str]:
    """Names that ``preset:`` takes."""
    folder = importlib.resources.files("distpro.config") / "presets"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def read_config(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    below: Mapping[str, Any] | None = None,
    space: Mapping[str, Any] | Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> Config:
    """A checked config from a YAML file or a mapping, with ``key=value`` overrides (dotted keys, YAML values). ``below``
    stands in the place of the defaults, and ``space``, or what it makes of the config, where that says nothing of pathways and
    terms (not even null).

    Raises UserError naming file, key, what was found, what is allowed and the nearest allowed name.
    """
    path = Path("config") if isinstance(source, Mapping) else Path(source)
    content = dict(source) if isinstance(source, Mapping) else read_yaml(path)
    said = [_override(override) for override in overrides]
    preset = dict(said).get("preset")
    if "preset" in dict(said):
        plain, content = {**content, "preset": None}, {**content, "preset": preset}
        if preset is not None and _with_bases(dict(content), path) == _with_bases(plain, path):
            raise UserError(f"{path}: preset={preset} would change nothing: the config states all of its keys")
    content = merge(below or {}, _with_bases(content, path), clears=False)
    for key, value in said:
        if key != "preset":
            _refuse_entries(content, key, value)
            content = merge(content, _nest(key.split("."), value))
    if space is not None and not {"pathways", "terms"} & content.keys():
        content = merge(space(content) if callable(space) else space, content, clears=False)
    config = check(content, str(path))
    merged = for_retrain(config, str(path))  # or its mistakes would show only when the search is over
    training, usual = merged.training, type(merged.training).model_fields["average_of"].default
    if (
        training.average_of != usual and training.keep != "average" and not config.stages
    ):  # which may keep what they like
        raise UserError(f"{path}: training.average_of: is of keep: average, not of keep: {training.keep}")
    return config


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"override '{text}': expected key=value, for instance training.epochs=10")
    return key, _yaml(value, f"override '{text}'")


def _refuse_entries(content: Mapping[str, Any], key: str, value: Any) -> None:
    """Raise UserError for a key such as ``terms.0.weight``: a list is replaced whole, and the message says by what."""
    path = key.split(".")
    first = Config.model_fields.get(path[0])
    inner: Any = content.get(path[0], first.default if first is not None else None)
    for n, part in enumerate(path[1:], start=1):
        if isinstance(inner, list):
            name, whole = ".".join(path[:n]), "[...]"
            if part.isdigit() and int(part) < len(inner):
                changed, rest = list(inner), _nest(path[n + 1 :], value)
                both = isinstance(rest, Mapping) and isinstance(inner[int(part)], Mapping)
                changed[int(part)] = merge(inner[int(part)], rest) if both else rest
                whole = yaml.safe_dump(changed, default_flow_style=True, sort_keys=False, width=10**6).strip()
            raise UserError(
                f"override '{key}': entries of a list cannot be set one by one: give the whole list, {shlex.quote(f'{name}={whole}')}"
            )
        inner = inner.get(part) if isinstance(inner, Mapping) else None


def default_space(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a search takes whose config says nothing of pathways and terms: the preset ``default_TASK`` of its task, where there
    is one, else ``default``; nothing where it has no teacher."""
    if not (content.get("teacher") or content.get("teachers")):
        return {}
    task = content.get("task", "")
    name = (
        task if isinstance(task, str) else str(task.get("name", next(iter(task), ""))) if isinstance(task, dict) else ""
    )
    return _preset(f"default_{name}" if f"default_{name}" in presets() else "default")


def for_retrain(config: Config, where: str = "config") -> Config:
    """The config with `retrain.training` merged into `training`."""
    merged = config.model_dump()
    merged["training"] = merge(merged["training"], merged["retrain"]["training"])
    merged["retrain"]["training"] = {}
    return check(merged, f"{where}, with retrain.training as training")


def of_retrain(overrides: Sequence[str]) -> list[str]:
    """Overrides of a retrain: what they say of `training` goes before the config's `retrain.training` too, which lies over it."""
    return [f"retrain.{said}" for said in overrides if said.startswith(("training.", "training="))] + list(overrides)


def check(content: Mapping[str, Any], where: str) -> Config:
    """Validate a mapping. Raises UserError as `read_config` does."""
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise UserError("\n".join(explain(error.errors(), content, where)[:5])) from None


def _with_bases(content: dict[str, Any], path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The content of ``path`` over that of its base, and that over its preset. ``above``: the files on the way here."""
    base, preset = content.pop("base", None), content.pop("preset", None)
    below: dict[str, Any] = {}
    if preset is not None:
        if preset not in presets():
            near = nearest(str(preset), presets())
            raise UserError(f"{path}: unknown preset '{preset}'{near} (allowed: {', '.join(presets())})")
        below = _preset(preset)
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f"{path}: base is {base!r}: expected the path of one YAML file")
        file = path.parent / base
        if file.resolve() in (path.resolve(), *above):
            raise UserError(f"{path}: base '{base}' leads back to itself")
        below = merge(below, _with_bases(read_yaml(file), file, (path.resolve(), *above)))
    return merge(below, content)


def _preset(name: str) -> dict[str, Any]:
    text = (importlib.resources.files("distpro.config") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = _yaml(text, f"preset {name}")
    return content


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError for anything else, with the line where the file is wrong."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; a config is one YAML file")
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else [])
        raise UserError(f"{path}: no such config file{near}")
    try:
        content = _yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file") from None
    if not isinstance(content, dict):
        found = "an empty file" if content is None else type(content).__name__
        raise UserError(f"{path}: a config is a mapping of keys to values, found {found}")
    return content


def _yaml(text: str, where: str) -> Any:
    try:
        _refuse_the_unmeant(yaml.compose(text, Loader=yaml.SafeLoader), where)
        return _numbers(yaml.safe_load(text))
    except RecursionError:
        raise UserError(f"{where}: not valid YAML (an alias leads back to itself)") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = str(getattr(error, "problem", None) or error).splitlines()[0]
        raise UserError(f"{where}{line}: not valid YAML ({problem})") from None


def _refuse_the_unmeant(root: yaml.Node | None, where: str) -> None:
    """Duplicate keys, of which YAML's parser would silently keep the last one (merge keys, ``<<``, are meant to
    repeat others), keys that are read as no words (off, yes, null), and numbers of YAML 1.1 that are read otherwise than they
    look: 010 is 8, 1:30 is 90."""
    pending, visited = [root], set()
    while pending:
        node = pending.pop()
        if node is None or id(node) in visited:
            continue
        if isinstance(node, yaml.ScalarNode):
            if node.tag.endswith((":int", ":float")) and re.fullmatch(r"[-+]?0[\d_]+|[^:]+:.*", node.value):
                line = node.start_mark.line + 1
                found = yaml.safe_load(node.value)
                raise UserError(
                    f"{where}, line {line}: YAML reads {node.value} as {found}; write that, or put it in quotes"
                )
            continue
        visited.add(id(node))  # an alias leads to a node that has been met
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                    if key.value in seen:
                        raise UserError(f"{where}, line {key.start_mark.line + 1}: duplicate key '{key.value}'")
                    if key.tag.endswith((":bool", ":null")):
                        line, found = key.start_mark.line + 1, yaml.safe_load(key.value)
                        raise UserError(
                            f"{where}, line {line}: YAML reads the key '{key.value}' as {found}; put it in quotes"
                        )
                    seen.add(key.value)
            pending += [value for _, value in node.value]
        else:
            pending += node.value


def _numbers(value: Any) -> Any:
    """YAML 1.1 takes 1e-3 and 2.5e1 for text, for want of a point or of a sign: nobody means that."""
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    return float(value) if isinstance(value, str) and re.fullmatch(NUMBER, value) else value


def _nest(keys: Sequence[str], value: Any) -> Any:
    for key in reversed(keys):
        value = {key: value}
    return value
