"""The schedule: its time axis, its controls, and its terms."""

from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distpro.schedule import Schedule, warmed_up
from pathways import UserError
from tests.schedules import PLACES, TRANSFORMS, same, schedule, two_terms

# Time


@pytest.mark.parametrize(
    "steps, total", [(7, 7), (7, 50), (50, 7), (2, 1000), (1000, 2), (7, 1), (1, 1), (1, 9), (3, 4)]
)
def test_interpolation_is_linear_from_end_point_to_end_point(steps, total):
    original = schedule(steps)
    stretched = original.interpolate(total)
    assert len(stretched) == total and stretched.weights.dtype == torch.float32
    position = np.linspace(0, steps - 1, total)
    for name in ("weights", "alpha_tilde"):
        values, result = getattr(original, name).double().numpy(), getattr(stretched, name)
        expected = np.stack([np.interp(position, np.arange(steps), column) for column in values.T], 1)
        np.testing.assert_allclose(result.numpy(), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(result[0], getattr(original, name)[0])
        assert total == 1 or torch.equal(result[-1], getattr(original, name)[-1])


def test_interpolation_of_a_straight_line_is_that_line():
    """w(t) = 1 + 2t and 3 − t of t in [0, 1], sampled at 5 steps, read at 13."""
    t, time = torch.linspace(0, 1, 5), torch.linspace(0, 1, 13)
    line = two_terms(torch.stack([1 + 2 * t, 3 - t], 1)).interpolate(13)
    torch.testing.assert_close(line.weights, torch.stack([1 + 2 * time, 3 - time], 1))


def test_interpolation_reads_between_two_steps():
    assert two_terms([[0, 4], [1, 0]]).interpolate(5).weights.tolist() == [
        [0, 4],
        [0.25, 3],
        [0.5, 2],
        [0.75, 1],
        [1, 0],
    ]


def test_interpolation_keeps_the_number_of_epochs():
    original = schedule(steps=70)
    epochs = len(original) / original.steps_per_epoch
    stretched = original.interpolate(210)
    assert len(stretched) / stretched.steps_per_epoch == pytest.approx(epochs)
    assert same(original, schedule(steps=70))


def test_interpolation_to_nothing_is_an_error():
    for steps in (0, -3, 10.0):
        with pytest.raises(
            UserError, match=f"cannot be interpolated to {steps} steps .allowed: whole numbers from 1 on"
        ):
            schedule().interpolate(steps)


def test_final_and_equal_and_drop():
    original = schedule()
    assert torch.equal(original.final().weights, original.weights[-1].repeat(7, 1))
    assert torch.equal(original.final().alpha_tilde, original.alpha_tilde[-1].repeat(7, 1))
    assert torch.equal(original.equal().weights, torch.full((7, 12), 1 / 12))
    dropped = original.drop(0.5)
    gone = original.alpha_tilde <= 0.5
    assert gone.any() and (~gone).any()
    assert torch.equal(dropped.weights, original.weights.masked_fill(gone, 0))
    assert torch.equal(dropped.alpha_tilde, original.alpha_tilde)
    assert same(original.drop(None), original) and same(original, schedule())


# Controls


def test_after_leaves_out_the_beginning():
    original = schedule(10)
    for fraction, first in ((0, 0), (0.1, 1), (0.55, 5), (0.99, 9)):
        later = original.after(fraction)
        assert torch.equal(later.weights, original.weights[first:])
        assert torch.equal(later.alpha_tilde, original.alpha_tilde[first:])
    assert len(two_terms([[0.5, 0.5]]).after(0.9)) == 1


def test_the_mean_is_constant_and_keeps_each_terms_total():
    original = schedule(7)
    mean = original.mean()
    assert (mean.weights == mean.weights[0]).all()
    torch.testing.assert_close(mean.weights.sum(0), original.weights.sum(0))


@pytest.mark.parametrize("axis, control", [(0, "shuffled"), (1, "permuted")])
def test_shuffled_moves_steps_and_permuted_moves_terms(axis, control):
    original = schedule(7)
    one, again, other = (getattr(original, control)(seed) for seed in (1, 1, 2))
    assert same(one, again) and not torch.equal(one.weights, other.weights)
    slices = original.weights.unbind(axis)
    order = [next(n for n, s in enumerate(slices) if torch.equal(s, moved)) for moved in one.weights.unbind(axis)]
    assert sorted(order) == list(range(len(slices))) != order
    assert torch.equal(one.alpha_tilde, original.alpha_tilde.index_select(axis, torch.tensor(order)))
    assert one.keys == original.keys and torch.equal(one.scales, original.scales)


def test_random_processes_have_the_schedules_totals_and_spread():
    weights = torch.softmax(torch.linspace(0, 1, 50)[:, None] * torch.randn(12, generator=torch.manual_seed(0)), 1)
    original = replace(schedule(50), weights=0.9 * weights)
    drawn = [original.random(seed) for seed in range(40)]
    assert torch.equal(drawn[3].weights, original.random(3).weights)
    for control in drawn:
        torch.testing.assert_close(control.weights.sum(1), original.weights.sum(1))
        assert (control.weights > 0).all() and not control.weights.isnan().any()
        assert control.weights.diff(dim=0).abs().max() < 0.1  # smooth
    spread = torch.stack([c.weights[[0, -1]].log().std(1) for c in drawn]).mean()
    assert spread == pytest.approx(original.weights[-1].log().std().item(), rel=0.1)


# Terms


@pytest.mark.parametrize(
    "how, sides, keys",
    [
        ("total", (), ["total"]),
        ("teacher_level", (0,), ["teacher_level.1", "teacher_level.2"]),
        ("student_level", (1,), ["student_level.1", "student_level.2", "student_level.3"]),
        ("connection", (0, 1), [f"connection.{i}.{j}" for i in (1, 2) for j in (1, 2, 3)]),
    ],
)
def test_reduce(how, sides, keys):
    original = schedule()
    reduced = original.reduce(how)
    assert list(reduced.keys) == keys and reduced.transforms == ("",) * len(keys)
    for n, key in enumerate(keys):
        wanted = dict(zip(sides, map(int, key.split(".")[1:]), strict=True))
        members = [p for p, place in enumerate(PLACES) if all(place[s] == v for s, v in wanted.items())]
        torch.testing.assert_close(reduced.weights[:, n], original.weights[:, members].sum(1))
        torch.testing.assert_close(reduced.alpha_tilde[:, n].exp(), original.alpha_tilde[:, members].exp().sum(1))
        assert reduced.levels[n].tolist() == [wanted.get(side, 0) for side in range(3)]
    assert (reduced.steps_per_epoch, reduced.meta) == (original.steps_per_epoch, original.meta)


def test_reduce_by_another_word():
    with pytest.raises(UserError, match="unknown reduction 'teacher'; did you mean.*allowed: total, teacher_level"):
        schedule().reduce("teacher")


def term(key, level=None, transform_name=""):
    return SimpleNamespace(key=key, level=level, transform_name=transform_name)


def numbered(i, j, k, name="other"):
    """A term of another pair, at the same place."""
    return term(f"{name}.t{i}<-{name}.s{j}@{TRANSFORMS[k - 1]}", (i, j, k), TRANSFORMS[k - 1])


def test_columns_by_key_in_the_order_of_the_terms():
    original = schedule()
    order = [5, 0, 11, 3, 1, 2, 4, 6, 7, 8, 9, 10]
    found = original.columns([term(original.keys[n]) for n in order])
    assert torch.equal(found.weights, original.weights[:, order])
    assert torch.equal(found.alpha_tilde, original.alpha_tilde[:, order])
    assert torch.equal(found.levels, original.levels[order])
    assert found.keys == tuple(original.keys[n] for n in order)


def test_columns_by_level_on_another_pair():
    original = schedule()
    places = PLACES[::-1]
    terms = [numbered(*place) for place in places]
    found = original.columns(terms)
    assert torch.equal(found.weights, original.weights[:, list(range(12))[::-1]])
    assert found.keys == tuple(t.key for t in terms) and found.levels.tolist() == [list(p) for p in places]


def test_transforms_are_matched_by_name_not_by_number():
    original = schedule()
    swapped = [term(f"x{n}", (i, j, 3 - k), TRANSFORMS[k - 1]) for n, (i, j, k) in enumerate(PLACES)]
    assert torch.equal(original.columns(swapped).weights, original.weights)


def test_columns_by_mapping():
    original = two_terms([[1, 2], [3, 4]])
    found = original.columns([term("kd"), term("at")], {"kd": "b", "at": "a"})
    assert found.weights.tolist() == [[2, 1], [4, 3]]
    assert original.columns([term("kd")], {"kd": "b"}).weights.tolist() == [[2], [4]]  # the mapping leaves one over


def test_terms_may_share_a_column():
    original = schedule()
    total = original.reduce("total").columns([term("kd"), term("at")], {"kd": "total", "at": "total"})
    assert total.keys == ("kd", "at")
    torch.testing.assert_close(total.weights, original.weights.sum(1, keepdim=True).repeat(1, 2))
    levels = [term(f"{loss}.{i}", (i, 0, 0)) for loss in ("at", "sp") for i in (1, 2)]
    by_level = original.reduce("teacher_level").columns(levels)
    assert torch.equal(by_level.weights, original.reduce("teacher_level").weights.repeat(1, 2))


@pytest.mark.parametrize(
    "terms, mapping, message",
    [
        ([term("t1<-s1@conv1x2")], None, "no column for term 't1<-s1@conv1x2'.*did you mean 't1<-s1@conv.*mapping"),
        (
            [term("x", (3, 1, 1), "conv1x1")],
            None,
            r"no column for term 'x' \(level \(3, 1, 'conv1x1'\)\).*12 terms over 2 teacher",
        ),
        ([term("x", (1, 1, 1), "attention")], None, "no column for term 'x'"),
        ([numbered(1, 1, 1)], None, "11 of 12 columns fit no term, for instance 't1<-s1@conv3x3'"),
        (
            [numbered(1, 1, 1, "x")],
            {"x.t1<-x.s1@conv1x1": "t1<-s1@conv9x9"},
            "no column 't1<-s1@conv9x9'; did you mean",
        ),
    ],
)
def test_columns_that_do_not_fit(terms, mapping, message):
    with pytest.raises(UserError, match=message):
        schedule().columns(terms, mapping)


def test_take():
    original = schedule()
    taken = original.take([3, 1])
    assert taken.keys == (original.keys[3], original.keys[1]) and taken.transforms == ("conv3x3", "conv3x3")
    assert torch.equal(taken.weights, original.weights[:, [3, 1]])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"keys": ("a", "a")}, "two terms have one key"),
        ({"keys": ("a", "b", "c")}, "levels of shape .* do not fit 3 keys"),
        ({"levels": torch.zeros(2, 2)}, r"levels of shape \(2, 2\) do not fit 2 keys"),
        ({"weights": torch.zeros(4, 3)}, r"weights of shape \(3, 4\) do not fit"),
        ({"alpha_tilde": torch.zeros(3, 2)}, r"alpha_tilde \(3, 2\) and weights \(4, 2\) must be equal"),
        ({"weights": torch.zeros(0, 2), "alpha_tilde": torch.zeros(0, 2)}, "T > 0"),
        ({"weights": torch.tensor([[0.0, float("nan")]] * 4)}, "not all finite"),
        ({"alpha_tilde": torch.full((4, 2), float("nan"))}, "alpha_tilde are not all finite"),
        ({"scales": torch.tensor([1.0, float("inf")])}, "scales are not all finite"),
        ({"scales": torch.ones(3)}, "scales of shape .3,. do not fit 2 keys"),
        ({"transforms": ("x",)}, "1 transforms do not fit 2 keys"),
        ({"keys": ("a", 3)}, "keys must be names, found 3"),
        ({"keys": ("a", "")}, "keys must be names, found ''"),
        ({"levels": torch.zeros(2, 3)}, "levels are float32 .allowed: whole numbers"),
        ({"levels": torch.full((2, 3), -1)}, "levels are below 0"),
        ({"weights": torch.ones(4, 2).long()}, "weights are int64 .allowed: floating point"),
        ({"weights": torch.ones(4, 2, dtype=torch.complex64)}, "weights are complex64"),
        ({"weights": torch.ones(4, 2).double() * 1e300}, "weights are not all finite"),  # as float32
        ({"steps_per_epoch": 0.0}, "steps_per_epoch is 0.0 .allowed: a number above 0"),
        ({"steps_per_epoch": float("nan")}, "steps_per_epoch is nan"),
        ({"steps_per_epoch": True}, "steps_per_epoch is True"),
        ({"strength": -1.0}, "strength is -1.0 .allowed: a number 0 and more"),
        ({"strength": "3"}, "strength is '3'"),
        ({"warmup": float("inf")}, "warmup is inf"),
        ({"start": 1.1}, "start is 1.1 .allowed: a number from 0 to 1"),
        ({"threshold": float("nan")}, "threshold is nan .allowed: a number, or None"),
        ({"reading": ""}, "reading is ''"),
        ({"reading": "log", "weights": torch.full((4, 2), -1.0)}, "weights are below 0"),
        ({"meta": [1]}, "meta is list"),
        ({"scalars": {"task": torch.ones(3)}}, "scalar 'task' of shape .3,. does not fit 4 steps"),
        ({"scalars": {"task": torch.full((4,), float("nan"))}}, "task are not all finite"),
        ({"scalars": {"task": torch.ones(4).int()}}, "task are int32"),
    ],
)
def test_content_that_does_not_fit(changes, message):
    with pytest.raises(UserError, match=message):
        replace(two_terms(torch.zeros(4, 2)), **changes)


