"""Several views of an image at evaluation, against computations by hand, pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import distpro
from distpro.batch import Batch
from distpro.objective import Objective
from distpro.tasks import Segmentation
from distpro.tasks.windows import Views
from pathways import UserError


class Net(nn.Module):
    """Sees the place of a pixel within what it is given, so that windows and mirror images matter; half the size."""

    def __init__(self, seed=0, refuses=None):
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.refuses, self.seen = nn.Conv2d(5, 4, 3, 2, 1), refuses, []

    def forward(self, x):
        self.seen.append(tuple(x.shape[2:]))
        if self.refuses is not None and tuple(x.shape[2:]) != self.refuses:
            raise RuntimeError("Wrong input shape")
        rows, columns = (torch.linspace(0, 1, n).to(x) for n in x.shape[2:])
        place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
        return {"out": self.conv(torch.cat([x, place.expand(len(x), -1, -1, -1)], 1))}


def batch_of(size=(10, 13)):
    draw = torch.Generator().manual_seed(1)
    return Batch(torch.randn(2, 3, *size, generator=draw), torch.randint(4, (2, *size), generator=draw), 2)


def answer(net, x):
    """Logits at the size of what is asked."""
    with torch.no_grad():
        return F.interpolate(net(x)["out"], x.shape[2:], mode="bilinear", align_corners=False)


def predicted(batch, net, **options):
    with torch.no_grad():
        return Segmentation(**options).predict(net.eval(), batch)


def test_by_default_the_model_is_asked_once():
    net, batch = Net(), batch_of()
    found = predicted(batch, net)
    assert net.seen == [(10, 13)] and found["out"].shape == (2, 4, 5, 7)


@pytest.mark.parametrize(
    "window, stride, tops, lefts",
    [
        ([6, 8], [4, 5], [0, 4], [0, 5]),
        ([6, 8], [3, 3], [0, 3, 4], [0, 3, 5]),
        ([6, 8], None, [0, 4], [0, 5]),  # two thirds
        ([10, 13], None, [0], [0]),
        (5, 5, [0, 5], [0, 5, 8]),
    ],
)
def test_windows_by_hand(window, stride, tops, lefts):
    """For each pixel, the mean over the windows in which it lies."""
    net, batch = Net(), batch_of()
    found = predicted(batch, net, window=window, stride=stride)
    height, width = window if isinstance(window, list) else (window, window)
    answers = {(t, w): answer(net, batch.inputs[:, :, t : t + height, w : w + width]) for t in tops for w in lefts}
    for y, x in np.ndindex(10, 13):
        own = [a[:, :, y - t, x - w] for (t, w), a in answers.items() if t <= y < t + height and w <= x < w + width]
        torch.testing.assert_close(found[:, :, y, x], sum(own) / len(own))


def test_a_window_larger_than_the_image():
    """PSPNet's way: padded with the mean, which is 0, and what was padded is dropped."""
    net, batch = Net(refuses=(12, 12)), batch_of()
    found = predicted(batch, net, window=12, stride=12)
    padded = torch.zeros(2, 3, 12, 13)
    padded[:, :, :10] = batch.inputs
    left, right = answer(net, padded[..., :12]), answer(net, padded[..., 1:])
    torch.testing.assert_close(found[..., 0], left[:, :, :10, 0])
    torch.testing.assert_close(found[..., 12], right[:, :, :10, 11])
    torch.testing.assert_close(found[..., 1:12], (left[:, :, :10, 1:] + right[:, :, :10, :11]) / 2)


def test_a_mirror_image_by_hand():
    net, batch = Net(), batch_of()
    plain, mirrored = answer(net, batch.inputs), answer(net, batch.inputs.flip(3)).flip(3)
    expected = (plain.softmax(1) + mirrored.softmax(1)) / 2
    torch.testing.assert_close(predicted(batch, net, flip=True).exp(), expected)
    assert (plain - mirrored).abs().max() > 0.1  # that it is more than the plain one


