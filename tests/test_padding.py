"""Padding changes no loss: the same texts in a longer batch give the same values, gradients and weights' derivatives.

Every registered loss that takes tokens at all is asked, by the objective, as a term is in a training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from distpro import Objective, Term
from distpro.batch import Batch
from distpro.losses import LOSSES, available_losses, build_loss
from distpro.tasks import TextClassification
from pathways import DISTANCES, UserError, build_pathways

transformers = pytest.importorskip("transformers")

LENGTHS = [9, 4, 7, 6]
LAYERS = ["bert.encoder.layer.0", "bert.encoder.layer.1"]
QKV = [f"{LAYERS[1]}.attention.self.{name}" for name in ("query", "key", "value")]
TAPS = {"minilm": QKV, "tinybert_attention": QKV[:2]}
PARAMS = {"minilm": {"relations": 2}, "tinybert_attention": {"heads": [2, 2]}}


def model_of(width, seed):
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).double()


def batch_of(longest):
    draw = torch.Generator().manual_seed(0)
    ids, mask = torch.zeros(4, longest, dtype=torch.int64), torch.zeros(4, longest, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        ids[row, :length], mask[row, :length] = torch.randint(5, 60, (length,), generator=draw), 1
    return Batch({"input_ids": ids, "attention_mask": mask}, torch.tensor([0, 1, 1, 2]), 4, torch.arange(4))


def measured(make_terms):
    """Loss of each term, and the gradients of the student, with little and with much padding."""
    found = []
    for longest in (9, 9, 17):
        student, teacher = model_of(8, 0), model_of(12, 1)
        torch.manual_seed(2)
        objective = Objective(
            teacher, student, make_terms(teacher, student), example_input=batch_of(9).inputs, task=TextClassification()
        ).double()
        batch = batch_of(longest)
        torch.manual_seed(3)
        done = objective.training_pass(batch, [1.0] * len(objective.entries))
        done.loss.backward()
        gradients = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
        found.append((done.terms.double(), done.loss.detach(), gradients))
    return found


def check(found):
    (terms, loss, gradients), again, padded = found
    assert torch.equal(terms, again[0])  # nothing in it is random
    assert terms.isfinite().all() and (terms != 0).all()
    torch.testing.assert_close(padded[0], terms, rtol=1e-6, atol=0)  # terms are kept in float32
    torch.testing.assert_close(padded[1], loss, rtol=1e-11, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(padded[2][name], gradient, rtol=1e-8, atol=1e-12, msg=name)


def of_tokens(name):
    """Builds the loss for tokens; None where it takes none."""
    taps = TAPS.get(name, LAYERS)
    for count in [len(taps)] if name in TAPS else [1, 2]:
        try:
            build_loss(name, [(9, 8)] * count, [(9, 12)] * count, **PARAMS.get(name, {}))
        except (UserError, TypeError):
            continue
        return lambda: (build_loss(name, [(9, 8)] * count, [(9, 12)] * count, **PARAMS.get(name, {})), taps[:count])
    return None


NOT_OF_TOKENS = {
    "cc": "a layer over all tokens, which build refuses for texts",
    "crd": "likewise",
    "dist_plus": "reads logits and a map",
    "fsp": "compares maps of neighbouring levels",
    "sskd": "reads logits",
}
TAKE_TOKENS = {
    name: of_tokens(name) for name in available_losses() if not LOSSES[name].by_position and name not in NOT_OF_TOKENS
}
TAKE_TOKENS = {name: build for name, build in TAKE_TOKENS.items() if build is not None}


@pytest.mark.parametrize("name", TAKE_TOKENS)
def test_no_loss_sees_padding(name):
    def terms(teacher, student):
        loss, taps = TAKE_TOKENS[name]()
        return [Term(loss.double(), name, taps, taps)]

    check(measured(terms))


@pytest.mark.slow
@pytest.mark.parametrize("distance", list(DISTANCES))
def test_no_pathway_sees_padding(distance):
    def terms(teacher, student):
        example = batch_of(9).inputs
        return [
            p.double() for p in build_pathways(teacher, student, example, LAYERS, LAYERS, "same", ["tokens"], distance)
        ]

    check(measured(terms))


def test_the_losses_that_take_tokens():
    assert set(TAKE_TOKENS) == {"l2", "minilm", "pkt", "rkd", "sp", "tinybert", "tinybert_attention"}


def test_response_losses_read_one_answer_per_text():
    check(measured(lambda teacher, student: [Term(build_loss("kd", [(3,)], [(3,)], temperature=2.0), "kd")]))


def test_without_the_mask_padding_would_be_seen():
    """What the tests above find is there to be found."""
    loss = build_loss("l2", [(9, 8)], [(9, 12)]).double()
    s, t = torch.randn(4, 9, 8).double(), torch.randn(4, 9, 12).double()
    longer = [F.pad(x, (0, 0, 0, 8)) for x in (s, t)]
    assert abs(loss(*longer) - loss(s, t)) > 0.1 * loss(s, t)
