"""Hypergradients of models that are no image classifiers: label maps with void pixels, tokens with padding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distpro.batch import Batch
from distpro.losses import build_loss
from distpro.objective import Objective, Term
from distpro.search.estimators import ESTIMATORS, TrainingStep
from distpro.tasks import Segmentation
from distpro.train.state import no_trace, random_state
from pathways import build_pathways
from pathways.call import Call


class Dense(nn.Module):
    """(N, 3, H, W) → {"out": (N, 5, H, W), "aux": ...}, as torchvision's segmenters answer. Smooth."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, stride=2), nn.BatchNorm2d(width), nn.Tanh())
        self.out, self.aux = nn.Conv2d(width, 5, 1), nn.Conv2d(width, 5, 1)

    def forward(self, x):
        f = self.body(x)
        return {name: F.interpolate(getattr(self, name)(f), x.shape[2:]) for name in ("out", "aux")}


class Tokens(nn.Module):
    """Token ids (N, L) and their mask → {"last_hidden_state": (N, L, D), "logits": (N, L, 4)}: a tagger."""

    def __init__(self, width: int):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layer = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.LayerNorm(width))
        self.head = nn.Linear(width, 4)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        weights = attention_mask[..., None].to(x.dtype)
        x = x + (x * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        hidden = self.layer(x)
        return {"last_hidden_state": hidden, "logits": self.head(hidden)}


class Tagging:
    """A task of somebody's own: a label per token, −100 where there is none."""

    headline, higher_is_better = "loss", False

    def model_arguments(self, data):
        return {}

    def call(self, batch, training):
        return Call.of(batch.inputs)

    def loss(self, output, batch):
        return F.cross_entropy(output["logits"].transpose(1, 2), batch.target, ignore_index=-100)

    def response(self, output):
        return output["logits"]

    def labels(self, batch):
        return batch.target, batch.target != -100


def dense_batch(dtype):
    target = torch.randint(5, (4, 8, 8))
    target[torch.rand(4, 8, 8) < 0.3] = 255
    return Batch(torch.randn(4, 3, 8, 8, dtype=dtype), target, 4)


def token_batch(dtype):
    ids, lengths = torch.randint(11, (4, 10)), torch.tensor([10, 7, 4, 9])
    mask = torch.arange(10) < lengths[:, None]
    target = torch.randint(4, (4, 10)).masked_fill(~mask, -100)
    return Batch({"input_ids": ids, "attention_mask": mask.long()}, target, 4)


def dense(dtype):
    torch.manual_seed(0)
    teacher, student = Dense(8).to(dtype).eval(), Dense(6).to(dtype)
    batches = [dense_batch(dtype) for _ in range(4)]
    space = build_pathways(
        teacher, student, batches[0].inputs, ["body"], ["body"], transforms=["conv1x1"], distance="l2"
    )
    logits = [(5, 8, 8)]
    terms = [*space, *(Term(build_loss(n, logits, logits), n) for n in ("kd", "dkd", "dist", "cwd"))]
    terms.append(Term(build_loss("ifvd", [(6, 4, 4)], [(8, 4, 4)], num_classes=5), "ifvd", ["body"], ["body"]))
    return teacher, student, terms, Segmentation(), batches


def tokens(dtype):
    torch.manual_seed(0)
    teacher, student = Tokens(8).to(dtype).eval(), Tokens(6).to(dtype)
    batches = [token_batch(dtype) for _ in range(4)]
    space = build_pathways(
        teacher, student, batches[0].inputs, ["layer"], ["layer"], transforms=["tokens"], distance="l2"
    )
    shapes = [(10, 4)]
    terms = [*space, *(Term(build_loss(n, shapes, shapes), n) for n in ("kd", "dkd"))]
    terms.append(Term(build_loss("l2", [(10, 6)], [(10, 8)]), "l2", ["layer"], ["layer"]))
    return teacher, student, terms, Tagging(), batches


def estimate(make, name, **params):
    """h of one step, two steps into a training."""
    teacher, student, terms, task, batches = make(torch.float64)
    objective = Objective(teacher, student, [t.double() for t in terms], batches[0].call, task=task)
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(objective.trainable_parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)
    weights = torch.rand(len(objective.entries), dtype=torch.float64) + 0.1
    estimator = ESTIMATORS.build(name, objective, optimizer, **params)
    for n, batch in enumerate(batches[:3]):
        optimizer.zero_grad()
        state = random_state(student)
        estimator.before_pass()
        done = objective.training_pass(batch, 2.0 * weights, capture=estimator.needs_views)
        done.loss.backward()
        theta = {p: p.detach().clone() for p in objective.trainable_parameters()}
        step = TrainingStep(batch, weights, 2.0, theta, state, done)
        if n == 2:
            estimator.before_step(step)
        optimizer.step()
    return estimator(step, [batches[3]])


@pytest.mark.slow
@pytest.mark.parametrize("make", [dense, tokens])
def test_all_estimators_agree(make):
    truth = estimate(make, "unrolled")
    assert (truth != 0).all()
    for name, params in (("forward_mode", {}), ("finite_difference", {"epsilon": 1e-4}), ("sweep", {"steps": 1})):
        found = estimate(make, name, **params)
        assert ((found - truth).norm() / truth.norm()).item() < 1e-6, name


@pytest.mark.parametrize("make", [dense, tokens])
def test_what_does_not_count_changes_nothing(make):
    """Labels of the void, and what stands at padded places, are read by no response loss and not by the task loss."""
    teacher, student, terms, task, (batch, *_) = make(torch.float64)
    response = [t.double() for t in terms if t.key in ("kd", "dkd", "dist")]
    objective = Objective(teacher, student, response, batch.call, task=task)
    weights = [1.0] * len(response)
    with no_trace(objective.student):
        known = objective.training_pass(batch, weights)
    _, counted = task.labels(batch)
    every = {name: value for name, value in zip(objective.keys, known.terms.tolist(), strict=True)}
    # by hand: the counted positions alone, as one batch of rows
    with no_trace(objective.student):
        output, _ = objective.run_student(batch)
    taught = objective.run_teacher(batch)["logits"]
    ours = task.response(output)
    if ours.dim() == 4:
        ours, taught = ours.movedim(1, -1), taught.movedim(1, -1)
    rows, theirs, labels = ours[counted], taught[counted], batch.target[counted]
    for term in response:
        assert every[term.key] == pytest.approx(term.loss(rows, theirs, target=labels).item(), rel=1e-6)
    assert not torch.isnan(known.loss)


def test_a_batch_of_void_pixels_teaches_nothing():
    teacher, student, terms, task, (batch, *_) = dense(torch.float32)
    objective = Objective(teacher, student, [t for t in terms if t.key in ("kd", "dkd")], batch.call, task=task)
    done = objective.training_pass(replace(batch, target=torch.full_like(batch.target, 255)), [1.0, 1.0])
    done.loss.backward()
    assert done.loss == 0 and all(p.grad is None or not p.grad.any() for p in student.parameters())
