"""The numbers of an explanation against schedules whose answer is known on paper."""

from dataclasses import replace

import pytest
import torch

from distpro.report.words import explain_schedule, schedule_summary
from distpro.schedule import Schedule

META = {
    "weighting": {"name": "biased_softmax", "params": {"g": 1.0}},
    "teacher": {"model": "resnet56", "parameters": 861620},
    "student": "resnet20",
    "data": {"name": "cifar100", "classes": 100},
    "versions": {"distpro": "0.1.0"},
    "created": "2026-01-02T03:04:05",
    "config": {"epochs": 3},
}


def two_terms(steps=9, meta=None, **meaning):
    """Term a falls from 1 to 0 in equal steps while b, of another teacher level, stays at 1/2; α̃ = w."""
    a = torch.linspace(1, 0, steps)
    weights = torch.stack([a, torch.full_like(a, 0.5)], 1)
    levels = torch.tensor([[1, 1, 1], [2, 1, 1]])
    return Schedule(("a", "b"), levels, weights + 0.01, weights, (), 3.0, meta or {}, **meaning)


def one_process(values, threshold):
    column = torch.tensor(values)[:, None]
    return Schedule(("a",), torch.zeros(1, 3).long(), column, column, (), 2.0, threshold=threshold)


def test_size_and_totals():
    summary = schedule_summary(two_terms())
    assert (summary["terms"], summary["steps"], summary["epochs"]) == (2, 9, 3.0)
    assert summary["total"] == pytest.approx({"start": 1.5, "middle": 1.0, "end": 0.5})


def test_strongest_terms_and_level_shares_by_thirds():
    summary = schedule_summary(two_terms())
    # means of a over the thirds: (1 + 7/8 + 6/8) / 3 = 7/8, 1/2, 1/8
    early, late = summary["strongest"]["early"], summary["strongest"]["late"]
    assert early[0] == ("a", pytest.approx(7 / 8), pytest.approx(7 / 11))
    assert late[0] == ("b", pytest.approx(1 / 2), pytest.approx(4 / 5))
    assert summary["teacher_levels"][1] == pytest.approx({"early": 7 / 11, "middle": 1 / 2, "late": 1 / 5})
    assert summary["teacher_levels"][2] == pytest.approx({"early": 4 / 11, "middle": 1 / 2, "late": 4 / 5})


def test_movement_is_the_mean_distance_from_the_mean():
    # Σ|a − 1/2| over 9 steps is (4 + 3 + 2 + 1) / 8 · 2 = 2.5; b does not move; the means sum to 1
    assert schedule_summary(two_terms())["movement"] == pytest.approx(2.5 / 9)
    assert schedule_summary(two_terms().final())["movement"] == 0


@pytest.mark.parametrize(
    ("values", "threshold", "expected", "computed"),
    [
        ([1.0, 0.6, 0.5, 0.4], 0.5, [("a", 2, 1.0, True)], 0.5),  # at the threshold is dropped
        ([1.0, 0.4, 0.6, 0.4], 0.5, [("a", 1, 0.5, False)], 0.5),
        ([0.4, 0.6, 0.7, 0.8], 0.5, [("a", 0, 0.0, False)], 0.75),
        ([1.0, 0.6, 0.7, 0.8], 0.5, [], 1.0),
        ([1.0, 0.6, 0.1, 0.0], None, [], 1.0),
    ],
)
def test_dropped_terms(values, threshold, expected, computed):
    schedule = one_process(values, threshold)
    summary = schedule_summary(schedule)
    assert [tuple(entry.values()) for entry in summary["dropped"]] == expected
    assert (
        summary["computed"] == computed == (schedule.drop(threshold).weights != 0).float().mean() or threshold is None
    )


