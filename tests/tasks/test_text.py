"""The text tasks' metrics against scikit-learn's and SciPy's, over batches and over processes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distpro.batch import Batch
from distpro.tasks import TASKS, TextClassification, TextRegression
from distpro.tasks.text import ClassCounts, Correlations, tokens_of
from pathways.registry import UserError


def batch_of(target, length=3):
    ids = torch.ones(len(target), length, dtype=torch.int64)
    return Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, target, len(target))


def classified(classes, sizes=(7, 1, 20, 12), seed=0):
    draw = torch.Generator().manual_seed(seed)
    found = []
    for size in sizes:
        target = torch.randint(classes, (size,), generator=draw)
        logits = torch.randn(size, classes, generator=draw) + torch.nn.functional.one_hot(target, classes)
        found.append((logits, batch_of(target)))
    return found


def scored(sizes=(7, 1, 20, 12)):
    """With ties in targets and predictions, which ranks have to share."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for size in sizes:
        target = (torch.rand(size, generator=draw) * 5).round(decimals=0)
        said = (target + torch.randn(size, generator=draw)).round(decimals=1)
        found.append((said[:, None], batch_of(target)))
    return found


def measured(make, pairs):
    metrics = make()
    for output, batch in pairs:
        metrics.update(output, batch)
    return metrics


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_class_metrics_are_scikit_learn_s(classes):
    sklearn = pytest.importorskip("sklearn.metrics")
    pairs = classified(classes)
    found = measured(ClassCounts, pairs).compute()
    target = np.concatenate([batch.target for _, batch in pairs])
    logits = np.concatenate([output for output, _ in pairs]).astype(float)
    said = logits.argmax(1)
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    truth = {
        "accuracy": 100 * sklearn.accuracy_score(target, said),
        "matthews": 100 * sklearn.matthews_corrcoef(target, said),
        "loss": sklearn.log_loss(target, probabilities),
    }
    truth |= {"f1": 100 * sklearn.f1_score(target, said)} if classes == 2 else {}
    assert found == pytest.approx(truth, rel=1e-6)


def test_one_prediction_for_all_has_no_correlation():
    sklearn = pytest.importorskip("sklearn.metrics")
    target = torch.tensor([0, 1, 1, 0])
    found = measured(ClassCounts, [(torch.tensor([[1.0, 0]] * 4), batch_of(target))]).compute()
    assert found["matthews"] == 100 * sklearn.matthews_corrcoef(target, [0] * 4) == 0
    assert found["f1"] == 0 and found["accuracy"] == 50


def test_score_metrics_are_scipy_s():
    stats = pytest.importorskip("scipy.stats")
    pairs = scored()
    found = measured(Correlations, pairs).compute()
    said = np.concatenate([output[:, 0] for output, _ in pairs]).astype(float)
    true = np.concatenate([batch.target for _, batch in pairs]).astype(float)
    assert len(set(true)) < len(true) and len(set(said)) < len(said)
    truth = {
        "pearson": 100 * stats.pearsonr(said, true).statistic,
        "spearman": 100 * stats.spearmanr(said, true).statistic,
        "loss": np.square(said - true).mean(),
    }
    assert found == pytest.approx(truth, rel=1e-9)


def test_scores_that_are_no_numbers():
    """Of the targets they are refused; of the answers no correlation is known."""
    (said, batch), *_ = scored()
    wrong = batch_of(torch.where(torch.arange(7) == 3, float("nan"), batch.target))
    with pytest.raises(UserError, match="there is a target that is no finite number"):
        measured(Correlations, [(said, wrong)])
    found = measured(Correlations, [(torch.where(torch.arange(7)[:, None] == 3, float("inf"), said), batch)]).compute()
    assert math.isnan(found["pearson"]) and math.isnan(found["spearman"])


@pytest.mark.parametrize(("make", "pairs"), [(ClassCounts, classified(3)), (Correlations, scored())])
def test_states_of_several_processes_are_one_pass(make, pairs):
    """Not the mean of their numbers: the parts are of other sizes."""
    parts = [measured(make, pairs[:1]), measured(make, pairs[1:]), make()]
    states = [part.state() for part in parts]
    merged = make()
    merged.merge(states)
    whole = measured(make, pairs).compute()
    assert merged.compute() == pytest.approx(whole, rel=1e-12)
    assert np.mean([part.compute()["loss"] for part in parts[:2]]) != pytest.approx(whole["loss"], rel=1e-3)
    empty = make()
    empty.merge([{}])
    assert empty.compute() == {}


def test_the_headline_of_each_set():
    assert TASKS.build("text").headline == "accuracy"
    assert {TASKS.build("text", headline=h).headline for h in ("matthews", "f1")} == {"matthews", "f1"}
    assert TASKS.build("text_regression").headline == "pearson"
    assert all(TASKS.build(name).higher_is_better for name in ("text", "text_regression"))


@pytest.mark.parametrize(
    ("task", "headline", "message"),
    [
        ("text", "mathews", "did you mean 'matthews'"),
        ("text", "pearson", "it is one of task 'text_regression'"),
        ("text_regression", "f1", "it is one of task 'text'"),
    ],
)
def test_wrong_headlines(task, headline, message):
    with pytest.raises(UserError, match=message):
        TASKS.build(task, headline=headline)


class Facts:
    num_classes, regression, vocabulary = 3, False, None


def test_data_of_another_kind_are_refused():
    with pytest.raises(UserError, match="the data have classes, not scores: task: text"):
        TextRegression().model_arguments(Facts())
    with pytest.raises(UserError, match="f1 is of two classes, the data have 3"):
        TextClassification("f1").model_arguments(Facts())
    scores = Facts()
    scores.regression = True
    assert TextRegression().model_arguments(scores) == {"num_classes": 1}
    with pytest.raises(UserError, match="the data have scores, not classes: task: text_regression"):
        TextClassification().model_arguments(scores)


def test_the_loss_of_scores():
    (said, batch), *_ = scored()
    truth = ((said[:, 0] - batch.target) ** 2).mean()
    assert torch.equal(TextRegression().loss(said, batch), truth)
    assert torch.equal(TextRegression().loss({"logits": said[:, 0]}, batch), truth)
    assert torch.equal(TextRegression().loss(said, batch_of(batch.target[:, None])), truth)
    with pytest.raises(UserError, match=r"one number per sample, got a response \(7, 2\)"):
        TextRegression().loss(said.expand(-1, 2), batch)
    with pytest.raises(UserError, match="scores"):
        TextRegression().loss(said, batch_of(torch.zeros(7, dtype=torch.int64)))


def test_which_tokens_are_no_padding():
    batch = batch_of(torch.tensor([0, 1]))
    batch.inputs["attention_mask"][1, 2:] = 0
    assert tokens_of(batch).tolist() == [[True, True, True], [True, True, False]]
    assert tokens_of(Batch(torch.zeros(2, 3), None, 2)) is None
