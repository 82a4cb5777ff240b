"""Depth's metrics, loss and pictures against independent computations, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import mean_absolute_percentage_error, root_mean_squared_error

from distpro.batch import Batch
from distpro.losses import build_loss
from distpro.objective import Objective, Term
from distpro.tasks import METRICS, TASKS, Depth
from distpro.tasks.depth import DepthErrors
from pathways import UserError


def batch_of(seed, samples=3, size=(8, 10), missing=0.25):
    """Random depth, of which a part is not measured, and predictions within a factor of about two; some are below 0."""
    draw = torch.Generator().manual_seed(seed)
    target = 0.5 + 4 * torch.rand(samples, *size, generator=draw)
    predicted = target * (0.4 * torch.randn(samples, *size, generator=draw)).exp() - 0.4
    target[torch.rand(target.shape, generator=draw) < missing] = 0
    return predicted.unsqueeze(1), Batch(torch.rand(samples, 3, *size, generator=draw), target, samples)


def independent(pairs):
    """scikit-learn's errors of each image, averaged over images; ratios and the mean over pixels in numpy."""
    images, errors = [], []
    for predicted, batch in pairs:
        for p, t in zip(predicted[:, 0].double().numpy(), batch.target.double().numpy(), strict=True):
            p, t = p[t > 0], t[t > 0]
            if not len(t):
                continue
            ratio = np.where(p > 0, np.maximum(p / t, t / np.where(p > 0, p, 1)), np.inf)
            deltas = [100 * np.mean(ratio < 1.25**k) for k in (1, 2, 3)]
            images.append([root_mean_squared_error(t, p), mean_absolute_percentage_error(t, p), *deltas])
            errors += list(np.abs(p - t))
    found = dict(zip(("rmse", "absrel", "delta1", "delta2", "delta3"), np.mean(images, 0), strict=True))
    return {**found, "loss": np.mean(errors)}


def measured(pairs):
    metrics = DepthErrors(with_loss=True)
    for predicted, batch in pairs:
        metrics.update(predicted, batch)
    return metrics


@pytest.mark.parametrize("missing", [0.0, 0.25, 0.9])
def test_the_errors_are_scikit_learns_averaged_over_images(missing):
    pairs = [batch_of(seed, samples, missing=missing) for seed, samples in ((0, 3), (1, 4), (2, 1))]
    found = measured(pairs).compute()
    assert found == pytest.approx(independent(pairs), rel=1e-9)
    assert 0 < found["delta1"] < found["delta2"] < found["delta3"] < 100


def test_images_count_alike_however_many_of_their_pixels_were_measured():
    """By hand: errors 1 m of one pixel, and 0 m of all others of another image."""
    target = torch.zeros(2, 2, 2)
    target[0, 0, 0], target[1] = 2.0, 1.0
    predicted = target.clone()
    predicted[0, 0, 0] = 3.0
    found = measured([(predicted, Batch(None, target, 2))]).compute()
    expected = {"rmse": 0.5, "absrel": 0.25, "delta1": 50, "delta2": 100, "delta3": 100, "loss": 0.2}
    assert found == pytest.approx(expected)  # 3 / 2 is below 1.25², which is 1.5625


def test_what_was_not_measured_counts_for_nothing():
    predicted, batch = batch_of(0)
    changed = torch.where(batch.target.unsqueeze(1) > 0, predicted, 77)
    assert measured([(changed, batch)]).compute() == measured([(predicted, batch)]).compute()
    assert Depth().loss(changed, batch) == Depth().loss(predicted, batch)


def test_a_prediction_of_nothing_or_less_is_in_no_threshold():
    target = torch.ones(1, 1, 3)
    predicted = torch.tensor([[[1.0, 0.0, -1.0]]])
    found = measured([(predicted, Batch(None, target, 1))]).compute()
    assert [found[f"delta{k}"] for k in (1, 2, 3)] == pytest.approx([100 / 3] * 3)


def test_two_states_merged_are_one_pass():
    pairs = [batch_of(seed, samples) for seed, samples in ((0, 3), (1, 4), (2, 1))]
    whole, first, rest, none = (DepthErrors(with_loss=True) for _ in range(4))
    for n, pair in enumerate(pairs):
        whole.update(*pair)
        (first if n == 0 else rest).update(*pair)
    states = [first.state(), rest.state(), none.state()]  # of a process without a batch
    for one in (first, none):
        one.merge(states)
        assert one.compute() == pytest.approx(whole.compute(), rel=1e-12)
    assert DepthErrors().compute() == {}
    plain = METRICS["depth_errors"]()
    plain.update(*pairs[0])
    assert "loss" not in plain.compute()


def test_on_real_depth(data_folder):
    """Predictions of one constant, the median, on 7-Scenes' test frames."""
    from distpro.data import load_data, make_loader

    archive = data_folder / "depth7scenes" / "sevenscenes_128x96.zip"
    if not archive.is_file():
        pytest.skip(f"no {archive}")
    data = load_data("sevenscenes", archive)
    batches = list(make_loader(data, data.test, 16, training=False).epoch(0))
    pairs = [(torch.full((b.samples, 1, 96, 128), 1.809), b) for b in batches]
    found = measured(pairs).compute()
    assert found == pytest.approx(independent(pairs), rel=1e-6)
    assert found["rmse"] == pytest.approx(0.8144, abs=1e-4)


# Loss


def test_the_loss_is_the_mean_over_measured_pixels_of_the_batch():
    predicted, batch = batch_of(0)
    counts = batch.target > 0
    truth = F.l1_loss(predicted[:, 0][counts].double(), batch.target[counts].double())
    assert Depth().loss(predicted, batch).item() == pytest.approx(truth.item(), rel=1e-6)
    assert Depth().loss({"out": predicted[:, 0]}, batch) == Depth().loss(predicted, batch)


