"""What losses declare about rows, positions, masks, norms and deployment, and that they hold to it."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from distpro.losses import LOSSES, available_losses, build_loss
from distpro.losses.ft import unit_distance
from distpro.losses.ofd import margin
from pathways.registry import UserError
from tests.losses.examples_tokens import EXAMPLES as OF_TOKENS
from tests.losses.test_conformance import EQUAL_SIZES, EXAMPLES
from tests.losses.truth import build, close, randn

BY_POSITION = [n for n in available_losses() if LOSSES[n].by_position]
MASKED = [
    n for n in available_losses() if LOSSES[n].masked and n not in OF_TOKENS
]  # those: tests/losses/test_tokens.py
READ_LABELS = ["dkd", "dkd_nontarget", "dkd_target", "kd_logits", "ls", "tf_kd"]

# How a loss with several rows or a position per row is compared with other sizes: (student, teacher, mask) times this.
SCALES = pytest.mark.parametrize("scale", [(1, 1, 1), (2, 1, 1), (2, 1, 2), (1, 2, 1), (1, 2, 2)])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# The declarations


def test_which_losses_take_positions_and_masks():
    assert BY_POSITION == sorted(
        [
            "ctkd",
            "deit",
            "dist",
            "dkd",
            "dkd_nontarget",
            "dkd_target",
            "kd",
            "kd_logits",
            "logit_std",
            "ls",
            "mlkd",
            "skd",
            "tf_kd",
        ]
    )
    assert MASKED == sorted(
        ["ab", "at", "cwd", "dab", "ghnd", "hint", "hnd", "ickd", "ktaad", "l1", "l2", "mgd", "nst", "ofd", "vid"]
    )


@pytest.mark.parametrize("name", available_losses())
def test_declarations_are_of_their_kinds_and_agree(name):
    kind = LOSSES[name]
    assert kind.rows in ("first", "all") and kind.expand in ("", "rotations")
    assert kind.rows == "all" or not kind.expand
    assert not hasattr(kind, "views")
    assert not kind.by_position or (kind.taps == ("logits",) and not kind.masked)
    assert kind.deploys == hasattr(kind, "predict")
    assert isinstance(kind.uses_teacher, bool)
    calls = [kind.forward, kind.pretrain] if kind.pretrain_reads else [kind.forward]
    assert all(kind.masked == ("mask" in inspect.signature(call).parameters) for call in calls)


def test_rows_rotations_and_deployment_are_declared_by_those_that_want_them():
    assert [n for n in available_losses() if LOSSES[n].expand] == ["sskd"] and LOSSES["sskd"].rows == "all"
    assert [n for n in available_losses() if LOSSES[n].deploys] == ["simkd"]
    assert [n for n in available_losses() if not LOSSES[n].uses_teacher] == ["ls"]
    assert not build_loss("tf_kd", form="virtual").uses_teacher and build_loss("tf_kd").uses_teacher


# Rows of positions


@pytest.mark.parametrize("name", BY_POSITION)
def test_counted_positions_as_rows_are_dense_logits_without_the_others(name):
    loss, counts = build(name), torch.rand(2, 3, 4) > 0.4
    s, t = randn(2, 5, 3, 4, requires_grad=True), randn(2, 5, 3, 4)
    y = torch.where(counts, torch.randint(5, (2, 3, 4)), 255)
    rows = [x.movedim(1, -1)[counts] for x in (s, t)]
    value = loss(*rows, target=y[counts])
    (gradient,) = torch.autograd.grad(value, s)
    assert value.isfinite() and gradient.movedim(1, -1)[~counts].eq(0).all()
    one_by_one = [torch.stack([x[n, :, i, j] for n, i, j in counts.nonzero().tolist()]) for x in (s, t)]
    close(value, loss(*one_by_one, target=y[counts]))


@pytest.mark.parametrize("name", BY_POSITION)
def test_no_row_is_no_loss(name):
    s = torch.zeros(0, 5, requires_grad=True)
    value = build_loss(name)(s, torch.zeros(0, 5), target=torch.zeros(0, dtype=torch.int64))
    value.backward()
    assert value == 0 and s.grad.shape == (0, 5)


@pytest.mark.parametrize("name", READ_LABELS)
@pytest.mark.parametrize("void", [255, -100, 5])
def test_labels_that_are_no_class_are_named(name, void):
    s, y = torch.randn(2, 5, 3, 4), torch.randint(5, (2, 3, 4))
    y[0, 1] = void
    with pytest.raises(UserError, match=f"labels from 0 to 4, got {void}: leave void positions and padding out"):
        build_loss(name)(s, s, target=y)


def test_labels_of_mixtures_and_of_rotated_images_are_checked_too():
    s = torch.randn(3, 5)
    for loss in (build_loss("kd", ce_weight=0.1), build_loss("logit_std", of="dkd")):
        with pytest.raises(UserError, match="labels from 0 to 4, got 7"):
            loss(s, s, target=torch.tensor([0, 7, 1]))
    inputs = [torch.randn(8, 5), torch.randn(8, 6)]
    with pytest.raises(UserError, match="labels from 0 to 4, got -1, 9"):
        build_loss("sskd", head=False)(inputs, inputs, target=torch.tensor([9, -1]))
    with pytest.raises(UserError, match="one label per row of logits, got 2 for 3 rows"):
        build_loss("dkd")(s, s, target=torch.tensor([0, 1]))


@pytest.mark.parametrize("name", ["mlkd", "skd"])
def test_matrices_of_all_pairs_of_positions_are_refused(name):
    dense = torch.zeros(1).expand(2, 3, 128, 128)
    with pytest.raises(UserError, match="at most 16384 rows .* got 32768"):
        build_loss(name)(dense, dense)


# Masks


def _upsampled(mask, by):
    return mask.repeat_interleave(by, 1).repeat_interleave(by, 2)


class Masked:
    """A loss, tensors for it, and for each a map of what counts; the masks have one of the tensors' sizes."""

    def __init__(self, name: str, scale: tuple[int, int, int] = (1, 1, 1), dtype=torch.float64, fill: float = 0.5):
        by_s, by_t, by_mask = scale
        example = EXAMPLES[name]
        shapes = [
            [(c, h * by, w * by) for c, h, w in example[f"{side}_shapes"]]
            for side, by in (("student", by_s), ("teacher", by_t))
        ]
        self.loss = build_loss(name, *shapes, **example["params"])
        if dtype != torch.float32:
            self.loss.to(dtype)
        small = [torch.rand(4, *s[1:]) < fill for s in example["student_shapes"]]
        self.counts = [[_upsampled(m, by) for m in small] for by in (by_s, by_t)]
        self.masks = [_upsampled(m, by_mask) for m in small]
        self.student, self.teacher = ([torch.randn(4, *s, dtype=dtype) for s in side] for side in shapes)

    def __call__(self, masks=None, student=None, teacher=None):
        torch.manual_seed(1)  # of random masks
        tensors = (self.student if student is None else student), (self.teacher if teacher is None else teacher)
        given = masks
        if len(self.student) == 1:
            (student,), (teacher,), given = *tensors, masks and masks[0]
        else:
            student, teacher = tensors
        return self.loss(student, teacher, mask=given)

    def filled(self, value):
        """Student and teacher tensors with ``value`` wherever nothing counts."""
        return [
            [x.masked_fill(~m[:, None], value) for x, m in zip(side, counts, strict=True)]
            for side, counts in zip((self.student, self.teacher), self.counts, strict=True)
        ]


