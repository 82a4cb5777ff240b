"""Ensembles and adapted teachers against their members and against the arithmetic written out in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distpro.models import build_model, stage_taps
from distpro.models.ensemble import Ensemble, InputAdapter
from pathways import Tapped, UserError, tap
from tests.pathways.reference import called_by, without_relus

STUDENT = {"student_mean": (0.5071, 0.4867, 0.4408), "student_std": (0.2675, 0.2565, 0.2761)}
TEACHER = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
NAMES = ("small", "wide")


def members():
    torch.manual_seed(0)
    return {
        "small": build_model("resnet8", num_classes=7).eval(),
        "wide": build_model("wrn_16_1", num_classes=7).eval(),
    }


def images(n=3, size=32):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def normalised(raw, mean, std):
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std))
    return (raw - mean) / std


@pytest.fixture
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def adapted_and_expected(dtype, size=None):
    raw = torch.rand(2, 3, 12, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x = normalised(raw, STUDENT["student_mean"], STUDENT["student_std"]).to(dtype)
    return InputAdapter(nn.Identity(), **STUDENT, **TEACHER, size=size)(x), normalised(raw, **TEACHER)


def test_an_adapted_input_is_the_raw_image_normalised_for_the_teacher():
    """Each of x, the scale, the product, the shift and the sum is rounded to 24 bits; with |x · scale| < 2.8,
    |shift| < 0.3 and a sum below 2.8 that makes less than 12 units of 2^-24."""
    adapted, expected = adapted_and_expected(torch.float32)
    assert adapted.dtype == torch.float32 and (adapted - expected).abs().max() < 12 * 2**-24


def test_an_adapted_input_in_float64(double):
    adapted, expected = adapted_and_expected(torch.float64)
    torch.testing.assert_close(adapted, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "height, row, weights",
    [
        (6, 2, {3: 1 / 8, 4: 3 / 8, 5: 3 / 8, 6: 1 / 8}),  # a triangle over four rows, centred between rows 4 and 5
        (24, 5, {2: 3 / 4, 3: 1 / 4}),  # centred a quarter of a row below row 2
    ],
)
def test_an_adapted_input_is_resized(double, height, row, weights):
    adapted, expected = adapted_and_expected(torch.float64, (height, 9))
    assert adapted.shape == (2, 3, height, 9)
    torch.testing.assert_close(adapted[:, :, row], sum(w * expected[:, :, i] for i, w in weights.items()))


def test_one_number_is_both_sizes():
    assert adapted_and_expected(torch.float32, 6)[0].shape == (2, 3, 6, 6)


def test_an_adapter_of_equal_numbers_changes_nothing_and_saves_nothing():
    model = members()["small"]
    same = InputAdapter(model, **STUDENT, mean=STUDENT["student_mean"], std=STUDENT["student_std"])
    assert torch.equal(same(images()), model(images()))
    assert list(same.state_dict()) == [f"model.{name}" for name in model.state_dict()]


@pytest.mark.parametrize("combine", ["logits", "probabilities", "log_probabilities"])
def test_an_ensemble_of_one_is_the_model(combine):
    model, x = members()["small"], images()
    expected = model(x) if combine == "logits" else F.log_softmax(model(x), 1)
    torch.testing.assert_close(Ensemble({"one": model}, {"one": 0.3}, combine)(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("weights, shares", [(None, (0.5, 0.5)), ({"wide": 1, "small": 3}, (0.75, 0.25))])
@pytest.mark.parametrize("shape", [(4, 5), (2, 5, 3, 3)])
def test_an_ensemble_of_two_is_what_is_computed_by_hand(weights, shares, shape):
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    first, second = nn.Identity(), nn.Identity()
    first.register_forward_hook(lambda *_: a), second.register_forward_hook(lambda *_: b)
    given, (u, v) = {"small": first, "wide": second}, shares

    torch.testing.assert_close(Ensemble(given, weights)(a), u * a + v * b)
    p = Ensemble(given, weights, "probabilities")(a).exp()
    torch.testing.assert_close(p, u * a.exp() / a.exp().sum(1, True) + v * b.exp() / b.exp().sum(1, True))
    torch.testing.assert_close(p.sum(1), torch.ones_like(p.sum(1)))
    by_log = Ensemble(given, weights, "log_probabilities")(a)
    log_p, log_q = a - a.exp().sum(1, True).log(), b - b.exp().sum(1, True).log()
    torch.testing.assert_close(by_log, u * log_p + v * log_q)
    torch.testing.assert_close(by_log.softmax(1), (u * a + v * b).softmax(1))


@pytest.mark.parametrize("combine", ["logits", "probabilities", "log_probabilities"])
def test_a_member_of_weight_zero_has_no_say(combine):
    given, x = members(), images()
    alone = Ensemble({"wide": given["wide"]}, None, combine)
    assert torch.equal(Ensemble(given, {"small": 0, "wide": 2}, combine)(x), alone(x))


def adapted_members():
    given = members()
    return given, Ensemble(
        {"small": given["small"], "wide": InputAdapter(given["wide"], **STUDENT, **TEACHER, size=40)}
    )


def listed(taps):
    return [*taps.post, *taps.pre, taps.stem, taps.embedding]


def test_taps_by_path_are_the_members_own():
    given, ensemble = adapted_members()
    own = {"small": listed(stage_taps(given["small"])), "wide": listed(stage_taps(given["wide"]))}
    paths = {name: listed(ensemble.member_taps(name)) for name in NAMES}
    assert paths["wide"] == [f"wide.model.{n}" for n in own["wide"]]
    assert stage_taps(ensemble.wide).embedding == f"model.{stage_taps(given['wide']).embedding}"

    x = images()
    tapped = Tapped(ensemble, [*NAMES, *paths["small"], *paths["wide"]], x)
    assert tapped.traced
    output, features = tapped(x)
    seen = {"small": x, "wide": InputAdapter(nn.Identity(), **STUDENT, **TEACHER, size=40)(x)}
    for name in NAMES:
        with tap(given[name], own[name]) as taps:
            assert torch.equal(features[name], given[name](seen[name]))
        assert all(torch.equal(features[path], taps[n]) for path, n in zip(paths[name], own[name], strict=True))
    torch.testing.assert_close(output, (features["small"] + features["wide"]) / 2)


def test_members_and_layers_that_no_tap_reads_do_not_run():
    given, ensemble = adapted_members()
    first, *_ = ensemble.member_taps("wide").post
    tapped = Tapped(ensemble, [first], images(), output=False)
    _, called = called_by(lambda: tapped(images()), ensemble)
    assert tapped.traced and called == without_relus(ensemble, tapped.modules_run)
    assert all(n.startswith("wide.model.") for n in called) and "wide.model.fc" not in called


def test_members_that_state_no_taps():
    ensemble = Ensemble({"a": nn.Linear(2, 3), "b": InputAdapter(nn.Flatten(), **STUDENT, **TEACHER)})
    assert ensemble.member_taps("a") is ensemble.member_taps("b") is stage_taps(ensemble) is None


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda a, b: Ensemble({}), "at least one member"),
        (lambda a, b: Ensemble({"a.b": a}), "'a.b' cannot be the name"),
        (lambda a, b: Ensemble({"a:b": a}), "'a:b' cannot be the name"),
        (lambda a, b: Ensemble({"": a}), "'' cannot be the name"),
        (lambda a, b: Ensemble({"train": a}), "'train' cannot be the name"),
        (lambda a, b: Ensemble({"weights": a}), "'weights' cannot be the name"),
        (lambda a, b: Ensemble({"class": a}), "'class' cannot be the name"),
        (lambda a, b: Ensemble({"logits": a}), "'logits' cannot be the name"),
        (lambda a, b: Ensemble({1: a}), "'1' cannot be the name"),
        (lambda a, b: Ensemble({"a": a}, {"a": 0}), "positive sum"),
        (lambda a, b: Ensemble({"a": a}, {"a": float("nan")}), "positive sum"),
        (lambda a, b: Ensemble({"a": a, "b": b}, {"a": 2, "b": -1}), "zero or more"),
        (lambda a, b: Ensemble({"left": a, "right": b}, {"left": 1, "rigth": 1}), "'rigth'; did you mean 'right'"),
        (lambda a, b: Ensemble({"a": a, "b": b}, {"a": 1}), "no weight for b"),
        (lambda a, b: Ensemble({"a": a}, None, "logit"), "unknown combine 'logit'; did you mean 'logits'"),
        (lambda a, b: Ensemble({"left": a}).member_taps("lift"), "no member 'lift'; did you mean 'left'"),
        (lambda a, b: Ensemble({"a": a, "b": b})(torch.zeros(2, 3)), r"one shape, got a \(2, 4\), b \(2, 5\)"),
        (lambda a, b: InputAdapter(a, [0], [1], [0, 0], [1]), "mean has 2 numbers, student_mean has 1"),
        (lambda a, b: InputAdapter(a, [], [], [], []), "student_mean has 0 numbers"),
        (lambda a, b: InputAdapter(a, [0], [1], [0], [0]), r"std must be positive, got \[0\]"),
        (lambda a, b: InputAdapter(a, [0], [1], [0], [1], size=0), "size must be at least 1, got 0"),
    ],
)
def test_what_is_wrong_is_said(build, message):
    with pytest.raises(UserError, match=message):
        build(nn.Linear(3, 4), nn.Linear(3, 5))


def test_different_numbers_of_classes_are_noticed_in_traced_code_too():
    ensemble = Ensemble({"a": nn.Linear(3, 4), "b": nn.Linear(3, 5)})
    tapped = Tapped(ensemble, ["a"])
    assert tapped.traced
    with pytest.raises(UserError, match="one shape"):
        tapped(torch.zeros(2, 3))
