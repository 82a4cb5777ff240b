"""Shared by the tests of runs."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def made():
    """What the tests of one module leave to one another."""
    return {}
