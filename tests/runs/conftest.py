"""Shared by the tests of runs."""

from __future__ import annotations

import sys
from itertools import count

import pytest

from tests.own_parts import SOURCE

numbers = count()


@pytest.fixture(scope="module")
def made():
    """What the tests of one module leave to one another."""
    return {}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The name of a module with the parts, which lies in the current directory and nowhere else."""
    name = f"own_parts_{next(numbers)}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    sys.modules.pop(name, None)
