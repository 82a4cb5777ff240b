"""Options that no loss can mean are refused when it is built, by its name and the option's, and so when they move there."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from distpro.losses import LOSSES, available_losses, build_loss
from distpro.losses._options import FINITE
from pathways.registry import UserError
from tests.losses.test_conformance import EXAMPLES, TOGETHER, Sample

NUMBERS = ("float", "int", "float | None", "int | None", "Sequence[float]", "Sequence[int]", "Sequence[float] | None")
OPTIONS = [
    (name, option, parameter)
    for name in available_losses()
    for option, parameter in inspect.signature(LOSSES[name]).parameters.items()
    if option not in ("student_shapes", "teacher_shapes", "params")
]
NUMERIC = [(name, option, parameter) for name, option, parameter in OPTIONS if parameter.annotation in NUMBERS]
OTHERS = [(name, option) for name, option, parameter in OPTIONS if parameter.annotation not in (*NUMBERS, "str")]
TEMPERATURES = [
    (name, option)
    for name, option, _ in NUMERIC
    if option in ("temperature", "tau", "kd_t", "tf_t", "ss_t", "nce_t", "soft", "temperatures")
]
WEIGHTS = {
    "cc": ["gamma"], "dist": ["beta", "gamma"], "dist_plus": ["beta", "gamma", "iota", "kappa"], "dkd": ["alpha", "beta"],
    "kd": ["ce_weight"], "kd_logits": ["coeff"], "ktaad": ["adaptation_weight", "affinity_weight", "code_weight"],
    "mgd": ["alpha", "ratio"], "rkd": ["w_d", "w_a"], "skd": ["instance_weight", "direction_weight"],
    "sskd": ["ce_weight", "kd_weight", "tf_weight", "ss_weight", "tf_ratio", "ss_ratio"],
    "tf_kd": ["alpha", "multiplier"], "ls": ["smoothing"], "crd": ["nce_m"], "ctkd": ["span"], "ab": ["margin"],
}  # fmt: skip  # may be 0


def build(name, **params):
    example = EXAMPLES[name]
    return build_loss(name, example["student_shapes"], example["teacher_shapes"], **example["params"] | params)


def listed(parameter, value):
    return [value] if "Sequence" in parameter.annotation else value


def refuses(name, option, value):
    with pytest.raises(UserError) as error:
        build(name, **{option: value})
    assert f"loss '{name}'" in str(error.value) and option in str(error.value), str(error.value)


@pytest.mark.parametrize(("name", "option", "parameter"), NUMERIC)
def test_numbers_are_finite_numbers(name, option, parameter):
    for value in (math.nan, math.inf, -math.inf, "yes", True, [], {}):
        refuses(name, option, listed(parameter, value))
    refuses(name, option, "yes")


@pytest.mark.parametrize(("name", "option"), OTHERS)
def test_a_word_is_no_truth_value_tensor_or_module(name, option):
    refuses(name, option, "yes")


@pytest.mark.parametrize(("name", "option", "parameter"), [o for o in OPTIONS if o[2].annotation == "str"])
def test_a_word_is_one_of_those_that_mean_something(name, option, parameter):
    for value in ("yes", 1, True):
        refuses(name, option, value)


@pytest.mark.parametrize(("name", "option"), TEMPERATURES)
def test_temperatures_are_above_0(name, option):
    several = option == "temperatures"
    for value in (0, 0.0, -1.0):
        refuses(name, option, [2.0, value] if several else value)
    for value in (1, 1e-3, 100.0):
        assert build(name, **{option: [value] if several else value})


def test_no_temperature_is_forgotten():
    assert len(TEMPERATURES) == 18
    assert {name for name, _ in TEMPERATURES} >= {
        "kd",
        "dkd",
        "dkd_target",
        "dkd_nontarget",
        "logit_std",
        "mlkd",
        "tf_kd",
    }


@pytest.mark.parametrize(("name", "option", "parameter"), [o for o in NUMERIC if "int" in o[2].annotation])
def test_counts_are_whole_and_not_negative(name, option, parameter):
    refuses(name, option, listed(parameter, 1.5))
    refuses(name, option, listed(parameter, -1))


@pytest.mark.parametrize(
    ("name", "option"), [(name, option) for name, options in WEIGHTS.items() for option in options]
)
def test_a_weight_of_0_stays_a_weight(name, option):
    sample = Sample(name, **TOGETHER.get((name, option), {}), **{option: 0})
    assert sample().isfinite()


@pytest.mark.parametrize("name", available_losses())
def test_ranges_are_of_options_and_hold_their_defaults(name):
    parameters = inspect.signature(LOSSES[name]).parameters
    for option, allowed in LOSSES[name].ranges.items():
        default = parameters[option].default
        if default is not None:
            assert all(x in allowed for x in (default if isinstance(default, tuple) else [default]))
        assert str(allowed) and allowed != FINITE


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("kd", {"temperature": 0}, "loss 'kd': temperature must be finite, above 0, got 0"),
        ("ls", {"smoothing": 2}, "loss 'ls': smoothing must be from 0 to 1, got 2"),
        ("structured", {"scale": 0}, "loss 'structured': scale must be above 0 and at most 1, got 0"),
        ("rkd", {"w_d": math.nan}, "loss 'rkd': w_d must be finite, got nan"),
        ("logit_std", {"of": "dkd", "beta": math.inf}, "loss 'dkd': beta must be finite, got inf"),
        ("mlkd", {"temperatures": 4}, "loss 'mlkd': temperatures must be a list, each a number, got 4"),
        ("review", {"hcl": {"decay": -1}}, "option 'hcl' of loss 'review': decay must be finite, at least 0, got -1"),
        ("hcl", {"level_weights": [0, 0, 0, 0]}, "level_weights must not all be 0"),
        ("vid", {"variance": 1e-6}, "variance must be above eps, got 1e-06 and 1e-05"),
        ("afd", {"dim": 0}, "loss 'afd': dim must be finite, at least 1, got 0"),
    ],
)
def test_messages(name, params, message):
    with pytest.raises(UserError) as error:
        build(name, **params)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["kd", "dist_plus", "logit_std", "mlkd", "skd"])
def test_a_scalar_that_moves_out_of_its_range_says_so(name):
    loss = build(name)
    option = {"dist_plus": "tau", "mlkd": "temperatures"}.get(name, "temperature")
    before = getattr(loss, option)
    with pytest.raises(UserError, match=f"{option} must be finite, above 0, got 0"):
        setattr(loss, option, [0.0] if name == "mlkd" else 0.0)
    assert getattr(loss, option) == before
    setattr(loss, option, [3.0] if name == "mlkd" else 3.0)


def test_losses_of_ones_own_are_built_as_they_say(monkeypatch):
    """A function's values are its own matter; a class's options are checked by their annotations."""
    import sys
    import types

    from distpro.losses import DistillationLoss

    class Own(DistillationLoss):
        def __init__(self, student_shapes=(), teacher_shapes=(), scale: float = 1.0, anything=None):
            super().__init__(student_shapes, teacher_shapes)

    module = types.ModuleType("own_losses")
    module.Own, module.function = Own, lambda student_shapes, teacher_shapes, limit: torch.nn.Identity()
    monkeypatch.setitem(sys.modules, "own_losses", module)
    assert isinstance(build_loss("own_losses:Own", scale=2, anything="word"), Own)
    with pytest.raises(UserError, match="loss 'own_losses:Own'.*scale"):
        build_loss("own_losses:Own", scale=math.nan)
    assert build_loss("own_losses:function", limit=math.inf) is not None
