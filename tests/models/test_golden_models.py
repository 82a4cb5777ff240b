"""The field's networks with weights filled by rule: parameter counts and shapes, features, and logits as recorded from
RepDistiller's own (models_cifar100.json states the rule)."""

import json
import os
from pathlib import Path

import pytest
import torch

from distpro.models import build_model, stage_taps
from pathways import tap

GOLDEN = Path(os.environ.get("DISTPRO_GOLDEN", Path(__file__).resolve().parents[3] / "shared" / "golden"))
FILE = GOLDEN / "models_cifar100.json"
RECORDS = json.loads(FILE.read_text())["models"] if FILE.is_file() else {}

pytestmark = pytest.mark.skipif(not RECORDS, reason=f"no {FILE} (set DISTPRO_GOLDEN)")


def fill(model):
    for number, parameter in enumerate(model.parameters()):
        wave = torch.cos(0.7 * torch.arange(parameter.numel(), dtype=torch.float64) + number).view(parameter.shape)
        fan_in = parameter[0].numel()
        parameter.data = (wave * (2 / fan_in) ** 0.5 if parameter.dim() > 1 else 1 + 0.1 * wave).to(parameter.dtype)


def features_and_logits(model, names, dtype):
    model.to(dtype)
    fill(model)
    x = torch.sin(0.01 * torch.arange(2 * 3 * 32 * 32, dtype=torch.float64)).view(2, 3, 32, 32)
    with torch.no_grad(), tap(model, names) as taps:
        logits = model(x.to(dtype))
    return [taps[name].double() for name in names] + [logits.double()]


@pytest.mark.parametrize("name", RECORDS)
def test_parameters(name):
    record, parameters = RECORDS[name], list(build_model(name, num_classes=100).parameters())
    assert sum(p.numel() for p in parameters) == record["parameters"]
    assert len(parameters) == record["tensors"]
    if record["parameter_shapes"]:
        assert [list(p.shape) for p in parameters] == record["parameter_shapes"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDS)
def test_features_and_logits(name):
    """The record was made in float32 and is compared with a float64 run. What float32 costs, with weights that make
    activations grow up to 1e15, is measured by a float32 run of ours: record and run may both be off by that much."""
    record, model = RECORDS[name], build_model(name, num_classes=100).eval()
    taps = stage_taps(model)
    expected = [*record["feats"], *(record["preact_feats"] or []), record["logits"]]
    names = [taps.stem, *taps.post, taps.embedding]
    if record["preact_feats"]:
        names += [taps.stem, *taps.pre, taps.embedding]
    single = features_and_logits(model, names, torch.float32)
    double = features_and_logits(model, names, torch.float64)
    assert len(double) == len(expected)
    for rounded, value, want in zip(single, double, expected, strict=True):
        assert list(value.shape) == want["shape"]
        tolerance = 2 * (rounded - value).abs().max().item() + 1e-6 * (abs(want["mean"]) + want["std"])
        found = [value.mean(), value.std(), value.min(), *value.flatten()[:4]]
        assert [f.item() for f in found] == pytest.approx(
            [want["mean"], want["std"], want["min"], *want["first"]], rel=0, abs=tolerance
        )