def _skip_unequal(name, scale):
    if name in EQUAL_SIZES and scale[0] != scale[1]:
        pytest.skip("reads maps of one size")


@pytest.mark.parametrize("name", MASKED)
@SCALES
def test_what_does_not_count_has_no_influence(name, scale):
    _skip_unequal(name, scale)
    case, found = Masked(name, scale), []
    for value in (0.0, -3.0, 1e30, float("inf"), float("nan")):
        student, teacher = case.filled(value)
        for s in student:
            s.requires_grad_()
        case.loss.zero_grad()
        loss = case(case.masks, student, teacher)
        loss.backward()
        own = [p.grad for p in case.loss.parameters() if p.grad is not None]
        found.append([loss.detach(), *(s.grad for s in student), *own])
        assert all((s.grad.movedim(1, -1)[~m] == 0).all() for s, m in zip(student, case.counts[0], strict=True))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)
    assert all(x.isfinite().all() for x in found[0]) and any(x.any() for x in found[0][1:])
    moved = [torch.where(m[:, None], s + 1, s) for s, m in zip(case.student, case.counts[0], strict=True)]
    assert case(case.masks, [s * m for s, m in zip(moved, moved, strict=True)]) != case(case.masks)


@pytest.mark.parametrize("name", MASKED)
@SCALES
def test_a_mask_that_is_true_everywhere_changes_nothing(name, scale):
    _skip_unequal(name, scale)
    case = Masked(name, scale, dtype=torch.float32, fill=1.1)
    results = []
    for masks in (None, case.masks, [None] * len(case.masks)):
        student = [s.clone().requires_grad_() for s in case.student]
        value = case(masks, student)
        results.append([value.detach(), *torch.autograd.grad(value, student)])
    torch.testing.assert_close(results[1], results[0], rtol=2e-6, atol=1e-9)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", MASKED)
