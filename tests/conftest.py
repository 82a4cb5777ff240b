"""Shared by all tests: where the outside data are, and small pairs of models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
DEVICE = os.environ.get("DISTPRO_TEST_DEVICE", "cuda")  # of the tests marked cuda


def pytest_collection_modifyitems(items):
    """Tests marked ``cuda`` are skipped where there is no GPU, unless $DISTPRO_TEST_DEVICE names a device to rehearse on."""
    if not torch.cuda.is_available() and "DISTPRO_TEST_DEVICE" not in os.environ:
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: more threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data, or a skip."""
    folder = Path(os.environ.get("DISTPRO_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data at {folder} (set $DISTPRO_DATA)")
    return folder


@pytest.fixture
def golden_folder() -> Path:
    """The folder of the reference implementations' numbers, or a skip."""
    folder = Path(os.environ.get("DISTPRO_GOLDEN", ROOT.parent / "shared" / "golden"))
    if not folder.is_dir():
        pytest.skip(f"no golden files at {folder} (set $DISTPRO_GOLDEN)")
    return folder
