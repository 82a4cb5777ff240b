"""The one training loop against plain PyTorch, bit for bit, and what it keeps, reports and refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distpro.batch import batch_of
from distpro.objective import Objective, Term
from distpro.tasks import Classification
from distpro.train.rates import LearningRate
from distpro.train.tracking import Tracker, read_metrics
from distpro.train.trainer import Trainer
from distpro.weights import Replay
from pathways import UserError


class Batches:
    """A loader with other batches in each epoch, and a smaller last one."""

    def __init__(self, sizes=(6, 6, 3), seed=0):
        self.sizes, self.seed = sizes, seed

    def __len__(self):
        return len(self.sizes)

    def epoch(self, epoch, start=0):
        generator = torch.Generator().manual_seed(100 * self.seed + epoch)
        for size in self.sizes:
            batch = batch_of(
                torch.randn(size, 3, 6, 6, generator=generator), torch.randint(4, (size,), generator=generator)
            )
            if start <= 0:
                yield batch
            start -= 1


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(6, 4, 4), nn.Flatten()
    )


class Projected(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv2d(6, 6, 1)

    def forward(self, student, teacher, target=None, index=None):
        return F.mse_loss(self.conv(student), teacher)


class Logits(nn.Module):
    def forward(self, student, teacher, target=None, index=None):
        return F.mse_loss(student, teacher)


def terms():
    """A feature and a response term of constant weights."""
    return [Term(Projected(), "feature", ["2"], ["2"], weight=0.5), Term(Logits(), "logits", weight=0.25)]


def build(with_terms=False, epochs=2, lr=0.1, optimizer=None, **options) -> Trainer:
    objective = Objective(network(0), network(1), terms() if with_terms else [])
    params = objective.trainable_parameters()
    optimizer = optimizer(params) if optimizer else torch.optim.SGD(params, lr, momentum=0.9, nesterov=True)
    replay = Replay(objective)
    return Trainer(objective, Classification(), optimizer, replay, Batches(), Batches(seed=1), epochs=epochs, **options)


# Learning rate


@pytest.mark.parametrize(
    ("settings", "epochs", "factors"),
    [
        ({}, 10, {0: 1, 9.9: 1}),
        ({"name": "step", "milestones": [150, 180, 210]}, 240, {0: 1, 149.99: 1, 150: 0.1, 180: 0.01, 239: 0.001}),
        ({"name": "step", "milestones": [0.625, 0.75, 0.875]}, 240, {149.99: 1, 150: 0.1, 180: 0.01, 210: 0.001}),
        ({"name": "step", "milestones": [0.5], "gamma": 0.2}, 3, {1.49: 1, 1.5: 0.2}),
        ({"name": "step", "milestones": [0.5, 2]}, 4, {0.49: 1, 0.5: 0.1, 1.9: 0.1, 2: 0.01}),  # epochs, as one is ≥ 1
        ({"name": "cosine"}, 8, {0: 1, 2: (1 + math.sqrt(0.5)) / 2, 4: 0.5, 8: 0}),
        ({"warmup_epochs": 4}, 10, {0: 0, 1: 0.25, 3.5: 0.875, 4: 1, 9: 1}),
        ({"name": "cosine", "warmup_epochs": 4}, 8, {2: (1 + math.sqrt(0.5)) / 4, 4: 0.5, 6: (1 - math.sqrt(0.5)) / 2}),
        ({"name": "step", "milestones": [1], "warmup_epochs": 2}, 4, {0.5: 0.25, 1: 0.05, 2: 0.1}),
    ],
)
def test_learning_rate(settings, epochs, factors):
    rate = LearningRate(**settings)
    assert {epoch: rate(epoch, epochs) for epoch in factors} == pytest.approx(factors)


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_linear_rate_is_transformers_own(warmup):
    transformers = pytest.importorskip("transformers")
    p = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([p], 1.0)
    theirs = transformers.get_linear_schedule_with_warmup(optimizer, warmup, 10)
    ours = LearningRate("linear", warmup_epochs=warmup)
    for step in range(10):
        assert ours(step, 10) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()
    assert ours(10, 10) == 0


@pytest.mark.parametrize(("name", "final", "cooldown"), [("cosine", 0.01, 3), ("poly", 0.2, 2), ("linear", 0.1, 4)])
def test_the_end_and_the_cooldown_are_timms(name, final, cooldown):
    scheduler = pytest.importorskip("timm.scheduler")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], 2.0)
    theirs = {
        "cosine": lambda: scheduler.CosineLRScheduler(optimizer, 12 - cooldown, lr_min=2 * final),
        "poly": lambda: scheduler.PolyLRScheduler(optimizer, 12 - cooldown, power=0.9, lr_min=2 * final),
        "linear": lambda: scheduler.PolyLRScheduler(optimizer, 12 - cooldown, power=1.0, lr_min=2 * final),
    }[name]()
    ours = LearningRate(name, final=final, cooldown_epochs=cooldown)
    for epoch in range(13):
        assert 2 * ours(epoch, 12) == pytest.approx(theirs._get_lr(epoch)[0], abs=1e-12), epoch


def test_learning_rate_moves_every_step_to_the_end_of_a_shortened_training():
    """A cosine over the 4 of 6 steps that are taken, and each group's own base rate."""
    objective = Objective(None, network(1))
    first, *rest = objective.trainable_parameters()
    optimizer = torch.optim.SGD([{"params": [first], "lr": 1.0}, {"params": rest, "lr": 0.1}])
    trainer = Trainer(
        objective,
        Classification(),
        optimizer,
        Replay(objective),
        Batches(),
        Batches(),
        2,
        LearningRate("cosine"),
        max_steps=4,
    )
    for step, batch in enumerate([*Batches().epoch(0), *Batches().epoch(1)][:4]):
        trainer.train_step(batch)
        factor = (1 + math.cos(math.pi * step / 4)) / 2
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([factor, 0.1 * factor])


