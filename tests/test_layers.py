"""Imports run down, without circles, and files stay small (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

LAYERS = [  # from top to bottom: a module imports from its own layer and those below
    {
        "distpro",
        "distpro.__main__",
        "distpro.cli",
        "distpro.cli_distill",
    },  # `distpro` itself: the names that it offers, imported when used
    {"distpro.runs"},
    {"distpro.report"},
    {"distpro.build"},
    {"distpro.search"},
    {"distpro.train"},
    {"distpro.objective", "distpro.weights"},
    {
        "distpro.batch",
        "distpro.config",
        "distpro.console",
        "distpro.data",
        "distpro.features",
        "distpro.files",
        "distpro.losses",
        "distpro.models",
        "distpro.process",
        "distpro.schedule",
        "distpro.schedule_file",
        "distpro.task",
        "distpro.tasks",
        "distpro.term",
    },
    {"pathways"},
]
LEVEL = {name: number for number, layer in enumerate(LAYERS) for name in layer}
LARGEST = 400  # lines of a file
ENTRIES = 25  # files and folders at the top of distpro/

FILES = {
    name: path
    for package in ("distpro", "pathways")
    for path in sorted((ROOT / package).rglob("*.py"))
    for name in [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")]
}
TOOLS = {path.stem: path for path in sorted((ROOT / "tools").glob("*.py"))}
PARTS = sorted((ROOT / "tools").glob("*/*.py"))


def place(module: str) -> str:
    """The file or folder right under distpro that a module is in, or its package."""
    return ".".join(module.split(".")[: 2 if module.startswith("distpro.") else 1])


def imports(path: Path, known: dict[str, Path], at_once: bool = False) -> Iterator[tuple[int, str]]:
    """(line, module) of what a file imports of ``known``: anywhere in it, or ``at_once`` when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = _run_on_import(tree.body) if at_once else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            base = node.module or ""
            names = [f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name in known)


def _run_on_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when a module is imported; those for a type checker alone do not."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _run_on_import(node.orelse)
            continue
        yield node
        for field in ("body", "orelse", "finalbody"):
            yield from _run_on_import(getattr(node, field, []))
        for handler in getattr(node, "handlers", []):
            yield from _run_on_import(handler.body)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """One circle for every module that is on any."""
    found = []
    for start in graph:
        pending, before = [start], {}
        while pending:
            module = pending.pop()
            for other in graph[module]:
                if other == start:
                    way = [module]
                    while way[-1] != start:
                        way.append(before[way[-1]])
                    found.append([*reversed(way), start])
                    pending = []
                    break
                if other not in before:
                    before[other] = module
                    pending.append(other)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("module", FILES)
def test_imports_run_down(module):
    """Also those inside of functions and for type checkers."""
    mine = place(module)
    assert mine in LEVEL, f"{mine} has no layer: give it one here and in docs/architecture.md"
    if module == "distpro":
        return  # its names have their homes everywhere
    wrong = [
        f"{FILES[module].relative_to(ROOT)}:{line}: {name}"
        for line, name in imports(FILES[module], FILES)
        if LEVEL[place(name)] < LEVEL[mine]
    ]
    assert wrong == []


@pytest.mark.parametrize("module", [name for name in FILES if place(name) == "pathways"])
def test_pathways_know_nothing_of_distpro(module):
    assert [name for _, name in imports(FILES[module], FILES) if place(name) != "pathways"] == []


@pytest.mark.slow
@pytest.mark.parametrize("known", [FILES, TOOLS], ids=["distpro and pathways", "tools"])
def test_there_is_no_circle(known):
    at_once = known is FILES  # tools are small enough to have none at all
    graph = {name: {other for _, other in imports(path, known, at_once)} - {name} for name, path in known.items()}
    if known is FILES:
        graph = {name: _with_folders(name, others) for name, others in graph.items()}
    assert circles(graph) == []


def _with_folders(name: str, others: set[str]) -> set[str]:
    """What is imported, with the folders that are imported on the way; a module's own folders have begun already."""
    above = {other.rsplit(".", n)[0] for other in others for n in range(1, other.count(".") + 1)}
    return {folder for folder in others | above if not f"{name}.".startswith(f"{folder}.")}


@pytest.mark.parametrize(
    "path", [*FILES.values(), *TOOLS.values(), *PARTS], ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_file_is_one_thing(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= LARGEST


def test_the_top_of_distpro_can_be_read_at_a_glance():
    found = [p.name for p in (ROOT / "distpro").iterdir() if p.name != "__pycache__"]
    assert len(found) <= ENTRIES, sorted(found)


def test_what_the_checks_see(tmp_path):
    """The reading of imports, and of circles, on a small example."""
    code = """
from typing import TYPE_CHECKING
import b.inner
if TYPE_CHECKING:
    from c import name
try:
    import d
except ImportError:
    from e import inner
class Own:
    import f
    def method(self):
        from g import name
"""
    (tmp_path / "a.py").write_text(code)
    known = dict.fromkeys(["b", "b.inner", "c", "d", "e", "e.inner", "f", "g"], tmp_path)
    assert {name for _, name in imports(tmp_path / "a.py", known)} == {"b.inner", "c", "d", "e.inner", "f", "g"}
    assert [n for _, n in imports(tmp_path / "a.py", known, at_once=True)] == ["b.inner", "d", "e.inner", "f"]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c", "b"], ["c", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
