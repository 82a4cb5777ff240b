"""Write docs/reference from the code: the keys of a config, the command line, the Python API.

    python tools/reference.py            # writes the pages
    python tools/reference.py --check    # exits with 1 if one is stale

Meanings of keys are the descriptions in distpro/config, options those of the parser, the API every public name of `distpro`
and `pathways` with its docstring.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pydantic.fields import FieldInfo  # noqa: E402
from pydantic_core import PydanticUndefined  # noqa: E402

import distpro  # noqa: E402
import pathways  # noqa: E402
from distpro.cli import build_parser  # noqa: E402
from distpro.config.schema import Config  # noqa: E402
from distpro.config.section import Section, is_section  # noqa: E402
from pathways import Registry  # noqa: E402
from pathways.space import Spec  # noqa: E402

FOLDER = ROOT / "docs" / "reference"
MADE = "*Made by `python tools/reference.py` from the code. Do not edit; a test compares.*\n"

CONFIG_HEAD = f"""\
# Config keys

{MADE}
Every key that a config may state, with its type, its default and its meaning. A key of a section is written below it, or with dots
on the command line: `training.optimizer.lr=0.05`. An unknown key is an error that names the nearest one. `base: FILE` at the top takes
another config first, `preset: NAME` one of `distpro list presets`; what the file itself states wins over both.
"""

CLI_HEAD = f"""\
# Command line

{MADE}
`distpro COMMAND`, or `python -m distpro COMMAND`. Keys of a [config](config.md) may follow as `key=value` after `search`, `retrain`,
`tune`, `train`, `evaluate` and `inspect`. The exit status is 0; 2 after bad input, with one line that says what to change;
128 + n after signal n, with a checkpoint to go on from.
"""

API_HEAD = f"""\
# Python API

{MADE}
The public names. `pathways` is a package of its own that needs PyTorch alone. Losses by name: [methods](../methods.md).
"""


# Config keys


def sections_of(kind: type[Section]) -> dict[type[Section], list[str]]:
    """Each section of a config, and the places where it stands; the whole first, under the place ''."""
    found: dict[type[Section], list[str]] = {}

    def walk(kind: type[Section], place: str) -> None:
        found.setdefault(kind, []).append(place)
        for name, field in kind.model_fields.items():
            for inner in inner_sections(field.annotation):
                many = {dict: ".NAME", list: "[]"}.get(getattr(field.annotation, "__origin__", None), "")
                walk(inner, f"{place}.{name}{many}".lstrip("."))

    walk(kind, "")
    return found


def inner_sections(annotation: Any) -> Iterator[type[Section]]:
    """Sections within an annotation."""
    if is_section(annotation):
        yield annotation
    for argument in get_args(annotation):
        yield from inner_sections(argument)


def type_of(annotation: Any) -> str:
    """An annotation as a reader of YAML would say it."""
    if set(get_args(Spec)) <= set(get_args(annotation)):
        null = " or null" if type(None) in get_args(annotation) else ""
        return f"name, or {{name: parameters}}{null}"
    if isinstance(annotation, type) and not get_args(annotation):
        names = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "NoneType": "null"}
        return names.get(annotation.__name__, "section" if is_section(annotation) else "any")
    inner = get_args(annotation)
    origin = str(getattr(annotation, "__origin__", ""))
    if "Literal" in origin:
        return ", ".join(f"`{value}`" for value in inner)
    if "list" in origin:
        return f"list of {type_of(inner[0])}" if inner[0] is not Any else "list"
    if "tuple" in origin:
        return f"{len(inner)} of {type_of(inner[0])}"
    if "dict" in origin:
        return "mapping"
    if "Annotated" in origin:
        return type_of(inner[0])
    return " or ".join(dict.fromkeys(type_of(kind) for kind in inner)) or "any"


def limits_of(field: FieldInfo) -> str:
    """Bounds of a number."""
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    found = [f"{sign} {getattr(m, name):g}" for m in field.metadata for name, sign in signs.items() if hasattr(m, name)]
    return f", {' and '.join(found)}" if found else ""


def default_of(field: FieldInfo) -> str:
    if isinstance(field.default, Section):
        return ""
    return "**needed**" if field.default is PydanticUndefined else f"`{json.dumps(field.default, ensure_ascii=False)}`"


def config_page() -> str:
    parts = [CONFIG_HEAD]
    for kind, places in sections_of(Config).items():
        title = ", ".join(f"`{place}`" for place in places if place) or "The whole"
        rows = []
        for name, field in kind.model_fields.items():
            inner = list(inner_sections(field.annotation))
            meaning = field.description or (one_line(inner[0].__doc__).partition(". ")[0] if inner else "")
            if inner:
                meaning = f"{meaning.rstrip('.')} (section below)"
            rows.append([f"`{name}`", type_of(field.annotation) + limits_of(field), default_of(field), meaning])
        parts += [
            f"## {title}\n",
            f"{one_line(kind.__doc__)}\n",
            table(["key", "type", "default", "meaning"], rows),
            "",
        ]
    return "\n".join(parts)


# Command line


def cli_page() -> str:
    _, commands = build_parser()
    parts = [CLI_HEAD]
    for name, command in commands.items():
        actions = [action for action in command._actions if action.dest != "help"]
        usage = " ".join(["distpro", name, *(usage_of(action) for action in actions)])
        parts.append(f"## {name}\n\n{capital(command.description or '')}.\n\n```text\n{usage}\n```\n")
        rows = [[f"`{words(action)}`", about(action)] for action in actions if action.help or action.choices]
        parts += [table(["argument", "meaning"], rows), ""] if rows else []
    return "\n".join(parts)


def words(action: argparse.Action) -> str:
    """An argument as it is typed."""
    value = "" if action.nargs == 0 else str(action.metavar or "|".join(map(str, action.choices or [])) or action.dest)
    return " ".join([*action.option_strings[-1:], value]).strip()


def usage_of(action: argparse.Action) -> str:
    optional = bool(action.option_strings) or action.nargs == "?"
    return f"[{words(action)}]" if optional else words(action)


def about(action: argparse.Action) -> str:
    allowed = f"one of {', '.join(f'`{choice}`' for choice in action.choices)}" if action.choices else ""
    default = f"default: `{action.default}`" if action.choices and action.default else ""
    return "; ".join(part for part in (action.help or "", allowed, default) if part).replace("<", "\\<")


# Python API


def api_page() -> str:
    parts = [API_HEAD]
    for module in (distpro, pathways):
        parts += [f"## {module.__name__}\n", f"{one_line(module.__doc__)}\n"]
        parts += [entry(module, name) for name in public(module)]
    return "\n".join(parts)


def public(module: ModuleType) -> list[str]:
    """The names that a module offers, dunder names aside."""
    return [name for name in module.__all__ if not name.startswith("__")]


def entry(module: ModuleType, name: str) -> str:
    value = getattr(module, name)
    title = f"### {module.__name__}.{name}\n"
    if isinstance(value, Registry):
        return f"{title}\nThe {value.kind}s by name: {', '.join(f'`{key}`' for key in value)}. See [`Registry`](#pathwaysregistry).\n"
    lines = [title, call(name, value), documented(value)]
    if inspect.isclass(value):
        lines += [
            f"#### {name}.{method}\n\n{call(method, bare(member))}\n{documented(member)}"
            for method, member in vars(value).items()
            if not method.startswith("_") and inspect.getdoc(member) and is_code(member)
        ]
    return "\n".join(line for line in lines if line)


def is_code(member: Any) -> bool:
    return inspect.isfunction(member) or isinstance(member, property | staticmethod | classmethod)


def bare(member: Any) -> Any:
    return member.__func__ if isinstance(member, staticmethod | classmethod) else member


def call(name: str, value: Any) -> str:
    """A signature as a block, one parameter a line where it is long; a property's name."""
    if isinstance(value, property) or (inspect.isclass(value) and issubclass(value, BaseException)):
        return f"```text\n{name}\n```\n"
    signature = inspect.signature(value)
    parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
    returns = f" → {plain(signature.return_annotation)}" if inspect.isfunction(value) else ""
    shown = [parameter(p) for p in parameters]
    short = f"{name}({', '.join(shown)}){returns}"
    if len(short) > 100:
        short = "\n".join([f"{name}(", *(f"    {s}," for s in shown), f"){returns}"])
    return f"```text\n{short}\n```\n"