def test_a_smaller_response_is_brought_to_the_target_s_size():
    predicted, batch = batch_of(0)
    small = F.avg_pool2d(predicted, 2)
    wide = F.interpolate(small, (8, 10), mode="bilinear", align_corners=False)
    assert Depth().loss(small, batch).item() == pytest.approx(Depth().loss(wide, batch).item(), rel=1e-6)
    assert measured([(small, batch)]).compute() == pytest.approx(independent([(wide, batch)]), rel=1e-6)


def test_a_batch_without_a_measurement():
    predicted, batch = batch_of(0, missing=1.1)
    predicted.requires_grad_()
    loss = Depth().loss(predicted, batch)
    (gradient,) = torch.autograd.grad(loss, predicted)
    assert loss == 0 and not gradient.any() and gradient.isfinite().all()
    other = batch_of(1)
    both = measured([(predicted.detach(), batch), other]).compute()
    assert both == pytest.approx(measured([other]).compute())
    with pytest.raises(UserError, match="no pixel of the evaluation was measured"):
        measured([(predicted.detach(), batch)]).compute()


@pytest.mark.parametrize(
    "target, message",
    [
        (torch.ones(3, 8, 10, dtype=torch.int64), "targets are floating-point maps in metres, got int64"),
        ([1.0], "targets are floating-point maps in metres, got list"),
        (torch.ones(3), r"targets are maps \(N, H, W\), got \(3,\)"),
        (torch.full((3, 8, 10), -1.0), r"there is a target of -1; allowed: 0 \(not measured\) and above, finite"),
        (torch.full((3, 8, 10), float("nan")), "there is a target of nan"),
        (torch.full((3, 8, 10), float("inf")), "there is a target of inf"),
        (torch.ones(3, 10, 8), "a response of 8x10 does not fit depth maps of 10x8: transposed"),
        (torch.ones(2, 8, 10), "3 predictions for 2 depth maps"),
    ],
)
def test_targets_that_are_no_depth_are_refused(target, message):
    predicted, _ = batch_of(0)
    for use in (Depth().loss, DepthErrors().update):
        with pytest.raises(UserError, match=message):
            use(predicted * torch.ones(1, 1, 8, 10), Batch(None, target, 3))


@pytest.mark.parametrize("response", [torch.zeros(3, 5), torch.zeros(3, 2, 8, 10)])
def test_responses_that_are_no_depth_are_refused(response):
    with pytest.raises(UserError, match=r"depth needs a response \(N, 1, H, W\)"):
        Depth().loss(response, batch_of(0)[1])


# What the losses see


class Answer(torch.nn.Module):
    """Whatever comes in, one map of parameters for each sample."""

    def __init__(self, maps):
        super().__init__()
        self.maps = torch.nn.Parameter(maps)

    def forward(self, x):
        return self.maps + 0 * x.mean()


@pytest.mark.parametrize("positions", ["counted", "all"])
def test_the_teacher_s_depth_as_target(positions):
    """At measured pixels, or everywhere."""
    (ours, batch), (theirs, _) = batch_of(0), batch_of(1)
    loss = build_loss("l1", [(1, 8, 10)], [(1, 8, 10)], positions=positions)
    objective = Objective(Answer(theirs), Answer(ours), [Term(loss, "l1", weight=1.0)], task=Depth())
    _, parts = objective(batch)
    counts = batch.target > 0 if positions == "counted" else torch.ones_like(batch.target).bool()
    truth = (ours - theirs)[:, 0][counts].abs().double().mean()
    assert parts["l1"].item() == pytest.approx(truth.item(), rel=1e-6)
    assert parts["task"].item() == pytest.approx(Depth().loss(ours, batch).item(), rel=1e-6)


@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "logit_std", "ls"])
def test_losses_of_classes_are_refused(name):
    """The probability of one class is 1, whatever a model says: such a term would be 0 and nobody would notice."""
    with pytest.raises(UserError, match=f"'{name}' compares probabilities of classes.*take loss l1"):
        build_loss(name, [(1, 8, 10)], [(1, 8, 10)])


def test_its_name_and_what_a_model_is_told():
    task = TASKS.build("depth")
    assert task.model_arguments(None) == {"num_classes": 1} and not task.higher_is_better
    assert task.labels(Batch(None, None, 2)) == (None, None)
    assert not hasattr(task, "rows")  # no cross entropy, so that a search judges by the task's loss


# Pictures


def test_pictures():
    predicted, batch = batch_of(0)
    for count in (1, 2, 4):
        found = Depth().pictures(predicted, batch, count)
        assert found.shape == (min(count, 3), 3, 8, 30) and found.dtype == torch.uint8
    target, shown = batch.target, found[:, 0, :, 10:20]
    assert not shown[target == 0].any() and (shown[target > 0] >= 32).all()
    nearest = target.masked_fill(target == 0, 99).flatten(1).argmin(1)
    assert shown.flatten(1).gather(1, nearest[:, None]).eq(255).all()  # near is bright
    farthest = target.flatten(1).argmax(1)
    assert shown.flatten(1).gather(1, farthest[:, None]).eq(32).all()
    same = Depth().pictures(target.unsqueeze(1), batch)
    assert torch.equal(same[:, 0, :, 20:][target > 0], same[:, 0, :, 10:20][target > 0])
    assert Depth().pictures(predicted, Batch(torch.zeros(3, 7), batch.target, 3)) is None
    assert Depth().pictures(torch.zeros(3, 1, 8, 10), Batch(batch.inputs, torch.zeros(3, 8, 10), 3)).shape[0] == 3
