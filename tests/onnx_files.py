"""What an ONNX file answers, computed by onnxruntime, as its users do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
"""float32 sums in another order, through some ten layers of values near 1."""


def answers(path: Path, given: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs by name, for inputs by name, or for the only one. Skips the test where onnxruntime is missing."""
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(str(path), options)
    if isinstance(given, Tensor):
        (only,) = session.get_inputs()
        given = {only.name: given}
    found = session.run(None, {name: x.numpy() for name, x in given.items()})
    names = [output.name for output in session.get_outputs()]
    return {name: torch.from_numpy(x) for name, x in zip(names, found, strict=True)}
