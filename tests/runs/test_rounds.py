"""A search by whole trainings: its outer loop where the answer is known, and runs."""

from __future__ import annotations

import pytest
import torch

import distpro
from distpro.files import load_safely
from distpro.runs.rounds import Rounds, hats
from distpro.schedule import Schedule
from distpro.train.trainer import Trainer
from tests.digits import random_teacher, settings
from tests.runs.test_resume import apart

STEPS = 20


def test_hats_are_a_partition_of_unity_with_one_at_their_knots():
    for knots in (1, 2, 4, 20):
        phi = hats(STEPS, knots)
        assert phi.shape == (knots, STEPS) and torch.allclose(phi.sum(0), torch.ones(STEPS, dtype=phi.dtype))
        assert knots == 1 or (phi[0, 0] == 1 and phi[-1, -1] == 1)
    line = torch.tensor([[2.0], [8.0]], dtype=torch.float64)
    assert torch.allclose(hats(4, 2).T @ line, torch.tensor([[2.0], [4.0], [6.0], [8.0]], dtype=torch.float64))


class Bowl:
    """F = Σ_t Σ_n (log w_n(t) − c_n(t))², c linear in time, with noise on its gradient by w."""

    def __init__(self, noise=0.0):
        t = torch.linspace(0, 1, STEPS, dtype=torch.float64)
        self.best = torch.stack([1 - 2 * t, t * 0 - 0.5], 1)
        self.noise, self.seen = noise, []

    def gradient(self, number, log):
        self.seen.append(log)
        draw = torch.randn(log.shape, generator=torch.Generator().manual_seed(number), dtype=log.dtype)
        return (2 * (log - self.best) + self.noise * draw) / log.exp()

    def judge(self, number, log):
        return (log - self.best).square().sum().item()

    def rounds(self, knots, rounds, step=0.5, folder=None):
        start = torch.zeros(2, dtype=torch.float64)
        return Rounds(start, STEPS, knots, rounds, step, self.gradient, self.judge, folder)


def test_it_finds_the_process_that_is_linear_between_its_knots():
    bowl = Bowl()
    found = bowl.rounds(2, 40, step=0.2).run()
    assert bowl.judge(0, found) < 0.02 * bowl.judge(0, torch.zeros(STEPS, 2, dtype=torch.float64))
    one = bowl.rounds(1, 40, step=0.2).run()
    assert torch.allclose(one, one[:1].expand(STEPS, -1)) and bowl.judge(0, one) > bowl.judge(0, found)


def test_a_round_changes_the_most_telling_weight_of_each_knot_by_the_step():
    bowl = Bowl()
    outer = bowl.rounds(2, 1, step=0.25)
    outer.run()
    assert outer.log.abs().max(1).values.tolist() == pytest.approx([0.25, 0.25])


def test_what_is_worse_is_taken_back_and_steps_are_halved(capsys):
    bowl = Bowl()
    outer = bowl.rounds(1, 9, step=8.0)
    bowl.judge = lambda number, log: float(number)
    found = outer.run()
    assert torch.equal(found, torch.zeros_like(found)) and len(bowl.seen) == 2  # patience
    assert [row["step"] for row in outer.said] == [8.0, 4.0] and not any(row["taken"] for row in outer.said)
    assert "left, with half of the step" in capsys.readouterr().out


def test_noise_ends_it(capsys):
    bowl = Bowl()
    bowl.gradient = lambda number, log: torch.full_like(log, (-1.0) ** number)
    bowl.judge = lambda number, log: -float(number)
    bowl.rounds(1, 9).run()
    assert "round 3: no weight's gradient is more than noise over 3 trainings" in capsys.readouterr().out


def test_rounds_that_are_there_are_not_trained_again(tmp_path):
    whole = Bowl(noise=0.3).rounds(2, 4, folder=tmp_path).run()
    (tmp_path / "4.pt").unlink()
    again = Bowl(noise=0.3)
    assert torch.equal(again.rounds(2, 4, folder=tmp_path).run(), whole) and len(again.seen) == 1


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return random_teacher(tmp_path_factory.mktemp("teacher"))


def searching(teacher, **search):
    changes = {
        "search": {"rounds": 2, "knots": 2, "trials": 5, "validation_fraction": 0.2, **search},
        "pathways": None,
        "terms": [{"loss": "kd"}, {"loss": "sp"}],
    }
    return settings(teacher, changes)


@pytest.mark.slow
def test_a_search_that_is_killed_in_its_second_round_ends_in_the_same_bytes(teacher, tmp_path, monkeypatch):
    distpro.search(searching(teacher), out=tmp_path / "whole")
    fit = Trainer.fit

    def killed(trainer):
        if trainer.name == "round 2":
            raise KeyboardInterrupt
        return fit(trainer)

    monkeypatch.setattr(Trainer, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        distpro.search(searching(teacher), out=tmp_path / "run")
    monkeypatch.undo()
    distpro.search(searching(teacher), out=tmp_path / "run", resume=True)
    assert apart(tmp_path / "whole", tmp_path / "run") == []

    schedule = Schedule.load(tmp_path / "run" / "alpha.pt")
    assert schedule.start == 0 and len(schedule) == 12 and schedule.meta["gradients"]["updates"] == 2
    rounds = [load_safely(tmp_path / "run" / "rounds" / f"{n}.pt") for n in (1, 2)]
    assert [r["gradient"].shape for r in rounds] == [(2, 2)] * 2 and not torch.equal(*(r["gradient"] for r in rounds))
    log = schedule.alpha_tilde
    assert torch.allclose(log.diff(dim=0).diff(dim=0), torch.zeros(10, 2), atol=1e-5)  # a line between two knots


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"threshold": 0.1}, r"search.threshold: with search.rounds.*allowed: null"),
        ({"estimator": "unrolled"}, r"search.estimator: with search.rounds.*allowed: auto, sweep"),
        ({"weighting": "softmax", "trials": 0}, r"search.weighting: with search.rounds.*allowed: log"),
    ],
)
def test_what_rounds_cannot_do(teacher, changes, said):
    with pytest.raises(distpro.UserError, match=said):
        distpro.search(searching(teacher, **changes))


@pytest.mark.slow
def test_learned_numbers_want_one_pass(teacher):
    terms = [{"loss": "kd", "params": {"temperature": "learned"}}]
    with pytest.raises(distpro.UserError, match="search.rounds: kd.temperature can be learned by a search in one pass"):
        distpro.search({**searching(teacher), "terms": terms})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("search", "said"),
    [({"memory": 0.003}, "a gradient is of the whole training, 12 steps"), ({"every": 2}, "search.every")],
)
def test_a_round_is_a_whole_training(teacher, search, said):
    with pytest.raises(distpro.UserError, match=said):
        distpro.search(searching(teacher, **{"trials": 0, **search}))