def test_the_gradient_under_a_mask_is_the_derivative(name):
    case = Masked(name)

    def value(*student):
        return case(case.masks, list(student))

    assert torch.autograd.gradcheck(value, [s.requires_grad_() for s in case.student], fast_mode=True)


@pytest.mark.parametrize("name", MASKED)
def test_nothing_that_counts_is_finite(name):
    case = Masked(name, fill=-1.0)
    student = [s.requires_grad_() for s in case.student]
    value = case(case.masks)
    value.backward()
    assert value.isfinite() and all(s.grad is None or not s.grad.any() for s in student)


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_needs_no_value_on_the_host(name):
    with FakeTensorMode(allow_non_fake_inputs=True):
        case = Masked(name, dtype=torch.float32)
        for s in case.student:
            s.requires_grad_()
        case(case.masks).backward()


# Losses that treat a position by itself or all alike; layers of their own see one position, in evaluation mode.
CROPPED = sorted(set(MASKED) - {"ktaad", "mgd"})


@pytest.mark.parametrize("name", CROPPED)
def test_a_rectangle_that_counts_is_the_rectangle_alone(name):
    shapes = [(6, 8, 8)], [(6, 8, 8)]
    loss = build(name, *shapes).eval()
    s, t = randn(4, 6, 8, 8), randn(4, 6, 8, 8)
    mask = torch.zeros(4, 8, 8, dtype=torch.bool)
    mask[:, 2:7, 1:4] = True
    expected = loss(s[..., 2:7, 1:4], t[..., 2:7, 1:4])
    close(loss(s, t, mask=mask), expected)
    assert loss(s, t) != expected


def test_the_parts_of_ktaad_on_a_rectangle_are_those_of_the_rectangle():
    loss, s, t = build("ktaad", [(6, 8, 8)], [(6, 8, 8)]), randn(4, 6, 8, 8), randn(4, 6, 8, 8)
    mask = torch.zeros(4, 8, 8, dtype=torch.bool)
    mask[:, :5, :3] = True
    cut_s, cut_t = s[..., :5, :3], t[..., :5, :3]
    close(loss.affinity(s, t, mask), loss.affinity(cut_s, cut_t))
    for p in (1, 2):
        close(unit_distance(s, t, p, mask), unit_distance(cut_s, cut_t, p))


