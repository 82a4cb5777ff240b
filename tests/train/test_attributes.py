"""What a student keeps in plain attributes is in checkpoints: a resumed training is a loop that anybody would write."""

from __future__ import annotations

import itertools
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distpro.files import load_safely, save_atomically
from distpro.objective import Objective
from distpro.tasks import Classification
from distpro.train.attributes import LARGEST_NEW
from distpro.train.checkpoint import CHECKPOINT
from distpro.train.trainer import Trainer
from distpro.weights import Replay
from pathways import UserError
from tests.train.test_trainer import Batches

STEPS = 4  # of 6, before the training is stopped


class Own(nn.Module):
    """Keeps a state in attributes; `scale` moves it on, and gives what the output is multiplied with."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(108, 5), nn.Tanh())
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(5, 4)
        self.start()

    def start(self):
        pass

    def forward(self, x):
        scale = self.scale() if self.training else 1.0
        return self.head(self.drop(self.layers(x) * scale))


class Number(Own):
    def start(self):
        self.tau = 4.0

    def scale(self):
        self.tau = max(0.2, self.tau * 0.8)
        return 1 / self.tau


class InPlace(Own):
    """A tensor that two modules have."""

    def start(self):
        self.level = torch.ones(5)
        self.layers[2].level = self.level

    def scale(self):
        self.level.mul_(0.9)
        return self.layers[2].level


class Large(Own):
    """A bank that is too large for a copy to compare with."""

    def start(self):
        self.bank = torch.ones(LARGEST_NEW + 1)

    def scale(self):
        self.bank[:5] *= 0.9
        return self.bank[:5].clone()


class Nested(Own):
    def start(self):
        self.seen, self.history = {"passes": 0, "by part": [0, (1.0,)]}, []
        self.also = self.history

    def scale(self):
        self.seen["passes"] += 1
        self.seen["by part"][1] = (*self.seen["by part"][1], 0.5)
        self.history.append(torch.full((5,), float(self.seen["passes"])))
        return torch.stack(self.also).mean(0) + sum(self.seen["by part"][1])


class OfTheGraph(Own):
    """The mean of its last output, which comes with the graph of that pass."""

    def start(self):
        self.last = None

    def scale(self):
        factor = 1.0 if self.last is None else 1 + self.last.detach()
        self.last = self.head.weight.mean(0)
        return factor


class OfALibrary(Own):
    """A rate of PyTorch's own module that its owner sets."""

    def scale(self):
        self.drop.p = min(0.6, self.drop.p + 0.1)
        return 1.0


class Removed(Own):
    def start(self):
        self.first = True

    def scale(self):
        if hasattr(self, "first"):
            del self.first
            return 3.0
        return 1.0


class Drawing(Own):
    def start(self):
        self.generator = torch.Generator().manual_seed(1)

    def scale(self):
        return 1 + torch.rand(5, generator=self.generator)


class Saving(Drawing):
    def get_extra_state(self):
        return self.generator.get_state()

    def set_extra_state(self, state):
        self.generator.set_state(state)


def trainer(student, folder):
    objective = Objective(None, student)
    optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9)
    return Trainer(
        objective, Classification(), optimizer, Replay(objective), Batches(), Batches(seed=1), epochs=2, folder=folder
    )


def stopped(student, folder):
    made = trainer(student, folder)
    torch.manual_seed(7)
    for batch in [*Batches().epoch(0), *Batches().epoch(1)][:STEPS]:
        made.train_step(batch)
    made.save()


def plain_loop(student):
    optimizer = torch.optim.SGD(student.parameters(), 0.1, momentum=0.9)
    torch.manual_seed(7)
    for batch in [*Batches().epoch(0), *Batches().epoch(1)]:
        optimizer.zero_grad()
        F.cross_entropy(student(batch.inputs), batch.target).backward()
        optimizer.step()
    return student.state_dict()


