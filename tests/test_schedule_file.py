"""A schedule's file: what it holds, what it refuses, and what older versions mean."""

import os
import pickle
from dataclasses import replace

import pytest
import torch

from distpro.schedule import FORMAT, VERSION, Schedule
from pathways import UserError
from tests.schedules import same, schedule


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
        "strength": 1.0,
        "warmup": 0.0,
        "reading": "biased_softmax",
        "threshold": None,
        "start": 0.0,
        "scalars": {},
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
        (content(version=0), "schedule version 0"),
        ({k: v for k, v in content().items() if k != "threshold"}, "damaged schedule .KeyError: 'threshold'"),
        (content(keys="a"), "damaged schedule .TypeError: keys is str, expected list"),
        (content(keys=[3]), "keys must be names, found 3"),
        (content(transforms=[None]), "transforms must be names, found None"),
        (content(levels=torch.ones(1, 3)), "levels are float32"),
        (content(weights=torch.ones(2, 1).int()), "weights are int32"),
        (content(weights=torch.ones(2, 1, dtype=torch.complex64)), "weights are complex64"),
        (content(weights=torch.ones(2, 1).to_sparse()), "weights is sparse_coo .allowed: a plain tensor"),
        (content(scales=torch.tensor([float("nan")])), "scales are not all finite"),
        (content(scales=None), "damaged schedule .TypeError: scales is NoneType"),
        (content(steps_per_epoch=0), "steps_per_epoch is 0"),
        (content(steps_per_epoch="5"), "steps_per_epoch is '5'"),
        (content(meta=[]), "damaged schedule .TypeError: meta is list, expected dict"),
        (content(scalars=[]), "damaged schedule .TypeError: scalars is list"),
        (content(scalars={"task": [1.0, 1.0]}), "damaged schedule .TypeError: task is list"),
        (content(scalars={3: torch.ones(2)}), "scalars must be names, found 3"),
        (content(start=1.1), "start is 1.1"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor:UserWarning")
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


@pytest.mark.filterwarnings(
    "ignore:TypedStorage is deprecated:UserWarning", "ignore:torch.quantize_per_tensor:UserWarning"
)
def test_quantised_weights_are_refused(tmp_path):
    torch.save(content(weights=torch.quantize_per_tensor(torch.ones(2, 1), 0.1, 0, torch.qint8)), tmp_path / "alpha.pt")
    with pytest.raises(UserError, match="alpha.pt: schedule: weights is quantised"):
        Schedule.load(tmp_path / "alpha.pt")


@pytest.mark.parametrize("name", ["weights", "alpha_tilde", "levels", "scales", "scalars"])
def test_a_tensor_that_is_larger_than_its_file_is_refused_before_anything_computes_with_it(name, tmp_path, monkeypatch):
    """10⁹ numbers of one that is stored. Nothing may even look at them."""
    one = torch.ones(1, dtype=torch.int64 if name == "levels" else torch.float32)
    vast = one.expand(10**9) if name in ("scales", "scalars") else one.expand(10**9, 1)
    torch.save(content(**{name: {"task": vast} if name == "scalars" else vast}), tmp_path / "alpha.pt")
    assert (tmp_path / "alpha.pt").stat().st_size < 10_000
    monkeypatch.setattr(torch, "isfinite", lambda x: pytest.fail("computed with"))
    with pytest.raises(UserError, match="has 1000000000 numbers, of which the file holds 1"):
        Schedule.load(tmp_path / "alpha.pt")


def test_round_trip_of_what_a_replay_makes_of_it(tmp_path):
    scalars = {"task": torch.linspace(1, 0, 7), "kd.temperature": torch.linspace(8, 1, 7)}
    meaning = {"strength": 3.0, "warmup": 1.5, "reading": "softmax", "threshold": 0.25, "start": 0.3}
    given = replace(schedule(), scales=torch.rand(12), scalars=scalars, **meaning)
    given.save(tmp_path / "alpha.pt")
    assert same(Schedule.load(tmp_path / "alpha.pt"), given)
    assert not same(given, schedule())
    replace(given, scalars={name: values.double() for name, values in scalars.items()}).save(tmp_path / "alpha.pt")
    assert same(Schedule.load(tmp_path / "alpha.pt"), given)


# Versions 1 and 2: what their own config says


def old(version, config=None):
    """As version 1 or 2 wrote it, by hand."""
    new = ("strength", "warmup", "reading", "threshold", "start", "scalars", *(["scales"] if version == 1 else []))
    stored = content(version=version, scales=torch.tensor([5.0]), meta={} if config is None else {"config": config})
    return {name: value for name, value in stored.items() if name not in new}


SAID = {
    "training": {"epochs": 40, "distill_weight": 3.0, "distill_warmup": 4.0},
    "search": {"weighting": {"softmax": {}}},
    "retrain": {"threshold": None, "start": 0.0, "training": {}},
}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "config, expected",
    [
        (None, (1.0, 0.0, "biased_softmax", None, 0.0)),  # says nothing: the weights as they are
        ({}, (1.0, 0.0, "biased_softmax", 0.5, 1 / 3)),  # the defaults of a config
        (SAID, (3.0, 4.0, "softmax", None, 0.0)),
        (
            {**SAID, "retrain": {"threshold": 0.7, "start": 0.2, "training": {"epochs": 160, "distill_weight": 2.0}}},
            (2.0, 1.0, "softmax", 0.7, 0.2),  # 4 of the retrain's 160 epochs are 1 of the search's 40
        ),
    ],
)
def test_older_files_mean_what_their_own_config_says(version, config, expected, tmp_path):
    torch.save(old(version, config), tmp_path / "alpha.pt")
    found = Schedule.load(tmp_path / "alpha.pt")
    assert (found.strength, found.warmup, found.reading, found.threshold, found.start) == expected
    assert found.scalars == {} and found.scales.tolist() == [1.0 if version == 1 else 5.0]
    found.save(tmp_path / "new.pt")
    assert same(Schedule.load(tmp_path / "new.pt"), found)


@pytest.mark.parametrize(
    "config",
    [
        {"training": {"distill_weight": "much"}},
        {"training": {"distill_weight": 10**400}},
        {"training": {"epochs": 3, "distill_warmup": 1}, "retrain": {"training": {"epochs": 0}}},
        {"training": 3},
        {"retrain": {"start": 2}},
    ],
)
def test_older_files_with_a_config_that_means_nothing_are_refused(config, tmp_path):
    torch.save(old(2, config), tmp_path / "alpha.pt")
    with pytest.raises(UserError, match="alpha.pt: (damaged schedule|schedule: s)"):
        Schedule.load(tmp_path / "alpha.pt")