# Against plain PyTorch

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "adamw": lambda params: torch.optim.AdamW(params, 1e-2),
}


def plain_loop(epochs, with_terms, optimizer, clip_norm, clip_by, steps):
    """The training as anybody would write it; gives student and terms."""
    teacher, student = network(0).eval(), network(1)
    feature = Projected()
    params = [*student.parameters(), *(feature.parameters() if with_terms else [])]
    optimizer = OPTIMIZERS[optimizer](params)
    base, step = optimizer.param_groups[0]["lr"], 0
    torch.manual_seed(77)
    for epoch in range(epochs):
        for batch in Batches().epoch(epoch):
            x, y = batch.inputs, batch.target
            if step == steps:
                return student, feature
            for group in optimizer.param_groups:
                group["lr"] = base * (0.1 if epoch >= 1 else 1.0)
            hidden = student[:3](x)
            output = student[3:](hidden)
            loss = F.cross_entropy(output, y)
            if with_terms:
                with torch.no_grad():
                    target_hidden, target = teacher[:3](x), teacher(x)
                loss = loss + (0.5 * feature(hidden, target_hidden) + 0.25 * F.mse_loss(output, target))
            optimizer.zero_grad()
            loss.backward()
            if clip_norm and clip_by == "all":
                nn.utils.clip_grad_norm_(params, clip_norm)
            elif clip_norm:
                nn.utils.clip_grad_norm_(student.parameters(), clip_norm)
                nn.utils.clip_grad_norm_(feature.parameters(), clip_norm)
            optimizer.step()
            step += 1
    return student, feature


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("with_terms", "clip_norm", "clip_by", "steps"),
    [
        (False, None, "all", None),
        (True, None, "all", None),
        (True, 0.3, "all", None),
        (True, 0.02, "module", None),
        (False, None, "all", 4),
        (True, None, "all", 3),
    ],
)
def test_training_is_the_plain_loop_bit_for_bit(optimizer, with_terms, clip_norm, clip_by, steps):
    """Evaluation after every epoch included: it draws no random numbers and moves no statistics."""
    trainer = build(
        with_terms,
        epochs=2,
        optimizer=OPTIMIZERS[optimizer],
        clip_norm=clip_norm,
        clip_by=clip_by,
        max_steps=steps,
        learning_rate=LearningRate("step", [1]),
    )
    torch.manual_seed(77)
    trainer.fit()
    student, feature = plain_loop(2, with_terms, optimizer, clip_norm, clip_by, steps)
    assert trainer.step == (steps or 6)
    found = trainer.objective.student.model.state_dict()
    for name, truth in student.state_dict().items():
        assert torch.equal(found[name], truth), name
    if with_terms:
        assert torch.equal(trainer.objective.terms[0].loss.conv.weight, feature.conv.weight)


