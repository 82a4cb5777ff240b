"""The schedule: its time axis, its terms, and a file that can be trusted."""

import os
import pickle
from dataclasses import FrozenInstanceError, replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distpro.schedule import FORMAT, VERSION, Schedule
from pathways import UserError

TRANSFORMS = ("conv1x1", "conv3x3")
PLACES = list(product((1, 2), (1, 2, 3), (1, 2)))  # 2 teacher levels, 3 student levels, 2 transforms


def schedule(steps=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Schedule(
        keys=tuple(f"t{i}<-s{j}@{TRANSFORMS[k - 1]}" for i, j, k in PLACES),
        levels=torch.tensor(PLACES),
        transforms=tuple(TRANSFORMS[k - 1] for *_, k in PLACES),
        alpha_tilde=torch.randn(steps, len(PLACES), generator=generator),
        weights=torch.rand(steps, len(PLACES), generator=generator),
        steps_per_epoch=3.5,
        meta={"weighting": "biased_softmax", "config": {"lr": [0.1, None, True], "taps": ["a", "b"]}},
    )


def two_terms(weights):
    weights = torch.as_tensor(weights, dtype=torch.float32)
    return Schedule(("a", "b"), torch.zeros(2, 3, dtype=torch.int64), weights.clone(), weights)


def same(a, b):
    tensors = ("levels", "alpha_tilde", "weights")
    return all(
        torch.equal(getattr(a, n), getattr(b, n)) and getattr(a, n).dtype == getattr(b, n).dtype for n in tensors
    ) and ((a.keys, a.transforms, a.steps_per_epoch, a.meta) == (b.keys, b.transforms, b.steps_per_epoch, b.meta))


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
    with pytest.raises(UserError, match="cannot be interpolated to 0 steps"):
        schedule().interpolate(0)


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
    ],
)
def test_content_that_does_not_fit(changes, message):
    with pytest.raises(UserError, match=message):
        replace(two_terms(torch.zeros(4, 2)), **changes)


def test_a_schedule_is_not_changed_in_place():
    with pytest.raises(FrozenInstanceError):
        schedule().keys = ("a",)


# Files


def test_round_trip(tmp_path):
    path = tmp_path / "runs" / "alpha.pt"
    schedule().save(path)
    assert same(Schedule.load(path), schedule())
    assert same(Schedule.load(str(path)), schedule())
    replace(schedule(), weights=schedule().weights.double(), alpha_tilde=schedule().alpha_tilde.double()).save(path)
    assert same(Schedule.load(path), schedule())
    schedule().interpolate(20).drop(0.5).reduce("connection").save(path)
    assert same(Schedule.load(path), schedule().interpolate(20).drop(0.5).reduce("connection"))


def test_the_file_holds_tensors_and_plain_values_only(tmp_path):
    schedule().save(tmp_path / "alpha.pt")
    content = torch.load(tmp_path / "alpha.pt", weights_only=True)
    assert (content["format"], content["version"]) == (FORMAT, VERSION)
    assert content["weights"].dtype == content["alpha_tilde"].dtype == torch.float32
    assert content["keys"] == list(schedule().keys) and content["meta"] == schedule().meta


class Exploit:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def saved(content, path, legacy=False):
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("wrap", [lambda e: e, lambda e: {"format": FORMAT, "version": VERSION, "meta": {"x": e}}])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_file_is_refused_and_not_run(tmp_path, wrap, legacy):
    path, marker = tmp_path / "alpha.pt", tmp_path / "was-here"
    saved(wrap(Exploit(marker)), path, legacy)
    with pytest.raises(UserError, match="alpha.pt: holds more than tensors and plain values"):
        Schedule.load(path)
    path.write_bytes(pickle.dumps(wrap(Exploit(marker))))
    with pytest.raises(UserError, match="alpha.pt: "):
        Schedule.load(path)
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()  # so the file would have done it


def content(**changes):
    return {
        "format": FORMAT,
        "version": VERSION,
        "keys": ["a"],
        "levels": torch.zeros(1, 3, dtype=torch.int64),
        "transforms": [""],
        "alpha_tilde": torch.ones(2, 1),
        "weights": torch.ones(2, 1),
        "scales": torch.ones(1),
        "steps_per_epoch": 1.0,
        "meta": {},
        **changes,
    }


@pytest.mark.parametrize(
    "stored, message",
    [
        (content(version=VERSION + 1), f"schedule version {VERSION + 1}; this distpro reads up to {VERSION}"),
        (content(version=None), "schedule version None"),
        (content(format="other"), "not a distpro schedule"),
        ({"state_dict": {}}, "not a distpro schedule"),
        ([1, 2], "not a distpro schedule"),
        (torch.zeros(3), "not a distpro schedule"),
        ({k: v for k, v in content().items() if k != "weights"}, "damaged schedule .KeyError: 'weights'"),
        (content(keys=["a", "b"]), "do not fit 2 keys"),
        (content(weights=[[1.0]]), "damaged schedule"),
        (content(keys=None), "damaged schedule"),
    ],
)
def test_other_content_is_an_error_that_names_the_file(tmp_path, stored, message):
    torch.save(stored, tmp_path / "alpha.pt")
    with pytest.raises(UserError, match=f"alpha.pt: .*{message}"):
        Schedule.load(tmp_path / "alpha.pt")


def test_a_file_cut_short_anywhere_is_an_error(tmp_path):
    path = tmp_path / "alpha.pt"
    schedule().save(path)
    whole = path.read_bytes()
    for length in {*range(0, 64), *range(64, len(whole), 97), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="alpha.pt: "):
            Schedule.load(path)


@pytest.mark.parametrize("data", [b"", b"epochs: 10\n", b"\x80\x02.", b"PK\x03\x04", bytes(range(256))])
def test_other_files_are_errors(tmp_path, data):
    (tmp_path / "alpha.pt").write_bytes(data)
    with pytest.raises(UserError, match="alpha.pt: "):
        Schedule.load(tmp_path / "alpha.pt")


def test_missing_files_are_errors(tmp_path):
    for path in (tmp_path / "alpha.pt", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            Schedule.load(path)
