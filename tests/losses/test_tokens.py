"""The losses of tokens against their formulas written out once more in float64, and their masks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from distpro.losses import build_loss
from pathways.registry import UserError
from tests.losses.examples_tokens import EXAMPLES

names = pytest.mark.parametrize("name", EXAMPLES)
LENGTHS = [5, 2, 4]


def inputs(name, length=5, samples=3, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    example = EXAMPLES[name]
    return [
        [torch.randn(samples, length, shape[1], generator=draw, dtype=dtype) for shape in example[f"{side}_shapes"]]
        for side in ("student", "teacher")
    ]


def built(name):
    torch.manual_seed(0)
    example = EXAMPLES[name]
    return build_loss(name, example["student_shapes"], example["teacher_shapes"], **example["params"]).double()


def mask_of(lengths, total):
    return torch.arange(total) < torch.tensor(lengths)[:, None]


def by_hand(name, loss, student, teacher, lengths):
    """Each sample by itself, without its padding, in plain loops."""
    total, weight = 0.0, 0
    for n, length in enumerate(lengths):
        s, t = ([x[n, :length] for x in side] for side in (student, teacher))
        if name == "tinybert":
            for a, b in zip(s, t, strict=True):
                total = total + (loss.project(a) - b).square().sum()
            weight += length * teacher[0].shape[-1]
        elif name == "tinybert_attention":
            for q in range(0, len(s), 2):
                for head in range(2):
                    pair = []
                    for side in (s, t):
                        size = side[q].shape[1] // 2
                        part = slice(head * size, (head + 1) * size)
                        pair.append(side[q][:, part] @ side[q + 1][:, part].T / math.sqrt(size))
                    total = total + (pair[0] - pair[1]).square().sum()
            weight += 2 * length**2
        else:
            own = 0.0
            for a, b in zip(s, t, strict=True):
                for head in range(2):
                    logs = []
                    for x in (a, b):
                        size = x.shape[1] // 2
                        x = x[:, head * size : (head + 1) * size]
                        logs.append((x @ x.T / math.sqrt(size)).log_softmax(1))
                    own = own + F.kl_div(logs[0], logs[1], log_target=True, reduction="sum") / (2 * length)
            total, weight = total + own, weight + 1
    return total / weight


@names
@pytest.mark.parametrize("lengths", [[5, 5, 5], LENGTHS], ids=["whole", "padded"])
def test_the_formula_once_more(name, lengths):
    loss, (student, teacher) = built(name), inputs(name)
    mask = None if lengths == [5, 5, 5] else [mask_of(lengths, 5)] * len(student)
    found = loss(student, teacher, mask=mask)
    assert found.item() == pytest.approx(by_hand(name, loss, student, teacher, lengths).item(), rel=1e-12)


@names
def test_padding_has_no_influence_on_value_or_gradient(name):
    """Whatever lies there, and however much of it there is."""
    loss, (student, teacher) = built(name), inputs(name)
    found = []
    for more in (0, 0, 3):
        s, t = (
            [F.pad(x, (0, 0, 0, more), value=math.nan).masked_fill(
                ~mask_of(LENGTHS, 5 + more)[..., None], 7.0 * len(found) - 3
            ) for x in side]
            for side in (student, teacher)
        )  # fmt: skip
        for x in s:
            x.requires_grad_()
        value = loss(s, t, mask=[mask_of(LENGTHS, 5 + more)] * len(s))
        value.backward()
        found.append((value.item(), [x.grad[:, :5] for x in s]))
        assert all((x.grad[~mask_of(LENGTHS, 5 + more)] == 0).all() for x in s)
    for value, gradients in found[1:]:
        assert value == pytest.approx(found[0][0], rel=1e-12)
        for ours, theirs in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


@pytest.mark.slow
@names
def test_the_gradient_under_a_mask_is_the_derivative_and_has_one_itself(name):
    loss, (student, teacher) = built(name), inputs(name)
    mask = [mask_of(LENGTHS, 5)] * len(student)
    for x in student:
        x.requires_grad_()
    assert torch.autograd.gradcheck(lambda *s: loss(list(s), teacher, mask=mask), student)
    assert torch.autograd.gradcheck(lambda *s: loss(list(s), teacher, mask=mask), student, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *s: loss(list(s), teacher, mask=mask), student)


@names
def test_a_mask_that_is_true_everywhere_changes_nothing(name):
    loss, (student, teacher) = built(name), inputs(name)
    whole = loss(student, teacher, mask=[torch.ones(3, 5, dtype=torch.bool)] * len(student))
    assert whole.item() == pytest.approx(loss(student, teacher).item(), rel=1e-12)


@names
def test_a_mask_needs_no_value_on_the_host(name):
    loss, (student, teacher) = built(name), inputs(name)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [[mode.from_tensor(x) for x in side] for side in (student, teacher)]
        mask = [mode.from_tensor(mask_of(LENGTHS, 5))] * len(student)
        assert loss(*fake, mask=mask).shape == ()


def test_attention_scores_of_a_mask_are_0_in_both():
    """TinyBERT's rule: at most -100. Here the queries and keys themselves are so large."""
    loss = build_loss("tinybert_attention", [(2, 1)] * 2, [(2, 1)] * 2, heads=[1, 1]).double()
    q, k = torch.tensor([[[1.0], [1.0]]]).double(), torch.tensor([[[2.0], [-101.0]]]).double()
    zero = torch.zeros_like(q)
    assert loss([q, k], [zero, zero]).item() == pytest.approx((4 + 0 + 4 + 0) / 4)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("tinybert", {"student_shapes": [(5, 6), (5, 7)]}, "one projection for all layers"),
        ("tinybert", {"student_shapes": [(5, 6)]}, "one student shape per teacher shape"),
        ("tinybert_attention", {"params": {}}, r"heads must be \[the student's, the teacher's\]"),
        ("tinybert_attention", {"params": {"heads": [2, 4]}}, "there are 2 and 4: loss minilm"),
        ("tinybert_attention", {"params": {"heads": [3, 3]}}, "3 heads do not divide the width 8"),
        (
            "tinybert_attention",
            {"student_shapes": [(5, 6)] * 3, "teacher_shapes": [(5, 8)] * 3},
            "queries and the keys",
        ),
        ("minilm", {"params": {"relations": 4}}, "4 heads do not divide the width 6"),
        ("minilm", {"teacher_shapes": [(5, 8)] * 2}, "name student_taps and teacher_taps"),
        ("minilm", {"teacher_shapes": [(8, 4, 4)] * 3, "params": {"relations": 1}}, r"reads tokens \(L, D\)"),
    ],
)
def test_wrong_use(name, changes, message):
    given = {**EXAMPLES[name], **changes}
    with pytest.raises(UserError, match=message):
        build_loss(name, given["student_shapes"], given["teacher_shapes"], **given["params"])