def test_what_is_dropped_is_of_the_steps_that_a_replay_takes():
    """A search over a horizon ends with a weight that is dropped, and hands on that end alone."""
    weights = torch.tensor([[1.0, 1.0]] * 9 + [[1.0, 0.01]])
    schedule = Schedule(
        ("a", "b"), torch.zeros(2, 3).long(), weights.log(), weights, (), 5.0, threshold=0.5, reading="log"
    )
    whole, end = schedule_summary(replace(schedule, start=0.0)), schedule_summary(replace(schedule, start=1.0))
    assert (whole["computed"], end["computed"]) == (pytest.approx(0.95), 0.5)
    assert whole["dropped"] == end["dropped"] == [{"key": "b", "step": 9, "epoch": 1.8, "for_good": True}]
    assert "drops 1 of 2 terms; 50.0% of the terms' computation is saved.\n  b" in explain_schedule(
        replace(schedule, start=1.0)
    )


def test_words_say_what_the_file_says():
    text = explain_schedule(two_terms(meta=META, strength=2.0, threshold=0.5, start=0.25))
    for word in ("2 terms", "9 steps", "3 epochs", "resnet56", "resnet20", "cifar100", "biased_softmax", "2026-01-02"):
        assert word in text
    assert "drops 2 of 2 terms at some time" not in text  # b has α̃ = 0.51 throughout
    assert "drops 1 of 2 terms at some time, 1 of them for good" in text
    assert "The process moves" in text
    for line in ("lambda:    2", "threshold: 0.5", "start:     0.25"):
        assert line in text.splitlines()
    assert "warmup" not in text and "Beside the weights" not in text


def test_words_say_what_else_a_replay_moves():
    scalars = {"task": torch.linspace(1, 0.5, 9), "a.temperature": torch.full((9,), 4.0)}
    schedule = two_terms(scalars=scalars, warmup=2.0)
    text = explain_schedule(schedule)
    assert "  task: 1, 0.75, 0.5" in text.splitlines() and "  a.temperature: 4, 4, 4" in text.splitlines()
    assert "warmup:    2" in text.splitlines()
    assert schedule_summary(schedule)["scalars"]["task"] == {"start": 1.0, "middle": 0.75, "end": 0.5}


def test_of_log_weights_a_share_below_a_tenth_of_an_equal_one_is_dropped():
    """Of two terms it is 1/20: a is 0.5 (1 - n/8) / (0.5 + that), below only at the last step, where it is 0."""
    schedule = two_terms(reading="log", threshold=0.5)
    dropped = schedule_summary(schedule)["dropped"]
    assert [(entry["key"], entry["step"]) for entry in dropped] == [("a", 8)]
    assert "A tenth of an equal share drops 1 of 2 terms" in explain_schedule(schedule)


def test_words_for_constant_weights():
    assert "hardly differs from constant" in explain_schedule(two_terms().equal())


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_bare_schedules_are_explained(steps):
    text = explain_schedule(two_terms(steps))
    assert f"{steps} step" in text and "None" not in text and "nan" not in text


def test_weights_that_are_all_zero_have_no_shares():
    schedule = two_terms().drop(9.0)
    summary = schedule_summary(schedule)
    assert summary["movement"] == 0 and summary["teacher_levels"][1]["late"] == 0
    assert "nan" not in explain_schedule(schedule)


def test_explanation_survives_the_file(tmp_path):
    schedule = two_terms(meta=META)
    schedule.save(tmp_path / "alpha.pt")
    assert explain_schedule(Schedule.load(tmp_path / "alpha.pt")) == explain_schedule(schedule)


def test_gradients_are_told_with_what_is_no_signal():
    of = {
        "a": {"mean": -0.02, "spread": 0.01, "held": 1.0},
        "b": {"mean": 0.001, "spread": 0.01, "held": 0.5},
    }
    told = explain_schedule(two_terms(meta={"gradients": {"updates": 4, "of": of}}, reading="log"))
    assert "Gradient of the validation loss by log w, mean ± spread over 4 updates" in told
    assert "  a  -0.02 ± 0.01, its sign held in 100%" in told
    assert "no signal (within two standard errors of 0): 1 term: b" in told


@pytest.mark.parametrize(
    "found", [None, 3, {}, {"updates": 4}, {"updates": "x", "of": {}}, {"updates": 2, "of": {"a": 1}}]
)
def test_a_file_that_says_nothing_of_gradients(found):
    summary = schedule_summary(two_terms(meta={"gradients": found}))
    assert (summary["updates"], summary["gradients"]) == (0, []) and "Gradient" not in explain_schedule(two_terms())
