"""The cross entropy at its best temperature, as a loss with a gradient and as a metric."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distpro.batch import Batch
from distpro.tasks import CalibratedLoss, Classification, Segmentation, calibrated_loss


def logits_of(count=200, classes=5, sure=1.0, seed=0):
    """Right more often than not, and as ``sure`` as that times what would be calibrated."""
    draw = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (count,), generator=draw)
    logits = torch.randn(count, classes, generator=draw) + 1.5 * F.one_hot(target, classes)
    return sure * logits, target


def smallest(logits, target):
    """By L-BFGS on the logarithm of the inverse temperature, in float64."""
    x = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([x], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(x.exp() * logits.double(), target)
        loss.backward()
        return loss

    optimizer.step(closure)
    return closure().item()


@pytest.mark.parametrize("sure", [0.05, 0.3, 1.0, 4.0, 30.0])
def test_it_is_the_smallest_over_all_temperatures(sure):
    logits, target = logits_of(sure=sure)
    expected = smallest(logits, target)
    assert calibrated_loss(logits, target).item() == pytest.approx(expected, rel=2e-5)
    assert expected == pytest.approx(smallest(*logits_of()), rel=1e-6)  # however sure the model is
    assert F.cross_entropy(logits, target) >= expected


def test_its_gradient_is_that_of_the_smallest():
    """Against central differences of the smallest loss; along the logits themselves it is zero, for that is a temperature."""
    logits, target = logits_of(40, sure=3.0)
    leaf = logits.clone().requires_grad_()
    calibrated_loss(leaf, target).backward()
    assert abs((leaf.grad * logits).sum().item()) < 1e-3 * leaf.grad.norm() * logits.norm()
    draw = torch.Generator().manual_seed(1)
    for _ in range(3):
        way = torch.randn(logits.shape, generator=draw)
        ahead, behind = (smallest(logits.double() + e * way, target) for e in (1e-4, -1e-4))
        assert (leaf.grad * way).sum().item() == pytest.approx((ahead - behind) / 2e-4, rel=5e-3, abs=1e-5)


def test_probabilities_as_targets():
    logits, target = logits_of(sure=5.0)
    soft = 0.9 * F.one_hot(target, 5) + 0.02
    assert calibrated_loss(logits, soft).item() == pytest.approx(smallest(logits, soft.double()), rel=2e-5)


def batches(logits, target, sizes):
    for part, of_part in zip(logits.split(sizes), target.split(sizes), strict=True):
        yield part, Batch(part, of_part, len(part))


@pytest.mark.parametrize("sure", [0.1, 1.0, 12.0])
def test_the_metric_is_of_the_whole_set(sure):
    """Of one temperature for all batches, over two processes."""
    logits, target = logits_of(sure=sure)
    metrics = [CalibratedLoss(Classification().rows) for _ in range(2)]
    for n, (part, batch) in enumerate(batches(logits, target, [90, 60, 50])):
        metrics[n % 2].update(part, batch)
    metrics[0].merge([metric.state() for metric in metrics])
    assert metrics[0].compute() == {"calibrated_loss": pytest.approx(smallest(logits, target), rel=2e-3)}
    assert CalibratedLoss(Classification().rows).compute() == {}


def test_void_pixels_do_not_count():
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 4, 6, 6, generator=draw)
    target = torch.randint(4, (2, 6, 6), generator=draw).byte()
    target[:, 2:4] = 255
    rows, labels = Segmentation().rows({"out": logits}, Batch(torch.zeros(2, 3, 6, 6), target, 2))
    assert rows.shape == (48, 4) and (labels < 4).all()
    counted = logits.movedim(1, -1)[target != 255]
    assert torch.equal(rows, counted)
    nothing = torch.full_like(target, 255)
    assert calibrated_loss(*Segmentation().rows(logits, Batch(torch.zeros(2, 3, 6, 6), nothing, 2))) == 0


def test_of_large_maps_every_few_pixels_say_the_same():
    """Logits of smooth maps, as a network gives them; half of the pixels of one picture do not count."""
    torch.manual_seed(0)
    coarse = torch.randn(4, 5, 12, 16)
    logits = 3 * F.interpolate(coarse, (192, 256), mode="bilinear")
    target = (logits / 2 + torch.randn_like(logits)).argmax(1)
    target[0, :, ::2] = 255
    metric = CalibratedLoss(Segmentation().rows)
    metric.update(logits, Batch(torch.zeros(4, 3, 192, 256), target, 4))
    assert metric.state()["count"] < 3000 * 4
    counts = target != 255
    expected = smallest(logits.movedim(1, -1)[counts], target[counts])
    assert metric.compute() == {"calibrated_loss": pytest.approx(expected, rel=0.02)}
