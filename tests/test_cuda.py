"""On a GPU: trainings and searches run there, and its numbers are the CPU's up to float32's rounding."""

from __future__ import annotations

import math

import pytest
import torch

import distpro
from distpro.objective import Objective
from tests.digits import settings
from tests.pairs import batch, free, network

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    distpro.train(settings(changes={"device": "cuda", "student": {"model": "resnet14"}}), out=folder)
    return folder / "student.pt"


def on_gpu(teacher, **changes):
    return settings(teacher, {"device": "cuda", **changes})


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "auto"])
def test_a_search_and_its_retrain(precision, teacher, tmp_path):
    schedule = distpro.search(on_gpu(teacher, precision=precision), out=tmp_path / "search")
    assert len(schedule) == 12 and torch.isfinite(schedule.alpha_tilde).all()
    assert not torch.equal(schedule.weights[0], schedule.weights[-1])
    retrained = distpro.retrain(schedule=schedule, out=tmp_path / "retrain")
    assert math.isfinite(retrained.metrics["loss"])


def test_float16_scales_its_loss(teacher):
    kd = {"pathways": None, "retrain": {"weights": "constant"}, "terms": [{"loss": "kd", "weight": 1.0}]}
    assert math.isfinite(distpro.retrain(on_gpu(teacher, precision="float16", **kd)).metrics["loss"])


def test_gradients_are_those_of_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    x, y = batch()
    found = []
    for device in ("cpu", "cuda"):
        objective = Objective(network(0), network(1), free(["a"]), x.to(device)).to(device)
        loss, _ = objective(x.to(device), y.to(device), step=0)
        loss.backward()
        found.append([loss.detach().cpu(), *(p.grad.cpu() for p in objective.trainable_parameters())])
    # the longest sums are over 5 × 8 × 8 positions; n float32 numbers in another order differ by n ε of their size
    tolerance = 5 * 8 * 8 * torch.finfo(torch.float32).eps * max(cpu.abs().max().item() for cpu in found[0])
    for cpu, gpu in zip(*found, strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=0, atol=tolerance)
