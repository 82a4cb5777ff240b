"""Fixtures of more than one file."""

import pytest
import torch
import torch.distributed

from pathways import trust


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield torch.compile
    torch._dynamo.reset()


@pytest.fixture
def one_process(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def trusted_tests(monkeypatch):
    """Let models with classes of the tests be traced, as those of PyTorch and torchvision are: what the tracer makes of
    all kinds of code, and what it refuses, is tested on them."""
    monkeypatch.setattr(trust, "TRUSTED", (*trust.TRUSTED, "tests"))
