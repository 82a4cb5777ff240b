"""Gradients of two processes of which each has left out other layers, averaged parameter by parameter."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from distpro.batch import batch_of
from distpro.train import distributed
from distpro.train.keeping import Keeper, MovingAverage
from tests.train.ranks import in_two
from tests.train.test_trainer import Batches, build

SIZES = {
    "a": (2, 2),
    "b": (3, 4),
    "c": (2, 6),
    "d": (5,),
}  # b and c have as many numbers: an exchange of a size by chance


def layers() -> nn.ParameterDict:
    return nn.ParameterDict({name: nn.Parameter(torch.zeros(size)) for name, size in SIZES.items()})


def own(rank: int, name: str) -> torch.Tensor | None:
    """Both ranks have a; only rank 0 has c, only rank 1 has b; none has d."""
    if name == "d" or (name == "b" and rank == 0) or (name == "c" and rank == 1):
        return None
    generator = torch.Generator().manual_seed(10 * rank + ord(name))
    return torch.randn(SIZES[name], generator=generator)


def exchange(rank: int):
    model, calls = layers(), []
    for name, parameter in model.items():
        parameter.grad = own(rank, name)
    real = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (calls.append(args[0].numel()), real(*args, **kwargs))[1]
    distributed.average_gradients(model.values())
    dist.all_reduce = real
    return {name: parameter.grad for name, parameter in model.items()}, calls


def mixed(rank: int):
    """A gradient in float64 beside others, and none at all: the same exchanges on both ranks."""
    model = layers()
    model["d"] = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    distributed.average_gradients(model.values())
    before = [p.grad for p in model.values()]
    if rank == 0:
        model["d"].grad = torch.full((5,), 1e-12, dtype=torch.float64) + 1
    else:
        model["a"].grad = torch.full((2, 2), 4.0)
    distributed.average_gradients(model.values())
    return before, {name: parameter.grad for name, parameter in model.items()}


def layer_drop(rank: int):
    """Ten steps of a model that drops another layer on each rank, as ranks are seeded apart."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "abc"})
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(10):
        optimizer.zero_grad()
        x = torch.randn(4, 2, generator=generator)
        chosen = "bc"[int(torch.randint(2, (1,), generator=generator))]
        model[chosen](model["a"](x)).square().sum().backward()
        distributed.average_gradients(model.parameters())
        optimizer.step()
    return model.state_dict()


class Shares(Batches):
    """Each rank's part of the batches."""

    def epoch(self, epoch, start=0):
        for batch in super().epoch(epoch, start):
            share = batch.samples // 2
            rows = slice(distributed.rank() * share, (distributed.rank() + 1) * share)
            yield batch_of(batch.inputs[rows], batch.target[rows])


def kept(rank: int):
    """What a training with moving average, choice and early stopping leaves."""
    trainer = build(epochs=4)
    trainer.train_loader, trainer.test_loader = Shares((6, 6, 4)), Shares((6, 4), seed=1)
    ema = partial(MovingAverage, decay=0.5)
    options = {"keep": "average", "average_of": 2, "patience": 3, "train": trainer.train_loader}
    trainer.keeper = Keeper(trainer.objective, "accuracy", True, ema, Shares((6, 4), seed=2), **options)
    metrics = trainer.fit()
    return trainer.objective.student.model.state_dict(), {**metrics, "seconds": 0}, trainer.keeper.state_dict()


@pytest.fixture(scope="module")
def found():
    return in_two(exchange, mixed, layer_drop, kept)


@pytest.mark.slow
def test_what_one_rank_lacks_counts_as_zero_and_what_all_lack_stays_none(found):
    for gradients, calls in found["exchange"]:
        for name in SIZES:
            values = [own(rank, name) for rank in range(2)]
            if all(v is None for v in values):
                assert gradients[name] is None
            else:
                expected = sum(torch.zeros(SIZES[name]) if v is None else v for v in values) / 2
                assert torch.equal(gradients[name], expected), name
        assert calls == [4, 4 + 12 + 12]  # who has which, and all that any has


@pytest.mark.slow
def test_other_types_and_no_gradient_at_all(found):
    for before, after in found["mixed"]:
        assert before == [None] * 4
        assert after["b"] is None and after["c"] is None
        assert torch.equal(after["d"], (torch.full((5,), 1e-12, dtype=torch.float64) + 1) / 2)
        assert torch.equal(after["a"], torch.full((2, 2), 2.0))


@pytest.mark.slow
def test_ranks_stay_together(found):
    first, second = found["layer_drop"]
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_ranks_keep_the_same_student(found):
    (student, metrics, state), (other, same, its) = found["kept"]
    assert all(torch.equal(student[name], other[name]) for name in student)
    assert all(torch.equal(value, its["average"][name]) for name, value in state["average"].items())
    assert metrics == same and metrics["last_accuracy"] >= 0
    assert [(one["epoch"], one["value"]) for one in state["kept"]] == [
        (one["epoch"], one["value"]) for one in its["kept"]
    ]


def test_alone_nothing_happens():
    model = layers()
    model["a"].grad = torch.ones(2, 2)
    distributed.average_gradients(model.values())
    assert torch.equal(model["a"].grad, torch.ones(2, 2)) and model["b"].grad is None
