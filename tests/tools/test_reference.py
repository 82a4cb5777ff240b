"""docs/reference is what the code says, and says all of it."""

from __future__ import annotations

import importlib.util

import pytest

import distpro
import pathways
from distpro.cli import build_parser
from distpro.config.schema import Config
from pathways import Registry
from tests.conftest import ROOT

spec = importlib.util.spec_from_file_location("reference", ROOT / "tools" / "reference.py")
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)


def test_the_pages_are_not_stale(capsys):
    assert reference.stale() == [], "run python tools/reference.py"
    assert reference.main(["--check"]) == 0


@pytest.mark.parametrize("module", [distpro, pathways], ids=lambda module: module.__name__)
def test_the_api_page_has_every_public_name_with_its_meaning(module):
    page = (reference.FOLDER / "api.md").read_text(encoding="utf-8")
    names = reference.public(module)
    assert set(names) == {name for name in module.__all__ if name != "__version__"}
    for name in names:
        assert f"### {module.__name__}.{name}\n" in page
        value = getattr(module, name)
        assert isinstance(value, Registry) or value.__doc__, f"{name} has no docstring"


def test_every_key_of_a_config_is_described():
    for kind, places in reference.sections_of(Config).items():
        for name, field in kind.model_fields.items():
            inner = list(reference.inner_sections(field.annotation))
            assert field.description or (inner and inner[0].__doc__), f"{places[0]}.{name}"


def test_the_command_line_s_page_has_every_command_and_option():
    page = (reference.FOLDER / "cli.md").read_text(encoding="utf-8")
    _, commands = build_parser()
    for name, command in commands.items():
        (section,) = (part for part in page.split("\n## ") if part.startswith(f"{name}\n"))
        for action in command._actions:
            assert action.dest == "help" or reference.words(action) in section.replace(r"\|", "|")


def test_a_stale_page_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reference, "FOLDER", tmp_path / "reference")
    assert reference.main([]) == 0 and reference.stale() == []
    (tmp_path / "reference" / "cli.md").write_text("old")
    assert reference.main(["--check"]) == 1
    assert "docs/reference/cli.md is stale: run python tools/reference.py" in capsys.readouterr().err