def parameter(p: inspect.Parameter) -> str:
    """A parameter with its type and default; a default that is made anew at each call is shown as ``...``."""
    star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
    kind = "" if p.annotation is p.empty else f": {plain(p.annotation)}"
    default = "..." if "factory" in repr(p.default) else repr(p.default)
    return f"{star}{p.name}{kind}{'' if p.default is p.empty else f' = {default}'}"


def plain(annotation: Any) -> str:
    if isinstance(annotation, str):
        return annotation
    return getattr(annotation, "__forward_arg__", None) or getattr(annotation, "__name__", str(annotation))


def documented(value: Any) -> str:
    """A docstring as Markdown: its lists as lists, its examples as blocks."""
    blocks = (inspect.getdoc(value) or "").split("\n\n")
    return "\n\n".join(as_markdown(block) for block in blocks) + "\n"


def as_markdown(block: str) -> str:
    lines = block.splitlines()
    if lines[0].startswith(">>>"):
        return "\n".join(["```pycon", *lines, "```"])
    if re.fullmatch(r"(Args|Attributes):", lines[0]):
        entries = re.split(r"\n(?=\S)", inspect.cleandoc("\n" + "\n".join(lines[1:])))
        items = (re.sub(r"^([\w*, ]+): ", r"`\1`: ", " ".join(map(str.strip, e.split("\n")))) for e in entries)
        return "\n".join([f"{lines[0]}\n", *(f"- {item}" for item in items)])
    if all(line.startswith("    ") for line in lines):
        return "\n".join(["```text", *(line[4:] for line in lines), "```"])
    return block


# All


def one_line(text: str | None) -> str:
    """The first paragraph of a text, in one line."""
    return " ".join((text or "").split("\n\n")[0].split())


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; bars in cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


PAGES: Mapping[str, Callable[[], str]] = {"config.md": config_page, "cli.md": cli_page, "api.md": api_page}


def stale() -> list[str]:
    """Names of the pages that are not what the code says now."""
    return [
        name
        for name, page in PAGES.items()
        if not (FOLDER / name).is_file() or (FOLDER / name).read_text("utf-8") != page()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages, or compare them. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Write docs/reference from the code.")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a page is stale")
    if parser.parse_args(arguments).check:
        for name in (old := stale()):
            print(f"docs/reference/{name} is stale: run python tools/reference.py", file=sys.stderr)
        return 1 if old else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
