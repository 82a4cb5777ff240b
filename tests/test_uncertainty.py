"""Uncertainty weighting against a loop that is written out here, in float64; what it refuses; and a run of it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import yaml

import distpro
from distpro.build.optimizer import build_optimizer
from distpro.cli import main
from distpro.config.reading import read_config
from distpro.files import load_safely
from distpro.losses import build_loss
from distpro.objective import Objective, Term
from distpro.tasks import Classification
from distpro.train.tracking import read_metrics
from distpro.train.trainer import Interrupted, Trainer
from distpro.weights import replay
from pathways import UserError
from tests.digits import random_teacher, settings
from tests.pairs import Distance, Levels, free, network, schedule
from tests.runs.test_resume import assert_same_run, stop_after
from tests.train import test_accumulate
from tests.train.test_accumulate import Samples

LR, MOMENTUM, DECAY = 0.1, 0.9, 1e-2
SCALES = {"early": 1.0, "levels.1": 5.0, "levels.2": 0.5}


def objective_of_four(dtype=torch.float32):
    """Entries: an early feature, two levels, and a constant."""
    terms = [
        Term(Distance(), "early", ["2"], ["2"]),
        Term(Levels(), "levels", ["2", "5"], ["2", "5"], per_level=True),
        Term(Distance(), "constant", ["5"], ["5"], weight=0.7),
    ]
    return Objective(network(0).to(dtype), network(1).to(dtype), [term.to(dtype) for term in terms])


def optimizer_of(objective):
    chosen = {"lr": LR, "momentum": MOMENTUM, "nesterov": True, "weight_decay": DECAY}
    config = read_config({"student": {"model": "resnet8"}, "training": {"optimizer": chosen}})
    trained = [*objective.uncertainty.parameters()]
    return build_optimizer(config, objective.trainable_parameters(), objective.student.model, trained)


class ByHand:
    """The same in plain PyTorch: losses, weights and SGD with Nesterov's momentum, written out."""

    def __init__(self):
        self.teacher, self.student = network(0).double().eval(), network(1).double().train()
        self.factors = [torch.tensor(0.5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        self.s = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(4)]  # the task's comes first
        self.velocity = {}

    def losses(self, x, y):
        """Of the task, the three terms, and the constant one."""
        s2 = self.student[:3](x)
        s5 = self.student[3:6](s2)
        with torch.no_grad():
            t2 = self.teacher[:3](x)
            t5 = self.teacher[3:6](t2)
        square = lambda a, b: (a - b).square().mean()  # noqa: E731
        first, second = self.factors
        task = F.cross_entropy(self.student[6:](s5), y)
        return [task, square(first * s2, t2), square(s2, t2), square(s5, t5)], square(second * s5, t5)

    def step(self, x, y, strength):
        (task, *terms), constant = self.losses(x, y)
        s_task, *s = self.s
        loss = torch.exp(-s_task) * task + torch.log(torch.exp(s_task).sqrt()) + 0.7 * constant  # + log σ
        for one, value, c in zip(s, terms, SCALES.values(), strict=True):
            variance = torch.exp(one)
            loss = loss + strength * (c * value / (2 * variance) + torch.log(variance.sqrt()))
        decayed = [*self.student.parameters(), *self.factors]
        everything = [*decayed, *self.s]
        for n, (p, g) in enumerate(zip(everything, torch.autograd.grad(loss, everything), strict=True)):
            g = g + DECAY * p.detach() * (n < len(decayed))
            v = self.velocity[n] = MOMENTUM * self.velocity.get(n, 0) + g
            p.data -= LR * (g + MOMENTUM * v)


@pytest.mark.parametrize("with_schedule", [True, False])
def test_trains_as_the_formulas_say(with_schedule):
    """Parameters and every s after twelve steps. λ is 1 in the first epoch and 2 in the second; of a schedule's weights nothing
    is seen, of its scales all."""
    objective = objective_of_four(torch.float64)
    given = schedule([[0.9, 0.0, 0.3], [0.1, 7.0, 0.2]], list(SCALES))
    given = replace(
        given, strength=2.0, warmup=2.0, scales=torch.tensor(list(SCALES.values())), threshold=0.5, start=0.5
    )
    if with_schedule:
        weights = replay(objective, "uncertainty", 12, given)
    else:
        objective.follow_uncertainty(lambda step: 1 + step // 6, SCALES)
        weights = replay(objective, "constant", 12)
    objective.double()
    loader = Samples(8)
    Trainer(objective, Classification(), optimizer_of(objective), weights, loader, Samples(16), epochs=2).fit()
    truth = ByHand()
    for step, one in enumerate([*loader.epoch(0), *loader.epoch(1)]):
        truth.step(one.inputs, one.target, 1 + step // 6)
    found, expected = [objective.uncertainty.task, *objective.uncertainty.terms], [s.item() for s in truth.s]
    assert max(abs(a.item() - b) for a, b in zip(found, expected, strict=True)) < 1e-12
    assert min(map(abs, expected)) > 0.01  # they have moved
    for (name, ours), theirs in zip(
        objective.student.model.named_parameters(), truth.student.parameters(), strict=True
    ):
        assert (ours - theirs).abs().max() < 1e-12, name
    for term, factor in zip((objective.terms[0], objective.terms[2]), truth.factors, strict=True):
        assert (term.loss.factor - factor).abs() < 1e-12
    task, *precisions = (math.exp(-s) for s in expected)
    by_hand = [2 * 0.5 * c * precision for c, precision in zip(SCALES.values(), precisions, strict=True)]
    assert weights.weights(11).tolist() == pytest.approx([*by_hand, 0.7], rel=1e-12)
    logged = {"scalar/task": task, **{f"alpha/{key}": p for key, p in zip(SCALES, precisions, strict=True)}}
    assert {tag: value.item() for tag, value in weights.scalars().items()} == pytest.approx(logged, rel=1e-12)


def test_gradients_are_the_analytic_ones():
    """∂/∂s_task = w (½ - exp(-s) L), ∂/∂s_j = λ (½ - ½ exp(-s) c ℓ): zero where a loss weighs 1/(2 ℓ)."""
    objective, truth = objective_of_four(torch.float64), ByHand()
    objective.task_weight = 0.25
    objective.follow_uncertainty(3.0, SCALES)
    objective.double()
    trained = objective.uncertainty
    one = next(Samples(8).epoch(0))
    with torch.no_grad():
        task, *terms = (value.item() for value in truth.losses(one.inputs, one.target)[0])
        trained.task.fill_(0.4)
        trained.terms.copy_(torch.tensor([-1.0, 0.3, math.log(SCALES["levels.2"] * terms[2])]))
    loss, _ = objective(one)
    loss.backward()
    assert trained.task.grad.item() == pytest.approx(0.25 * (0.5 - math.exp(-0.4) * task), rel=1e-12)
    expected = [3 * (0.5 - 0.5 * math.exp(1.0) * terms[0]), 3 * (0.5 - 0.5 * math.exp(-0.3) * 5 * terms[1])]
    assert trained.terms.grad[:2].tolist() == pytest.approx(expected, rel=1e-6)  # s is copied from float32
    assert trained.terms.grad[2].abs() < 1e-6
    assert objective.weights_at(0)[2].item() == pytest.approx(
        3 * 0.5 * SCALES["levels.2"] / (SCALES["levels.2"] * terms[2])
    )


def trained(size, accumulate, **options):
    """Without BatchNorm, see tests/train/test_accumulate.py."""
    terms = test_accumulate.terms()
    for term in terms:
        term.weight = None
    objective = Objective(*(test_accumulate.network(n).double() for n in (0, 1)), [term.double() for term in terms])
    weights = replay(objective, "uncertainty", 6)
    objective.double()
    loaders = Samples(size), Samples(16)
    trainer = Trainer(
        objective,
        Classification(),
        optimizer_of(objective),
        weights,
        *loaders,
        epochs=2,
        accumulate=accumulate,
        **options,
    )
    trainer.fit()
    return trainer


@pytest.mark.parametrize("clip", [{}, {"clip_norm": 0.05}, {"clip_norm": 0.05, "clip_by": "module"}])
def test_a_step_of_several_batches(clip):
    one, parts = trained(16, 1, **clip), trained(8, 2, **clip)
    assert one.step == parts.step == 6 and one.objective.uncertainty.terms.abs().min() > 1e-3
    assert test_accumulate.far(one, parts) < 1e-12


def test_another_replay_ends_it():
    objective = objective_of_four()
    before = len(objective.trainable_parameters())
    objective.follow_uncertainty()
    assert len(objective.trainable_parameters()) == before + 2
    assert [len(group) for group in objective.clip_groups("module")][-1] == 2
    objective.follow_equal()
    assert objective.uncertainty is None and len(objective.trainable_parameters()) == before
    objective.follow_uncertainty()
    objective.follow(schedule([[0.1, 0.2, 0.3]], list(SCALES)), 3)
    assert objective.uncertainty is None and objective.weights_at(0) == pytest.approx([0.1, 0.2, 0.3, 0.7])


# What it refuses


@pytest.mark.parametrize("name", ["vid", "srd", "pad_l2"])
def test_a_loss_that_may_be_negative(name):
    shapes = {"vid": [(8, 4, 4)], "srd": [(4,), (8, 4, 4)], "pad_l2": [(8,)]}[name]
    loss = build_loss(name, shapes, shapes)
    terms = [*free(["a"]), Term(loss, "signed", ["5"] * len(shapes), ["5"] * len(shapes))]
    objective = Objective(network(0), network(1), terms)
    with pytest.raises(
        UserError, match="the loss of term 'signed' may be negative, and its weight would grow for ever"
    ):
        replay(objective, "uncertainty", 3)
    terms[1].weight = 1.0
    replay(objective, "uncertainty", 3)
    assert objective.uncertainty.keys == ["a"]


@pytest.mark.slow
def test_a_dry_run_refuses_it_too(teacher, tmp_path, capsys):
    config = settings(teacher, {"retrain": {"weights": "uncertainty"}, "terms": [{"loss": "vid"}]})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["retrain", str(tmp_path / "config.yaml"), "--dry-run"]) == 2
    assert "the loss of term 'vid' may be negative" in capsys.readouterr().err


def test_nothing_to_learn():
    objective = Objective(network(0), network(1), free(["a"], weight=1.0))
    with pytest.raises(UserError, match="no term's weight is free: give pathways or terms .* or --schedule"):
        replay(objective, "uncertainty", 3)


def test_a_search():
    config = settings("teacher.pt", {"retrain": {"weights": "uncertainty"}})
    with pytest.raises(UserError, match=r"retrain\.weights: uncertainty trains its weights in the retrain"):
        distpro.search(config)


# In a run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return random_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.mark.slow
def test_a_run_its_resume_and_its_evaluation(teacher, tmp_path, monkeypatch):
    config = settings(teacher, {"retrain": {"weights": "uncertainty"}, "data": {"samples": 80}})
    result = distpro.retrain(copy.deepcopy(config), out=tmp_path / "whole")
    state = load_safely(tmp_path / "whole" / "checkpoint.pt")
    values = {"scalar/task": state["weights"]["task"], "alpha/kd": state["weights"]["terms"][-1]}
    assert state["weights"]["terms"].shape == (4,) and all(s.abs() > 1e-2 for s in values.values())
    last = [row for row in read_metrics(tmp_path / "whole") if "alpha/kd" in row][-1]
    assert {tag: last[tag] for tag in values} == pytest.approx({tag: math.exp(-s) for tag, s in values.items()})
    decays = [group["weight_decay"] for group in state["optimizer"]["param_groups"]]
    assert decays == [5e-4, 0.0] and len(state["optimizer"]["param_groups"][1]["params"]) == 2
    stop_after(monkeypatch, [5])
    with pytest.raises(Interrupted):
        distpro.retrain(copy.deepcopy(config), out=tmp_path / "resumed")
    distpro.retrain(copy.deepcopy(config), out=tmp_path / "resumed", resume=True)
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")
    assert distpro.evaluate(tmp_path / "whole")["loss"] == pytest.approx(result.metrics["loss"], rel=1e-6)
    student = load_safely(tmp_path / "whole" / "student.pt")
    assert student.keys() == state["student"].keys()