def test_ktaad_reconstructs_what_counts():
    loss = build("ktaad", [(6, 4, 4)], [(8, 4, 4)], code_weight=0.1).eval()
    t, mask = randn(3, 8, 4, 4), torch.rand(3, 4, 4) > 0.4
    seen = t * mask[:, None]
    code = loss.translator.encoder(seen)
    error = (loss.translator.decoder(code) - t).movedim(1, -1)[mask].square().mean()
    penalty = 0.1 * code.movedim(1, -1)[mask].abs().sum()
    close(loss.pretrain([], t, mask=mask), error + penalty)
    garbage = t.masked_fill(~mask[:, None], float("nan"))
    close(loss.pretrain([], garbage, mask=mask), error + penalty)


def test_the_first_stage_of_ab_takes_its_mask():
    case = Masked("ab")
    student, teacher = case.filled(float("nan"))
    close(case.loss.pretrain(student, teacher, mask=case.masks), case(case.masks))


def test_mgd_generates_from_what_counts_and_is_asked_for_that_alone():
    loss = build("mgd", [(6, 4, 4)], [(6, 4, 4)], ratio=0.0, alpha=0.5)
    s, t, mask = randn(3, 6, 4, 4), randn(3, 6, 4, 4), torch.rand(3, 4, 4) > 0.4
    error = (loss.generation[0](s * mask[:, None]) - t).movedim(1, -1)[mask]
    close(loss(s, t, mask=mask), 0.5 * error.square().sum() / 3)


def test_l2_of_tokens_is_over_those_that_count():
    loss = build("l2", [(7, 4)], [(7, 6)])
    s, t, mask = randn(3, 7, 4), randn(3, 7, 6), torch.arange(7) < torch.tensor([[3], [7], [1]])
    close(loss(s, t, mask=mask), (loss.project[0](s[mask]) - t[mask]).square().mean())


def test_pooling_to_a_common_size_is_over_what_counts():
    """A small position counts if one of its four does, and is the mean of those that do."""
    loss = build("l2", [(3, 4, 4)], [(3, 2, 2)])
    s, t, mask = randn(2, 3, 4, 4), randn(2, 3, 2, 2), torch.rand(2, 4, 4) > 0.7
    errors = []
    for n in range(2):
        for i in range(2):
            for j in range(2):
                rows, columns = slice(2 * i, 2 * i + 2), slice(2 * j, 2 * j + 2)
                window = mask[n, rows, columns]
                if window.any():
                    errors.append(s[n, :, rows, columns][:, window].mean(1) - t[n, :, i, j])
    assert 0 < len(errors) < 8
    close(loss(s, t, mask=mask), torch.stack(errors).square().mean())


def test_levels_take_a_mask_each():
    case = Masked("l2")
    both = case.loss.levels(case.student, case.teacher, mask=case.masks)
    second = case.loss.levels(case.student, case.teacher, mask=[None, case.masks[1]])
    plain = case.loss.levels(case.student, case.teacher)
    close(both.sum(), case(case.masks))
    assert second[0] == plain[0] != both[0] and second[1] == both[1] != plain[1]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, 8, 8, dtype=torch.bool), "one mask per tensor, got 1 for 2"),
        ([torch.ones(4, 8, 8), None], r"is bool, without its channels, got float32 \(4, 8, 8\)"),
        ([None, torch.ones(4, 1, 4, 4, dtype=torch.bool)], r"a tensor \(4, 8, 4, 4\) .* got bool \(4, 1, 4, 4\)"),
        ([torch.ones(3, 8, 8, dtype=torch.bool), None], r"got bool \(3, 8, 8\)"),
    ],
)
def test_wrong_masks_are_explained(mask, message):
    case = Masked("l2")
    with pytest.raises(UserError, match=message):
        case.loss(case.student, case.teacher, mask=mask)


