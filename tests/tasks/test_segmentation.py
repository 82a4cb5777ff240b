"""Segmentation's metrics, loss and pictures against independent computations; and accuracy's sums."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

import distpro
from distpro.batch import Batch
from distpro.build.task import metrics_of
from distpro.config.schema import Config
from distpro.tasks import METRICS, Segmentation, Together
from distpro.tasks.classification import Accuracy, Classification
from distpro.tasks.segmentation import VOID, ConfusionMatrix, palette, pixel_cross_entropy
from pathways import UserError

CLASSES = 5


def batch_of(seed, samples=3, size=(8, 10), void=0.25, classes=CLASSES):
    """Random labels, of which a part is void, and logits that are right about half of the time."""
    draw = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (samples, *size), generator=draw)
    logits = torch.randn(samples, CLASSES, *size, generator=draw) + 1.5 * F.one_hot(target, CLASSES).movedim(-1, 1)
    target[torch.rand(target.shape, generator=draw) < void] = VOID
    return logits, Batch(torch.rand(samples, 3, *size, generator=draw), target, samples)


def by_hand(pairs):
    """The metrics by counting pixels one by one, in numpy and float64."""
    logits = np.concatenate([logits.double().numpy() for logits, _ in pairs])
    target = np.concatenate([batch.target.numpy() for _, batch in pairs])
    hits, union, right, loss, count = np.zeros(CLASSES), np.zeros(CLASSES), 0, 0.0, 0
    for n, y, x in np.ndindex(*target.shape):
        label, scores = target[n, y, x], logits[n, :, y, x]
        if label == VOID:
            continue
        predicted = int(scores.argmax())
        hits[label] += predicted == label
        for c in {int(label), predicted}:
            union[c] += 1
        right += predicted == label
        loss += np.log(np.exp(scores - scores.max()).sum()) - (scores[label] - scores.max())
        count += 1
    seen = union > 0
    return {
        "miou": 100 * (hits[seen] / union[seen]).mean(),
        "pixel_accuracy": 100 * right / count,
        "loss": loss / count,
    }


def measured(pairs):
    metrics = ConfusionMatrix(with_loss=True)
    for logits, batch in pairs:
        metrics.update(logits, batch)
    return metrics


@pytest.mark.parametrize("void", [0.0, 0.25, 0.9])
def test_the_confusion_matrix_counts_pixels(void):
    pairs = [batch_of(seed, samples, void=void) for seed, samples in ((0, 3), (1, 4), (2, 1))]
    assert measured(pairs).compute() == pytest.approx(by_hand(pairs), rel=1e-6)


def test_void_pixels_count_for_nothing():
    """Whatever is predicted there."""
    logits, batch = batch_of(0)
    changed = logits.clone()
    changed.movedim(1, -1)[batch.target == VOID] = torch.tensor([9.0, 0, 0, 0, 0])
    assert measured([(changed, batch)]).compute() == measured([(logits, batch)]).compute()


def test_classes_that_are_never_seen_are_left_out():
    """Class 4 is in no label; where no pixel is taken for it either, the mean is over four."""
    logits, batch = batch_of(0, classes=4)
    logits[:, 4] = -99
    found, truth = measured([(logits, batch)]).compute(), by_hand([(logits, batch)])
    assert found == pytest.approx(truth, rel=1e-6)
    logits[0, 4, 0, 0] = 99  # taken for it once
    batch.target[0, 0, 0] = 1
    once = measured([(logits, batch)]).compute()
    assert once == pytest.approx(by_hand([(logits, batch)]), rel=1e-6)
    assert once["miou"] < 0.85 * found["miou"]  # its own intersection over union is 0, over five


@pytest.mark.parametrize("make", [ConfusionMatrix, Accuracy], ids=["confusion matrix", "accuracy"])
def test_two_states_merged_are_one_pass(make):
    if make is ConfusionMatrix:
        pairs = [batch_of(seed, samples) for seed, samples in ((0, 3), (1, 4), (2, 1))]
    else:
        draws = [torch.Generator().manual_seed(seed) for seed in range(3)]
        pairs = [
            (torch.randn(n, 7, generator=g), Batch(None, torch.randint(7, (n,), generator=g), n))
            for g, n in zip(draws, (5, 8, 1), strict=True)
        ]
    whole, first, rest, none = make(), make(), make(), make()
    for n, pair in enumerate(pairs):
        whole.update(*pair)
        (first if n == 0 else rest).update(*pair)
    states = [first.state(), rest.state(), none.state()]  # of a process without a batch
    for one in (first, none):
        one.merge(states)
        assert one.compute() == pytest.approx(whole.compute(), rel=1e-12)
    assert whole.compute() == pytest.approx({**whole.compute()})
    alone = make()
    alone.merge([whole.state()])
    assert alone.compute() == whole.compute()


def test_accuracy_is_the_share_of_right_answers():
    draw = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(40, 9, generator=draw), torch.randint(9, (40,), generator=draw)
    metrics = Accuracy()
    for part in (slice(0, 16), slice(16, 40)):
        metrics.update({"logits": logits[part]}, Batch(None, labels[part], len(labels[part])))
    ranks = (logits.double().numpy() > logits.double().numpy()[np.arange(40), labels][:, None]).sum(1)
    assert metrics.compute() == pytest.approx(
        {
            "accuracy": 100 * (ranks < 1).mean(),
            "top5": 100 * (ranks < 5).mean(),
            "loss": F.cross_entropy(logits, labels).item(),
        },
        rel=1e-6,
    )


def test_by_name_beside_another_task():
    """``metrics: [confusion]``; with the task's own of the same names it is refused."""
    logits, batch = batch_of(0)
    twice = Together([ConfusionMatrix(), METRICS["confusion"]()])
    twice.update(logits, batch)
    with pytest.raises(UserError, match="metrics: two give 'miou'"):
        twice.compute()
    config = Config.model_validate({"task": "segmentation", "metrics": ["confusion"], "student": {"model": "resnet8"}})
    with pytest.raises(UserError, match="metrics: 'confusion' is what the task measures without being asked"):
        metrics_of(config, Segmentation())


