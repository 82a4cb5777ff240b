"""A training loop of accelerate's kind takes an `Objective` as its model, as it is."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.data import DataLoader

from distpro import Objective, Schedule, Term
from distpro.losses import build_loss
from distpro.tasks import TextClassification
from pathways import build_pathways
from tests.test_padding import LAYERS, batch_of, model_of

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")


def samples():
    batch = batch_of(9)
    rows = {**batch.inputs, "labels": batch.target}
    return [{name: x[n] for name, x in rows.items()} for n in range(4)] * 3


def parts_of():
    """Objective, optimiser, loader and rate, as anybody makes them."""
    teacher, student = model_of(12, 1).float(), model_of(8, 0).float()
    torch.manual_seed(2)
    inputs = batch_of(9).inputs
    terms = [*build_pathways(teacher, student, inputs, LAYERS, LAYERS, "same", ["tokens"], "l2")]
    terms.append(Term(build_loss("kd", [(3,)], [(3,)], temperature=2.0), "kd"))
    objective = Objective(teacher, student, terms, example_input=inputs, task=TextClassification())
    keys = tuple(objective.keys)
    weights = torch.linspace(0.1, 1, 3 * len(keys)).reshape(3, len(keys))
    schedule = Schedule(keys, torch.zeros(len(keys), 3, dtype=torch.int64), weights.log(), weights)
    optimizer = torch.optim.AdamW(objective.trainable_parameters(), 1e-2)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6)
    return objective, optimizer, DataLoader(samples(), 4), rate, schedule


def train(objective, optimizer, loader, rate, backward, follow):
    follow(6)
    losses = []
    for _ in range(2):
        for batch in loader:
            labels = batch.pop("labels")
            loss, parts = objective(batch, labels)
            backward(loss)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
            losses.append({name: float(value) for name, value in parts.items()})
    return losses


@pytest.mark.slow
def test_it_trains_as_without(tmp_path):
    objective, optimizer, loader, rate, schedule = parts_of()
    start = copy.deepcopy(objective.student.model.state_dict())
    expected = train(
        objective, optimizer, loader, rate, lambda loss: loss.backward(), lambda n: objective.follow(schedule, n)
    )
    plain = objective.student.model.state_dict()

    given, optimizer, loader, rate, schedule = parts_of()
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer, loader, rate = accelerator.prepare(given, optimizer, loader, rate)
    own = accelerator.unwrap_model(model)
    assert own is given
    found = train(model, optimizer, loader, rate, accelerator.backward, lambda n: own.follow(schedule, n))
    assert found == expected and set(found[0]) == {"loss", "task", *given.keys}
    student = accelerator.unwrap_model(model).student.model
    assert all(torch.equal(plain[name], x) for name, x in student.state_dict().items())
    assert any(not torch.equal(plain[name], start[name]) for name in plain)

    student.save_pretrained(tmp_path)  # transformers' own, by accelerate's advice
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path, local_files_only=True)
    assert all(torch.equal(plain[name], x) for name, x in again.state_dict().items())