def test_scales_by_hand():
    net, batch = Net(), batch_of()
    found = predicted(batch, net, scales=[0.5, 1, 2], flip=True)
    total = 0
    for size in ((5, 6), (10, 13), (20, 26)):  # 6.5 is rounded to the even number
        view = F.interpolate(batch.inputs, size, mode="bilinear", align_corners=False)
        for mirrored in (False, True):
            logits = answer(net, view.flip(3) if mirrored else view)
            logits = logits.flip(3) if mirrored else logits
            total = total + F.interpolate(logits, (10, 13), mode="bilinear", align_corners=False).softmax(1)
    torch.testing.assert_close(found.exp(), total / 6)
    assert set(net.seen) == {(5, 6), (10, 13), (20, 26)}


def test_all_together_and_the_metrics_are_of_it():
    net, batch = Net(), batch_of()
    options = {"scales": [1, 1.5], "flip": True, "window": [8, 8]}
    objective = Objective(None, net, task=Segmentation(**options)).eval()
    with torch.no_grad():
        output = objective.predict(batch)
    assert set(net.seen[-4:]) == {(8, 8)}
    metrics = objective.task.metrics()
    metrics.update(output, batch)
    found = metrics.compute()
    assert found["loss"] == pytest.approx(
        F.cross_entropy(predicted(batch, net, **options), batch.target).item(), rel=1e-5
    )
    right = (predicted(batch, net, **options).argmax(1) == batch.target).double().mean().item()
    assert found["pixel_accuracy"] == pytest.approx(100 * right)
    one_hot = torch.softmax(output, 1).sum(1)
    torch.testing.assert_close(one_hot, torch.ones_like(one_hot))


def test_in_training_mode_each_image_is_asked_once():
    """A search's passes are those of training."""
    net, batch = Net(), batch_of()
    objective = Objective(None, net, task=Segmentation(flip=True))
    objective.train()
    objective.predict(batch)
    assert len(net.seen) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scales": []}, "scales must be a list of numbers above 0, got \\[\\]"),
        ({"scales": [0]}, "scales must be"),
        ({"scales": "1"}, "scales must be"),
        ({"scales": [True]}, "scales must be"),
        ({"flip": 1}, "flip must be true or false, got 1"),
        ({"window": 0}, "window must be a side or"),
        ({"window": [4]}, "window must be a side or"),
        ({"window": 4, "stride": 5}, r"stride \[5, 5\] leaves gaps between windows of \[4, 4\]"),
        ({"stride": 5}, "stride is of windows: give window too"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match="segmentation: " + message):
        Segmentation(**options)


def test_windows_are_of_images():
    with pytest.raises(UserError, match=r"scales, flip and windows are of images"):
        Views((1.0,), True).predict(lambda x: x, torch.zeros(2, 3))
    with pytest.raises(UserError, match="of a sole tensor"):
        Segmentation(flip=True).predict(
            Net().eval(), Batch({"a": torch.zeros(1, 3, 4, 4), "b": torch.zeros(1)}, None, 1)
        )


def test_a_student_that_cannot_be_asked_at_evaluation_is_refused_before_the_training(tmp_path, monkeypatch):
    """Of training it sees crops of 4x6, at evaluation whole images of 8x10; windows of the crop's size mend it."""
    from tests.data.test_segmentation import NAMES, write

    monkeypatch.chdir(tmp_path)
    write(tmp_path / "set", (10, 8))
    config = {
        "task": "segmentation",
        "student": {"model": "given"},
        "data": {
            "name": "segmentation",
            "root": "set",
            "params": {"names": NAMES, "ignore": 7},
            "augment": [{"crop": {"size": [4, 6]}}],
        },
        "training": {"epochs": 1, "batch_size": 2},
        "precision": "float32",
        "tracking": {"tensorboard": False},
    }
    with pytest.raises(UserError, match="student, at evaluation: two samples .* Wrong input shape"):
        distpro.train(config, tmp_path / "run", student=Net(refuses=(4, 6)))
    config["task"] = {"segmentation": {"window": [4, 6], "scales": [0.5, 1], "flip": True}}
    result = distpro.train(config, tmp_path / "run", student=Net(refuses=(4, 6)))
    assert math.isfinite(result.metrics["loss"]) and 0 <= result.metrics["miou"] <= 100