@pytest.mark.parametrize("kind", [Number, InPlace, Large, Nested, OfTheGraph, OfALibrary, Removed, Saving])
def test_a_resumed_training_goes_on_from_the_attributes(tmp_path, capsys, kind):
    stopped(kind(), tmp_path)
    assert "cannot be kept" not in capsys.readouterr().out
    student = kind()
    resumed = trainer(student, tmp_path)
    resumed.resume()
    resumed.fit()
    for name, value in plain_loop(kind()).items():
        assert torch.equal(student.state_dict()[name], value), name


def test_what_two_modules_have_stays_one(tmp_path):
    stopped(InPlace(), tmp_path)
    student = InPlace()
    trainer(student, tmp_path).resume()
    assert student.level is student.layers[2].level
    assert torch.allclose(student.level, torch.full((5,), 0.9**STEPS))


def test_a_checkpoint_without_attributes_is_read(tmp_path):
    stopped(Constant(), tmp_path)
    state = load_safely(tmp_path / CHECKPOINT)
    assert state.pop("attributes") == []
    save_atomically(state, tmp_path / CHECKPOINT)
    resumed = trainer(Constant(), tmp_path)
    resumed.resume()
    assert resumed.step == STEPS


class Constant(Own):
    """Nothing changes; a tensor that is not a number is the same as before."""

    def start(self):
        self.table, self.rate, self.unknown = {"x": [1, 2]}, 0.5, torch.tensor([float("nan"), 1.0])

    def scale(self):
        return self.rate


class Held:
    def __init__(self):
        self.count = 0


class Counting(Own):
    def start(self):
        self.held = Held()

    def scale(self):
        self.held.count += 1
        return 1.0


class Iterating(Own):
    def start(self):
        self.numbers = itertools.count()

    def scale(self):
        return 1.0 + next(self.numbers)


class Hiding(Own):
    """A momentum copy that the optimiser does not see."""

    def start(self):
        self.hidden = (nn.Linear(5, 4),)

    @torch.no_grad()
    def scale(self):
        self.hidden[0].weight.data.lerp_(self.head.weight, 0.1)
        return 1.0


class Leaving(Own):
    """A map of its last pass, far larger than what a state is."""

    def start(self):
        self.map = None

    def scale(self):
        self.map = torch.ones(2**20 + 1)
        return 1.0


@pytest.mark.parametrize(
    ("kind", "attribute"),
    [
        (Drawing, "'generator' (Generator)"),
        (Counting, "'held' (Held)"),
        (Iterating, "'numbers' (count)"),
        (Hiding, "'hidden' (tuple)"),
        (Leaving, "'map' (a tensor of 1,048,577 numbers)"),
    ],
)
def test_what_cannot_be_kept_is_said_once(tmp_path, capsys, kind, attribute):
    made = trainer(kind(), tmp_path)
    made.fit()
    made.save()
    said = [line for line in capsys.readouterr().out.splitlines() if "cannot be kept" in line]
    assert len(said) == 1 and said[0].startswith(f"student: {attribute} has changed in training"), said
    assert load_safely(tmp_path / CHECKPOINT)["attributes"] == []


class Extra(Number):
    def __init__(self, state):
        super().__init__()
        self.state = state

    def get_extra_state(self):
        return {"all": [1, self.state]}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize(
    ("state", "name"),
    [(np.float64(2), "numpy.float64"), (deque([1]), "collections.deque"), (Held(), f"{__name__}.Held")],
)
def test_extra_state_that_is_not_read_back_is_refused_before_the_first_step(tmp_path, state, name):
    student = nn.Sequential(Extra(state))
    made = trainer(student, tmp_path)
    with pytest.raises(
        UserError, match=rf"student: get_extra_state of '0' \(Extra\) gives {name}, which no checkpoint"
    ):
        made.fit()
    assert made.step == 0 and not (tmp_path / CHECKPOINT).exists()


def test_extra_state_that_turns_bad_leaves_the_last_checkpoint(tmp_path):
    student = Extra(1.0)
    made = trainer(student, tmp_path)
    made.save()
    student.state = np.float64(1)
    made.step = 1
    with pytest.raises(UserError, match=r"get_extra_state of the whole model \(Extra\)"):
        made.save()
    assert load_safely(tmp_path / CHECKPOINT)["step"] == 0
