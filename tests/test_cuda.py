"""On a GPU: trainings and searches run there, and its numbers are the CPU's up to rounding.

``DISTPRO_TEST_DEVICE=cpu pytest -m cuda`` rehearses them where there is no GPU.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch

import distpro
from distpro.batch import batch_of
from distpro.losses import available_losses
from distpro.objective import Objective
from tests.conftest import DEVICE
from tests.digits import settings
from tests.losses import golden
from tests.losses.test_conformance import Sample
from tests.pairs import batch, free, network
from tests.search.test_hypergradient import OPTIMIZERS, Case, relative
from tests.search.test_sweep import Horizon
from tests.test_golden import CASES, FILES

pytestmark = pytest.mark.cuda

KD = {"pathways": None, "retrain": {"weights": "constant"}, "terms": [{"loss": "kd", "weight": 1.0}]}


@pytest.fixture(autouse=True)
def plain_float32():
    """Without TF32, whose eleven bits would hide what differs."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    distpro.train(settings(changes={"device": DEVICE, "student": {"model": "resnet14"}}), out=folder)
    return folder / "student.pt"


def on_gpu(teacher, **changes):
    return settings(teacher, {"device": DEVICE, **changes})


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "auto"])
def test_a_search_and_its_retrain(precision, teacher, tmp_path):
    schedule = distpro.search(on_gpu(teacher, precision=precision), out=tmp_path / "search")
    assert len(schedule) == 12 and torch.isfinite(schedule.alpha_tilde).all()
    assert not torch.equal(schedule.weights[0], schedule.weights[-1])
    retrained = distpro.retrain(schedule=schedule, out=tmp_path / "retrain")
    assert math.isfinite(retrained.metrics["loss"])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_search_over_a_horizon_with_trials(precision, teacher, tmp_path):
    search = {"horizon": 3, "trials": 3, "validation_fraction": 0.2}
    schedule = distpro.search(on_gpu(teacher, precision=precision, search=search), out=tmp_path / "search")
    assert torch.isfinite(schedule.weights).all()
    assert math.isfinite(distpro.retrain(schedule=schedule, out=tmp_path / "retrain").metrics["loss"])


@pytest.mark.skipif(DEVICE == "cpu", reason="of a GPU")
def test_float16_scales_its_loss(teacher):
    assert math.isfinite(distpro.retrain(on_gpu(teacher, precision="float16", **KD)).metrics["loss"])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor", "reduce-overhead", "cudagraphs"])
@pytest.mark.slow
def test_compiled(backend, teacher):
    """As fast as it may be: the loss after the training is the plain one's."""
    plain, compiled = (
        distpro.retrain(on_gpu(teacher, training={"epochs": 1}, compile=how, **KD)).metrics["loss"]
        for how in (None, backend)
    )
    assert compiled == pytest.approx(plain, rel=1e-3)


def test_cached_answers_are_the_teachers(teacher, tmp_path):
    cached = {"cache": {"folder": str(tmp_path)}, "data": {"augment": []}}
    losses = [
        distpro.retrain(on_gpu(teacher, **KD, **changes)).metrics["loss"]
        for changes in ({"data": {"augment": []}}, cached, cached)
    ]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-3)


def test_gradients_are_those_of_the_cpu():
    x, y = batch()
    found = []
    for device in ("cpu", DEVICE):
        objective = Objective(network(0).to(device), network(1).to(device), free(["a"]), x.to(device)).to(device)
        loss, _ = objective(x.to(device), y.to(device), step=0)
        loss.backward()
        found.append([loss.detach().cpu(), *(p.grad.cpu() for p in objective.trainable_parameters())])
    # the longest sums are over 5 × 8 × 8 positions; n float32 numbers in another order differ by n ε of their size
    tolerance = 5 * 8 * 8 * torch.finfo(torch.float32).eps * max(cpu.abs().max().item() for cpu in found[0])
    for cpu, gpu in zip(*found, strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=0, atol=tolerance)


@pytest.mark.parametrize("file", FILES)
def test_golden_losses(file):
    golden.check(file, CASES[file], torch.float32, DEVICE)
    golden.check(file, CASES[file], torch.float64, DEVICE)


@pytest.mark.parametrize("name", available_losses())
def test_every_loss_in_float64(name):
    """Value and gradients of both devices, from the same draws where a loss makes any of its own."""
    found = []
    for device in ("cpu", DEVICE):
        sample = Sample(name, dtype=torch.float64)
        sample.loss.to(device)
        sample.student, sample.teacher = ([x.to(device) for x in side] for side in (sample.student, sample.teacher))
        sample.target, sample.index = sample.target.to(device), sample.index.to(device)
        sample.tracked()
        torch.manual_seed(0)
        value = sample()
        value.backward()
        gradients = [x.grad for x in sample.student] + [p.grad for p in sample.loss.parameters()]
        found.append([value.detach().cpu(), *(g.cpu() for g in gradients if g is not None)])
    if name in OWN_NUMBERS:
        assert all(torch.isfinite(x).all() for x in found[1])
        return
    for cpu, gpu in zip(*found, strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=1e-9, atol=1e-11)


OWN_NUMBERS = {
    "crd": "negatives, which the generators of two devices draw differently",
    "mgd": "masks, likewise",
    "kdsvd": "signs of singular vectors, which each library chooses, and which its definition depends on",
}
assert OWN_NUMBERS.keys() <= set(available_losses())


def moved(case):
    """A pair of the hypergradient's tests on the device."""
    case.objective.to(DEVICE)
    case.params = case.objective.trainable_parameters()
    case.optimizer = case.made(case.params)
    case.weights = case.weights.to(DEVICE)
    to_device = lambda b: batch_of(b.inputs.to(DEVICE), b.target.to(DEVICE))  # noqa: E731
    case.batches, case.validation = [to_device(b) for b in case.batches], to_device(case.validation)
    case.start = copy.deepcopy((case.objective.state_dict(), case.optimizer.state_dict()))
    return case


@pytest.mark.parametrize("name", ["nesterov", "nesterov, clipped by module", "adamw, clipped", "fused"])
def test_one_step_hypergradients(name):
    """Of the two devices, and of the exact estimators among each other."""
    exact, differences = {}, []
    for device, move in (("cpu", lambda case: case), (DEVICE, moved)):
        case = Case(*OPTIMIZERS[name], steps_before=0)
        case.made = OPTIMIZERS[name][0]
        case = move(case)
        exact |= {(e, device): case.estimate(e).cpu() for e in ("forward_mode", "unrolled")}
        differences.append(case.estimate("finite_difference").cpu())
    truth = exact["unrolled", "cpu"]
    errors = {which: relative(h, truth) for which, h in exact.items()}
    assert max(errors.values()) < 1e-8, errors
    assert relative(*differences) < 1e-6


@pytest.mark.parametrize("name", ["nesterov", "nesterov, clipped by module", "adamw, clipped"])
def test_hypergradients_over_a_horizon(name):
    found = {}
    for device, move in (("cpu", lambda case: case), (DEVICE, moved)):
        case = Horizon(name, steps_before=0)
        case.made = OPTIMIZERS[name][0]
        case = move(case)
        found |= {(e, device): case.estimate_all(e)[1].cpu() for e in ("sweep", "unrolled")}
    errors = {which: relative(h, found["unrolled", "cpu"]) for which, h in found.items()}
    assert max(errors.values()) < 1e-8, errors