# Loss


def test_the_loss_is_pytorchs():
    logits, batch = batch_of(0)
    truth = F.cross_entropy(logits, batch.target, ignore_index=255)
    assert Segmentation().loss(logits, batch).item() == pytest.approx(truth.item(), rel=1e-6)
    smooth = Segmentation(label_smoothing=0.1).loss(logits, batch)
    expected = F.cross_entropy(logits, batch.target, ignore_index=255, label_smoothing=0.1)
    assert smooth.item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_smaller_response_is_brought_to_the_labels_size():
    logits, batch = batch_of(0)
    small = F.avg_pool2d(logits, 2)
    wide = F.interpolate(small, (8, 10), mode="bilinear", align_corners=False)
    truth = F.cross_entropy(wide, batch.target, ignore_index=255)
    assert Segmentation().loss({"out": small}, batch).item() == pytest.approx(truth.item(), rel=1e-6)
    assert measured([(small, batch)]).compute() == pytest.approx(by_hand([(wide, batch)]), rel=1e-6)


def test_a_batch_of_void_pixels():
    """0 in place of PyTorch's nan, and gradients that are 0."""
    logits, batch = batch_of(0, void=1.1)
    logits.requires_grad_()
    for task in (Segmentation(), Segmentation(label_smoothing=0.1)):
        loss = task.loss({"out": logits, "aux": logits * 2}, batch)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss == 0 and not gradient.any() and gradient.isfinite().all()
    counted = batch_of(1)
    found = measured([(logits.detach(), batch), counted]).compute()
    assert found == pytest.approx(measured([counted]).compute())
    with pytest.raises(UserError, match="every pixel of the evaluation is void"):
        measured([(logits.detach(), batch)]).compute()