def test_a_schedule_is_not_changed_in_place():
    with pytest.raises(FrozenInstanceError):
        schedule().keys = ("a",)


# What a replay makes of it


def meant(steps=10):
    """With all that a file says beside the weights: α̃ of the last term is below τ in the second half."""
    alpha_tilde = torch.ones(steps, 12)
    alpha_tilde[steps // 2 :, 11] = 0.4
    return replace(
        schedule(steps),
        alpha_tilde=alpha_tilde,
        scales=torch.arange(1.0, 13.0),
        strength=3.0,
        warmup=2.0,
        threshold=0.5,
        start=0.3,
        scalars={
            "task": torch.linspace(1, 0, steps),
            f"{schedule().keys[1]}.temperature": torch.linspace(2, 8, steps),
            "elsewhere.temperature": torch.full((steps,), 4.0),
        },
    )


def test_what_a_training_plays():
    """The last 7 of 10 steps, 13 steps long: values between two steps are on the line between them."""
    given, position = meant(), np.linspace(3, 9, 13)
    played = given.played(13)
    expected = np.stack([np.interp(position, np.arange(10), column) for column in given.weights.double().T.numpy()], 1)
    alpha = np.interp(position, np.arange(10), given.alpha_tilde[:, 11].double().numpy())
    assert (alpha <= 0.5).any() and (alpha > 0.5).any() and 0.4 < alpha[3] < 1.0  # also between the two
    expected[:, 11] *= alpha > 0.5
    np.testing.assert_allclose(played.weights.numpy(), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(played.scalars["task"].numpy(), 1 - position / 9, rtol=1e-5, atol=1e-7)
    assert (played.start, played.threshold, played.strength) == (0, None, 3.0)
    assert same(played, played.played(13))  # nothing is left out twice


def test_a_threshold_or_start_may_be_given_in_the_place_of_the_schedules():
    given = meant()
    assert (given.saying(None).threshold, given.saying(None).start) == (None, 0.3)
    assert (given.saying(start=0).threshold, given.saying(start=0).start) == (0.5, 0)
    assert same(given.saying(), given)
    with pytest.raises(UserError, match="threshold is '0.5'"):
        given.saying("0.5")


@pytest.mark.parametrize("total", [10, 14, 77, 313])
def test_the_warm_up_is_stretched_with_the_schedule_whatever_is_left_out(total):
    """10 steps of which 5 make an epoch: λ is half of 3 in the first of two epochs."""
    given = replace(meant(), steps_per_epoch=5.0)
    for schedule_ in (given, given.after(), given.interpolate(31), given.mean()):
        strength = schedule_.strengths(total)
        assert [strength(step) for step in range(total)] == [1.5 if step < total / 2 else 3.0 for step in range(total)]


def test_epochs_begin_where_they_begin():
    """After divisions that floating point rounds, an epoch of 391 steps still begins with its first step."""
    epochs = 240
    longer = replace(two_terms([[1, 1]] * 17), steps_per_epoch=17 / epochs, strength=1.0, warmup=float(epochs))
    for first in (0.0, 0.31, 0.5):
        strength = longer.after(first).strengths(epochs * 391)
        assert all(strength(391 * e) * epochs == pytest.approx(e + 1) for e in range(0, epochs, 7))
        assert all(strength(391 * e - 1) * epochs == pytest.approx(e) for e in range(1, epochs, 7))
    assert warmed_up(2.0, 0.0, 5)(0) == 2.0


def test_of_log_weights_small_shares_are_dropped():
    """1/(10 N) of the sum, N = 4: at the first step 1 of 41 is below 1/40, 1.1 of 41.1 is not. α̃ says nothing here, and
    neither do λ nor the terms' scales."""
    weights = torch.tensor([[1.0, 20.0, 20.0, 0.0], [1.1, 20.0, 20.0, 1.1]])
    given = Schedule(
        ("a", "b", "c", "d"),
        torch.zeros(4, 3).long(),
        torch.full((2, 4), -5.0),
        weights,
        scales=torch.tensor([1e6, 1e-6, 1.0, 1.0]),
        strength=7.0,
        reading="log",
        threshold=0.5,
    )
    assert given.dropped().tolist() == [[True, False, False, True], [False] * 4]
    assert torch.equal(given.drop(0.5).weights, torch.tensor([[0, 20.0, 20.0, 0], [1.1, 20.0, 20.0, 1.1]]))
    assert torch.equal(given.drop(None).weights, weights)
    assert torch.equal(given.take([0, 1]).weights[0], torch.tensor([0.0, 20.0]))  # the share was of all four
    torch.testing.assert_close(given.reduce("total").weights[:, 0], torch.tensor([40.0, 42.2]))


@pytest.mark.parametrize("control", ["final", "mean", "shuffled", "permuted", "random", "equal"])
def test_what_the_controls_keep(control):
    given = meant()
    result = getattr(given, control)()
    assert (result.strength, result.warmup, result.reading) == (3.0, 2.0, "biased_softmax")
    assert torch.equal(result.scales, given.scales)
    assert result.threshold == (None if control in ("random", "equal") else 0.5)
    played = given.after() if control in ("mean", "shuffled", "random") else given
    task = played.scalars["task"]
    expected = {
        "final": task[-1].repeat(10),
        "mean": task.mean().repeat(7),
        "shuffled": task[torch.randperm(7, generator=torch.Generator().manual_seed(0))],
        "equal": None,
    }.get(control, task)
    if expected is None:
        assert result.scalars == {}
    else:
        assert result.scalars.keys() == given.scalars.keys()
        torch.testing.assert_close(result.scalars["task"], expected)
    assert len(result) == len(played)


def test_controls_are_of_what_a_replay_plays():
    """A mean over the steps that are left out would be another one."""
    given = meant()
    torch.testing.assert_close(given.mean().played(4).weights[0], given.after().drop(None).weights.mean(0))
    shuffled = given.shuffled().weights
    assert sorted(shuffled[:, 0].tolist()) == sorted(given.weights[3:, 0].tolist())
    totals = given.random().weights.sum(1)
    torch.testing.assert_close(totals, given.weights[3:].sum(1))


def test_a_sum_drops_first_and_keeps_the_task_weight():
    given = meant()
    total = given.reduce("total")
    expected = given.weights.sum(1)
    expected[5:] -= given.weights[5:, 11]
    torch.testing.assert_close(total.weights[:, 0], expected)
    assert (total.threshold, total.strength, total.warmup, total.start) == (None, 3.0, 2.0, 0.3)
    assert list(total.scalars) == ["task"] and total.scales.tolist() == [1.0]
    played = given.played(13)
    torch.testing.assert_close(played.reduce("total").weights[:, 0], played.weights.sum(1))


def test_scalars_go_with_their_terms():
    given, keys = meant(), schedule().keys
    others = [numbered(*place) for place in PLACES]
    found = given.columns(others)
    assert set(found.scalars) == {"task", f"{others[1].key}.temperature", "elsewhere.temperature"}
    assert torch.equal(found.scalars[f"{others[1].key}.temperature"], given.scalars[f"{keys[1]}.temperature"])
    assert (found.threshold, found.strength, found.start) == (0.5, 3.0, 0.3)
    assert set(given.take([0]).scalars) == {"task", "elsewhere.temperature"}
    twice = given.take([1, 1], ["x", "y"])
    assert set(twice.scalars) == {"task", "x.temperature", "y.temperature", "elsewhere.temperature"}


def test_of_two_keys_that_a_scalar_begins_with_the_longer_owns_it():
    given = replace(two_terms([[1, 2]]), keys=("kd", "kd.2"), scalars={"kd.2.temperature": torch.ones(1)})
    assert set(given.take([1], ["x"]).scalars) == {"x.temperature"} and given.take([0]).scalars == {}
