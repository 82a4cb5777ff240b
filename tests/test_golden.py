"""Every golden file of a loss is reproduced: value, gradients and buffers in float32, value in float64."""

import pytest
import torch

from tests.losses import golden, golden_feature_dense, golden_response_relation

CASES = {**golden_feature_dense.CASES, **golden_response_relation.CASES}
NO_LOSS = {"hypergrad_sgd", "hypergrad_momentum", "hypergrad_nesterov"}  # compared where the hypergradient is tested
FILES = sorted(p.stem for p in golden.GOLDEN.glob("*.npz") if p.stem not in NO_LOSS)

pytestmark = pytest.mark.skipif(not FILES, reason=f"no golden files in {golden.GOLDEN} (set DISTPRO_GOLDEN)")


def test_every_file_has_a_case():
    assert sorted(set(FILES) - set(CASES)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("file", FILES)
def test_golden(file, dtype):
    golden.check(file, CASES[file], dtype)
