"""mixup and CutMix: shares that are drawn as published, images and labels that agree, nothing global."""

import pytest
import torch
import torch.nn.functional as F
import yaml

import distpro
from distpro.data import Loader, Split, build_augment
from distpro.data.mixing import CutMix, Mixup, beta_quantiles, interpolated
from distpro.models import build_model
from pathways import UserError
from tests.digits import settings


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 1.0, 2.0, 8.0])
def test_quantiles_of_beta(alpha):
    """Against the distribution's moments, and its distribution function where that is known in closed form."""
    p = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    x = interpolated(beta_quantiles(alpha), p)
    assert (x.diff() >= 0).all() and x[0] >= 0 and x[-1] <= 1
    assert float(x.mean()) == pytest.approx(0.5, abs=1e-9)
    assert float(x.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=1e-3)
    fourth = 3 / (16 * (2 * alpha + 1) * (2 * alpha + 3))
    assert float((x - 0.5).pow(4).mean()) == pytest.approx(fourth, rel=2e-3)
    if alpha == 1:
        torch.testing.assert_close(x, p, rtol=1e-6, atol=1e-9)
    if alpha == 0.5:  # the arcsine law
        torch.testing.assert_close(x, (torch.pi * p / 2).sin().square(), rtol=1e-3, atol=1e-7)


def loader(augment, images=None, batch_size=16, **options):
    images = (
        torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        if images is None
        else images
    )
    labels = torch.arange(len(images)) % 5
    options = {"num_classes": 5, "seed": 3, "shuffle": True, **options}
    return Loader(
        Split.of(images, labels), batch_size, mean=[0] * 3, std=[1] * 3, augment=augment, drop_last=True, **options
    )


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_labels_say_what_the_images_show(name):
    """Images of one colour: what is left of a sample's own is its share, to the last pixel for cutmix."""
    colours = torch.arange(64).mul(4).byte().view(64, 1, 1, 1).expand(64, 3, 8, 8).contiguous()
    plain = loader([], colours)
    shares = []
    for epoch in range(6):
        for one, other in zip(
            loader([{name: {"p": 0.7, "alpha": 0.5}}], colours).epoch(epoch), plain.epoch(epoch), strict=True
        ):
            own, before = other.inputs.mean((1, 2, 3)), other.inputs.roll(1, 0).mean((1, 2, 3))
            share = (one.inputs.mean((1, 2, 3)) - before) / (own - before)
            labels = F.one_hot(other.target, 5).float()
            expected = share[:, None] * labels + (1 - share[:, None]) * labels.roll(1, 0)
            torch.testing.assert_close(one.target, expected, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(one.target.sum(1), torch.ones(16))
            assert torch.equal(one.index, other.index)
            shares.append(share)
    shares = torch.cat(shares)
    assert (shares > 1 - 1e-4).float().mean() == pytest.approx(0.3 if name == "mixup" else 0.4, abs=0.12)
    assert -1e-4 < shares.min() < 0.3 and shares.unique().numel() > 20
    if name == "cutmix":
        assert ((shares * 64).round() - shares * 64).abs().max() < 0.02  # whole pixels


def test_mixup_interpolates_and_cutmix_pastes():
    x, y = torch.randn(4, 3, 6, 6), torch.eye(4)
    drawn = torch.randint(0, 2**31, (4, 4), generator=torch.Generator().manual_seed(1))
    mixed, target = Mixup(alpha=1.0).mix(x, y, drawn[:, :2])
    share = target.diagonal()
    for n in range(4):
        torch.testing.assert_close(mixed[n], share[n] * x[n] + (1 - share[n]) * x[n - 1])
    pasted, target = CutMix(p=1.0).mix(x, y, drawn)
    own, other = (pasted == x).all(1), (pasted == x.roll(1, 0)).all(1)
    assert (own ^ other).all() and own.any() and other.any()
    torch.testing.assert_close(own.float().mean((1, 2)), target.diagonal())
    for n in range(4):  # what is pasted is a rectangle
        rows, columns = other[n].any(1), other[n].any(0)
        assert torch.equal(other[n], rows[:, None] & columns[None])


def test_epochs_repeat_and_nothing_global_is_drawn():
    augment = ["crop", "flip", "mixup", {"cutmix": {"p": 0.5}}]
    before = torch.get_rng_state()
    first, again, later = (list(loader(augment).epoch(e)) for e in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(
        torch.equal(a.inputs, b.inputs) and torch.equal(a.target, b.target) for a, b in zip(first, again, strict=True)
    )
    assert not torch.equal(first[0].inputs, later[0].inputs)
    resumed = next(loader(augment).epoch(1, start=2))
    assert torch.equal(resumed.inputs, first[2].inputs) and torch.equal(resumed.target, first[2].target)


def test_never_mixed_is_the_plain_batch():
    mixed, plain = (next(loader(a).epoch(0)) for a in ([{"mixup": {"p": 0}}, {"cutmix": {"p": 0}}], []))
    assert torch.equal(mixed.inputs, plain.inputs) and torch.equal(mixed.target.argmax(1), plain.target)


@pytest.mark.parametrize(
    "augment, message",
    [
        ([{"mixup": {"alpha": 0}}], "'mixup': alpha must be above 0"),
        ([{"cutmix": {"p": 1.5}}], "'cutmix': p must be a probability"),
    ],
)
def test_mistakes(augment, message):
    with pytest.raises(UserError, match=message):
        build_augment(augment)


@pytest.mark.slow
def test_what_does_not_go_together(tmp_path):
    for options, message in (({"expand": "rotations"}, "rotations"), ({"num_classes": None}, "number of classes")):
        with pytest.raises(UserError, match=message):
            loader(["mixup"], **options)
    torch.manual_seed(5)
    torch.save(build_model("resnet14", num_classes=10).state_dict(), tmp_path / "teacher.pt")
    config = settings(tmp_path / "teacher.pt")
    config |= {
        "data": {**config["data"], "augment": ["crop", "mixup"]},
        "pathways": None,
        "retrain": {"weights": "constant"},
    }
    with pytest.raises(UserError, match="dkd.*one label per sample: mixup"):
        distpro.retrain({**config, "terms": [{"loss": "dkd", "weight": 1}]}, out=tmp_path / "a")
    cached = {"terms": [{"loss": "kd", "weight": 1}], "cache": {"folder": str(tmp_path / "cache")}}
    with pytest.raises(UserError, match="cache: mixup"):
        distpro.retrain({**config, **cached}, out=tmp_path / "b")


@pytest.mark.slow
def test_a_search_and_a_retrain_with_mixed_samples(tmp_path):
    torch.manual_seed(5)
    torch.save(build_model("resnet14", num_classes=10).state_dict(), tmp_path / "teacher.pt")
    config = settings(tmp_path / "teacher.pt")
    config["data"] = {**config["data"], "augment": ["crop", {"mixup": {"alpha": 0.4}}, "cutmix"]}
    config = yaml.safe_load(yaml.safe_dump(config))
    schedule = distpro.search(config, out=tmp_path / "search")
    assert (schedule.alpha_tilde[-1] != 1).all()
    result = distpro.retrain(config, schedule=tmp_path / "search" / "alpha.pt", out=tmp_path / "retrain")
    assert 0 <= result.metrics["accuracy"] <= 100