def test_void_labels_keep_pixels_out_of_ifvd():
    """Without a mask: the labels say it, as do those of no class."""
    loss = build_loss("ifvd", num_classes=3)
    s, t, y = randn(2, 5, 4, 4), randn(2, 7, 4, 4), torch.randint(3, (2, 4, 4))
    y[0, :2], y[1, 0, 0], y[1, 0, 1] = 255, -1, 3
    void, found = (y < 0) | (y > 2), []
    for value in (0.0, 2.0, 1e30, float("nan")):
        f, g = (x.masked_fill(void[:, None], value) for x in (s, t))
        f.requires_grad_()
        loss_value = loss(f, g, target=y)
        found.append([loss_value.detach(), *torch.autograd.grad(loss_value, f)])
        assert (found[-1][1].movedim(1, -1)[void] == 0).all()
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)
    assert "num_classes" in LOSSES["ifvd"].needs


# Norms, and logits-like maps


def _norm(channels, affine=True):
    norm = nn.BatchNorm2d(channels, affine=affine)
    if affine:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    return norm


def test_ofd_takes_its_margins_from_the_norms_before_the_taps():
    shapes, norms = [(6, 4, 4), (6, 2, 2)], [_norm(6), _norm(6)]
    assert LOSSES["ofd"].needs == ("norms",)
    found, given = (
        build_loss("ofd", shapes, shapes, **params)
        for params in ({"norms": norms}, {"margins": [margin(n.weight, n.bias) for n in norms]})
    )
    assert (
        found.state_dict().keys() == given.state_dict().keys() and {"margin0", "margin1"} <= found.state_dict().keys()
    )
    assert torch.equal(found.margin1, given.margin1)
    assert not any(p is n.weight for p in found.parameters() for n in norms)  # the teacher's norms are only looked at


@pytest.mark.parametrize("norms", [[_norm(6), None], [_norm(6), _norm(6, affine=False)], [], None])
def test_ofd_takes_its_margins_from_the_batch_where_a_norm_is_missing(norms):
    shapes = [(6, 4, 4), (6, 2, 2)]
    loss = build_loss("ofd", shapes, shapes, norms=norms)
    assert not any(name.startswith("margin") for name in loss.state_dict())
    tensors = [torch.randn(2, *s) for s in shapes]
    assert loss(tensors, tensors).isfinite()


def test_ofd_prefers_margins_and_explains_norms_of_other_widths():
    given = build_loss("ofd", [(6, 4, 4)], [(6, 4, 4)], margins=[torch.full((6,), -2.0)], norms=[_norm(6)])
    assert (given.margin0 == -2).all()
    with pytest.raises(UserError, match=r"margins of \[6\] channels, one vector per level, got \[5\]"):
        build_loss("ofd", [(6, 4, 4)], [(6, 4, 4)], norms=[_norm(5)])


def test_ktaad_reads_class_scores_of_different_sizes_in_both_stages():
    """21 classes and a code of 10, as in the published recipe, with void pixels."""
    loss = build_loss("ktaad", [(21, 6, 6)], [(21, 12, 12)])
    assert loss.translator.encoder[-3].out_channels == loss.feature_adapter[0].out_channels == 10
    s, t = torch.randn(2, 21, 6, 6), torch.randn(2, 21, 12, 12)
    mask = torch.rand(2, 6, 6) > 0.3
    optimizer = torch.optim.SGD(loss.translator.parameters(), 0.1, momentum=0.9)
    first = last = None
    for _ in range(30):
        optimizer.zero_grad()
        last = loss.pretrain([], t, mask=mask)
        first = last.item() if first is None else first
        last.backward()
        optimizer.step()
    assert last.item() < 0.9 * first
    frozen = [p.clone() for p in loss.translator.parameters()]
    loss.zero_grad(set_to_none=True)
    loss(s, t, mask=mask).backward()
    assert all(p.grad is None and torch.equal(p, q) for p, q in zip(loss.translator.parameters(), frozen, strict=True))
    assert all(p.grad is not None for n, p in loss.named_parameters() if not n.startswith("translator"))