def test_clipping_bites_in_the_test_above():
    trainer = build(True, clip_norm=0.3)
    before = [p.detach().clone() for p in trainer.objective.trainable_parameters()]
    trainer.train_step(next(Batches().epoch(0)))
    moved = sum((p - b).square().sum() for p, b in zip(trainer.objective.trainable_parameters(), before, strict=True))
    assert moved.sqrt().item() == pytest.approx(0.1 * 1.9 * 0.3, rel=1e-4)  # lr · (1 + momentum) · largest norm


def test_clipping_by_module_bites_in_each():
    trainer = build(True, clip_norm=0.02, clip_by="module")
    modules = [trainer.objective.student, *trainer.objective.terms]
    before = [[p.detach().clone() for p in module.parameters()] for module in modules]
    trainer.train_step(next(Batches().epoch(0)))
    moved = [
        sum(((p - b).square().sum() for p, b in zip(module.parameters(), old, strict=True)), torch.zeros(())).sqrt()
        for module, old in zip(modules, before, strict=True)
    ]
    assert [m.item() for m in moved] == pytest.approx([0.1 * 1.9 * 0.02, 0.1 * 1.9 * 0.02, 0], rel=1e-4)


# Evaluation


@pytest.mark.parametrize("mode", [True, False])
def test_evaluation_runs_in_eval_mode_and_restores_the_mode(mode):
    trainer = build(True)
    trainer.train_step(next(Batches().epoch(0)))
    model = trainer.objective.student.model
    trainer.objective.train(mode)
    before = copy.deepcopy(model)
    metrics = trainer.test()
    assert all(m.training is mode for m in model.modules())
    assert not any(m.training for m in trainer.objective.teacher.model.modules())
    for found, truth in zip(model.buffers(), before.buffers(), strict=True):
        assert torch.equal(found, truth)

    batches = list(Batches(seed=1).epoch(0))
    x, y = torch.cat([b.inputs for b in batches]), torch.cat([b.target for b in batches])
    output = before.eval()(x)
    assert metrics["accuracy"] == pytest.approx(100 * (output.argmax(1) == y).float().mean().item())
    assert metrics["top5"] == 100  # of four classes
    assert metrics["loss"] == pytest.approx(F.cross_entropy(output, y).item(), rel=1e-5)


def test_history_and_result():
    """The last epoch is the result, the best one stands beside it."""
    trainer = build(epochs=5, evaluate_every=2)
    accuracies = iter([70.0, 90.0, 80.0])
    trainer.test = lambda: {"accuracy": next(accuracies)}
    result = trainer.fit()
    assert [(row["epoch"], row["step"], row["accuracy"]) for row in trainer.history] == [
        (2, 6, 70),
        (4, 12, 90),
        (5, 15, 80),  # the end is always evaluated
    ]
    assert {name: result[name] for name in ("epoch", "step", "accuracy", "best_accuracy")} == {
        "epoch": 5,
        "step": 15,
        "accuracy": 80,
        "best_accuracy": 90,
    }
    assert result["seconds"] > 0