@pytest.mark.parametrize("weight", [0.4, 1.0, 0.0])
def test_the_auxiliary_head(weight):
    (logits, batch), (aux, _) = batch_of(0), batch_of(1)
    truth = F.cross_entropy(logits, batch.target, ignore_index=255)
    truth = truth + weight * F.cross_entropy(aux, batch.target, ignore_index=255)
    assert Segmentation(weight).loss({"out": logits, "aux": aux}, batch).item() == pytest.approx(truth.item(), rel=1e-6)
    assert torch.equal(Segmentation().response({"out": logits, "aux": aux}), logits)


def test_what_is_no_map_is_refused():
    _, batch = batch_of(0)
    with pytest.raises(UserError, match=r"segmentation needs a response \(N, K, H, W\), got \(3, 5\)"):
        Segmentation().loss(torch.zeros(3, 5), batch)
    with pytest.raises(UserError, match="classification needs a row of classes"):
        Classification().loss(torch.zeros(3, 5, 8, 10), batch)
    with pytest.raises(UserError, match=r"got \(3, 5\)"):
        pixel_cross_entropy(torch.zeros(3, 5), batch.target)
    with pytest.raises(UserError, match=r"got \(3, 5\)"):
        ConfusionMatrix().update(torch.zeros(3, 5), batch)


# Pictures


def test_pictures():
    logits, batch = batch_of(0)
    small = F.avg_pool2d(logits, 2)
    for count in (1, 2, 4):
        found = Segmentation().pictures({"out": small}, batch, count)
        assert found.shape == (min(count, 3), 3, 8, 30) and found.dtype == torch.uint8
    colours = palette(256)
    assert torch.equal(found[..., 10:20], colours[batch.target].movedim(-1, 1))
    wide = F.interpolate(small, (8, 10), mode="bilinear", align_corners=False)
    assert torch.equal(found[..., 20:], colours[wide.argmax(1)].movedim(-1, 1))
    image = found[..., :10].float()
    assert image.amin((1, 2, 3)).tolist() == [0, 0, 0] and (image.amax((1, 2, 3)) >= 254).all()


def test_colours_are_those_of_pascal_voc():
    assert palette(4).tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert palette(256)[VOID].tolist() == [224, 224, 224] and len(palette(256).unique(dim=0)) == 256


class Squares(Dataset):
    """Black images with a bright square; the rim of the square is void."""

    classes = ["ground", "square"]

    def __len__(self):
        return 8

    def __getitem__(self, n):
        label = torch.zeros(12, 16, dtype=torch.int64)
        label[2:8, n : n + 6] = VOID
        label[3:7, n + 1 : n + 5] = 1
        return (label == 1).float().expand(3, -1, -1) + 0.1 * torch.rand(3, 12, 16), label


def test_a_run_shows_them_in_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    config = {
        "task": "segmentation",
        "student": {"model": "given"},
        "training": {"epochs": 2, "batch_size": 4, "learning_rate": {"name": "poly"}},
        "precision": "float32",
    }
    result = distpro.train(config, out=tmp_path, data=(Squares(), Squares()), student=student)
    assert {"miou", "pixel_accuracy", "loss", "best_miou"} <= result.metrics.keys()
    events = accumulator.EventAccumulator(str(tmp_path), size_guidance={accumulator.IMAGES: 0}).Reload()
    shown = events.Images("test/predictions")
    assert [image.step for image in shown] == [2, 4]
    # four samples in a row, of each the image, the labels and the prediction; the first square's rim is grey
    picture = Image.open(io.BytesIO(shown[0].encoded_image_string)).convert("RGB")
    assert picture.size == (4 * 3 * 16, 12)
    assert picture.getpixel((16, 2)) == (224, 224, 224) and picture.getpixel((16, 0)) == (0, 0, 0)
    assert picture.getpixel((18, 4)) == (128, 0, 0) and min(picture.getpixel((2, 4))) > 200