@pytest.mark.parametrize(("max_steps", "total"), [(None, 6), (1, 1), (3, 3), (5, 5), (6, 6), (100, 6)])
def test_max_steps_ends_a_training_and_evaluates_it(max_steps, total):
    trainer = build(max_steps=max_steps)
    result = trainer.fit()
    assert trainer.step == trainer.total_steps == total
    assert (result["step"], result["epoch"]) == (total, math.ceil(total / 3))
    assert trainer.fit() == result  # nothing is left to be done


# Numbers on the way


def rows_of(folder, **options):
    torch.manual_seed(0)
    trainer = build(True, **options)
    with Tracker(folder, tensorboard=False) as trainer.tracker:
        trainer.fit()
    return trainer, read_metrics(folder)


def test_logged_rows(tmp_path):
    """Means since the last row, every ``log_every`` steps and at the end of an epoch; test metrics by epoch."""
    _, single = rows_of(tmp_path / "single", log_every=1, learning_rate=LearningRate("step", [1]))
    trainer, rows = rows_of(tmp_path / "means", log_every=2, learning_rate=LearningRate("step", [1]))
    each = {row["step"]: row for row in single if "lr" in row}
    train = [row for row in rows if "lr" in row]
    assert list(each) == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in train] == [2, 3, 4, 6]
    assert [row["epoch"] for row in train] == pytest.approx([2 / 3, 1, 4 / 3, 2])
    assert [row["lr"] for row in train] == pytest.approx([0.1, 0.1, 0.01, 0.01])
    for row, steps in zip(train, [(1, 2), (3,), (4,), (5, 6)], strict=True):
        for name in ("train/task_loss", "term/feature", "term/logits"):
            assert row[name] == pytest.approx(sum(each[step][name] for step in steps) / len(steps), rel=1e-5)
        assert row["images_per_second"] > 0
    tests = [{"step": row["step"], "accuracy": row["test/accuracy"]} for row in rows if "test/accuracy" in row]
    assert tests == [{"step": row["step"], "accuracy": row["accuracy"]} for row in trainer.history]


def test_a_logged_loss_is_that_before_the_step(tmp_path):
    _, rows = rows_of(tmp_path, log_every=1, max_steps=1)
    torch.manual_seed(0)
    objective = build(True).objective
    parts = objective(next(Batches().epoch(0)))[1]
    assert rows[0]["train/task_loss"] == pytest.approx(parts["task"].item(), rel=1e-6)
    assert rows[0]["term/feature"] == pytest.approx(parts["feature"].item(), rel=1e-6)


def test_divergence_is_said_and_the_last_good_checkpoint_kept(tmp_path):
    """A linear model under a squared loss, with a learning rate at which every step makes it worse."""
    student = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
    objective = Objective(None, student, task_loss=lambda output, y: (output - 1).square().mean())
    optimizer = torch.optim.SGD(student.parameters(), lr=10.0)
    trainer = Trainer(
        objective, Classification(), optimizer, Replay(objective), Batches(), Batches(), epochs=50, folder=tmp_path
    )
    with pytest.raises(UserError, match="diverged: the task loss is (nan|inf) at step [0-9]+ .*learning rate"):
        trainer.fit()
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert 0 < state["step"] < trainer.step
    assert all(torch.isfinite(value).all() for value in state["student"].values())


def test_divergence_names_the_loss_that_was_the_first(tmp_path):
    """In the second step of three; by the third, which ends the row of the log, nothing is finite."""

    class Exploding(Logits):
        calls = 0

        def forward(self, student, teacher, target=None, index=None):
            self.calls += 1
            return super().forward(student, teacher) * (1 if self.calls < 2 else math.inf)

    trainer = build(with_terms=True, folder=tmp_path)
    trainer.objective = Objective(network(0), network(1), [terms()[0], Term(Exploding(), "wild", weight=0.25)])
    trainer.optimizer = torch.optim.SGD(trainer.objective.trainable_parameters(), 0.1)
    trainer.weights = Replay(trainer.objective)
    with pytest.raises(UserError, match="the wild loss is inf at step 2 .*or leave that term out"):
        trainer.fit()
