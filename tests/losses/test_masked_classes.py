"""Classes that are not there, with logits of -inf or very low ones: as if they had been cut off, in value and gradient."""

from __future__ import annotations

import math

import pytest
import torch

from distpro.losses import build_loss
from tests.losses.truth import build, close, kl, randn, softmax

INF = math.inf
ROWS = [  # each row a loss of its own
    ("kd", {}), ("kd", {"ce_weight": 0.3}), ("kd_logits", {}), ("dkd", {}), ("dkd_target", {}), ("dkd_nontarget", {}),
    ("ctkd", {}), ("logit_std", {}), ("logit_std", {"of": "dkd"}), ("tf_kd", {}), ("tf_kd", {"form": "self", "alpha": 0.3}),
    ("ls", {}),
]  # fmt: skip
ALL = [
    *ROWS,
    ("tf_kd", {"form": "virtual"}),
    ("mlkd", {}),
    ("mlkd", {"standardize": True}),
    ("dist", {}),
    ("skd", {}),
    ("skd", {"form": "code"}),
]
BOTH = pytest.mark.parametrize(("name", "params"), ALL, ids=[f"{n}-{'-'.join(map(str, p.values()))}" for n, p in ALL])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def graded(loss, s, t, y):
    s = s.clone().requires_grad_()
    value = loss(s, t, target=y)
    return value, torch.autograd.grad(value, s)[0]


@BOTH
def test_a_class_that_both_mask_is_left_out(name, params):
    s, t, y = randn(6, 5), randn(6, 5), torch.arange(6) % 3
    if params.get("form") == "virtual":  # whose teacher's outputs depend on how many classes there are
        params = {**params, "correct": 1.0}
    expected, gradient = graded(build(name, **params), s[:, [0, 1, 2, 4]], t[:, [0, 1, 2, 4]], y)
    s[:, 3] = t[:, 3] = -INF
    value, masked_gradient = graded(build(name, **params), s, t, y)
    close(value, expected)
    close(masked_gradient[:, [0, 1, 2, 4]], gradient)
    assert (masked_gradient[:, 3] == 0).all()


@pytest.mark.parametrize(("name", "params"), ROWS)
def test_each_row_may_mask_others(name, params):
    s, t, y, out = randn(6, 5), randn(6, 5), torch.arange(6) % 2, 2 + torch.arange(6) % 3
    loss = build(name, **params)
    keep = [[k for k in range(5) if k != o] for o in out.tolist()]
    rows = [loss(s[i : i + 1, keep[i]], t[i : i + 1, keep[i]], target=y[i : i + 1]).detach() for i in range(6)]
    for x in (s, t):
        x.scatter_(1, out[:, None], -INF)
    value, gradient = graded(build(name, **params), s, t, y)
    close(value, torch.stack(rows).mean())
    assert gradient.isfinite().all()


MASKS = [-1e4, -65504.0, -1e9, torch.finfo(torch.float32).min, torch.finfo(torch.float32).min / 2]


@BOTH
@pytest.mark.parametrize("low", [*MASKS, torch.finfo(torch.float64).min])
def test_a_class_masked_by_a_low_number_is_left_out(name, params, low):
    s, t, y, kept = randn(6, 5), randn(6, 5), torch.arange(6) % 3, [0, 1, 2, 4]
    if params.get("form") == "virtual":
        params = {**params, "correct": 1.0}
    expected, gradient = graded(build(name, **params), s[:, kept], t[:, kept], y)
    s[:, 3] = t[:, 3] = low
    value, masked_gradient = graded(build(name, **params), s, t, y)
    close(value, expected)
    close(masked_gradient[:, kept], gradient)
    assert masked_gradient[:, 3].abs().max() < 1e-12
    single = build_loss(name, **params)
    value, masked_gradient = graded(single, s.float().clamp(min=MASKS[3]), t.float().clamp(min=MASKS[3]), y)
    close(value, expected, rtol=1e-5, atol=1e-6)
    close(masked_gradient[:, kept], gradient, rtol=1e-4, atol=1e-6)


@BOTH
def test_logits_that_are_only_small_are_not_masked(name, params):
    s, t, y = randn(6, 5), randn(6, 5), torch.arange(6) % 3
    before = build(name, **params)(s, t, target=y)
    s[:, 3] = t[:, 3] = -40.0
    cut = build(name, **params)(s[:, [0, 1, 2, 4]], t[:, [0, 1, 2, 4]], target=y)
    value = build(name, **params)(s, t, target=y)
    assert value.isfinite() and value != before
    if name in ("ls", "logit_std", "tf_kd", "dist"):  # whose value shows that the class is counted
        assert (value - cut).abs() > 1e-6


@BOTH
def test_the_derivative_by_the_logits_that_are_there(name, params):
    s, t, y = randn(6, 5), randn(6, 5), torch.arange(6) % 3
    t[:, 3] = -INF

    def value(there):
        whole = torch.cat([there[:, :3], there.new_full((6, 1), -INF), there[:, 3:]], 1)
        return build(name, **params)(whole, t, target=y)

    assert torch.autograd.gradcheck(value, s[:, :4].clone().requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("name", ["kd", "kd_logits", "dkd_nontarget", "ctkd", "tf_kd", "mlkd"])
def test_where_only_the_student_lacks_a_class_the_loss_is_infinite(name):
    s, t, y = randn(6, 5), randn(6, 5), torch.arange(6) % 3
    s[:, 4] = -INF
    assert build(name)(s, t, target=y) == INF


def test_where_only_the_teacher_lacks_a_class_it_has_probability_0():
    s, t = randn(6, 5), randn(6, 5)
    t[:, 4] = -INF
    expected = 0.0
    for row_s, row_t in zip(s.tolist(), t.tolist(), strict=True):
        expected += 16 * kl(softmax(row_t[:4], 4.0), softmax(row_s, 4.0)[:4]) / 6
    value, gradient = graded(build("kd"), s, t, None)
    close(value, expected)
    close(gradient, 4 * (torch.softmax(s / 4, 1) - torch.softmax(t / 4, 1)) / 6)


def test_a_label_that_only_the_student_lacks_is_infinite_and_one_that_both_lack_is_not_a_number_of_its_own():
    s, t, y = randn(2, 4), randn(2, 4), torch.tensor([3, 3])
    s[:, 3] = -INF
    assert build("dkd_target")(s, t, target=y) == INF
    t[:, 3] = -INF
    close(build("dkd_target")(s, t, target=y), 0.0)


# CTKD's temperature


@pytest.mark.parametrize(
    ("teacher", "student"),
    [(1e4, 1.0), (1e4, 1e4), (30.0, 1.0), (1.0, 1.0)],
)
def test_the_temperatures_gradient_of_sure_teachers(teacher, student):
    """Against the formula in float64, of logarithms that are taken from the logits."""
    s, t = randn(6, 5) * student, randn(6, 5) * teacher
    loss = build("ctkd")
    loss.step.fill_(loss.warmup_steps)  # the gradient's factor is -1
    loss(s, t).backward()

    def by_hand(theta):
        temperature = 1 + 20 * torch.sigmoid(theta)
        log_s, log_t = (x / temperature - torch.logsumexp(x / temperature, 1, keepdim=True) for x in (s, t))
        p = log_t.exp()
        return temperature**2 * (p * (log_t - log_s)).sum(1).mean()

    theta = torch.ones((), dtype=torch.float64, requires_grad=True)
    value = by_hand(theta)
    (expected,) = torch.autograd.grad(value, theta)
    assert expected.isfinite()
    temperature = 1 + 20 * torch.sigmoid(torch.ones(()))
    largest = max(torch.log_softmax(x / temperature, 1).abs().max() for x in (s, t))
    rounding = float(temperature**2 * largest)  # times eps: of T^2 (log p_t - log p_s), which partly cancel
    close(loss.theta.grad, -expected, rtol=1e-9, atol=rounding * torch.finfo(torch.float64).eps)
    single = build_loss("ctkd")
    single.step.fill_(single.warmup_steps)
    single(s.float(), t.float()).backward()
    close(single.theta.grad, -expected.float(), rtol=1e-5, atol=rounding * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("low", [-1e4, -INF])
def test_the_temperatures_gradient_with_masked_classes_is_that_without_them(low):
    s, t = randn(6, 5), randn(6, 5)
    found = []
    for width in (4, 5):
        loss = build("ctkd")
        loss.step.fill_(loss.warmup_steps)
        loss(s[:, :width], t[:, :width]).backward()
        found.append(loss.theta.grad)
        s[:, 4] = t[:, 4] = low
    close(found[1], found[0])


# Losses that read more than logits


@pytest.mark.parametrize("low", [-INF, -1e9])
def test_dense_logits_by_channel(low):
    loss, shapes = build("cwd", [(3, 4, 4)], [(3, 4, 4)]), (2, 3, 4, 4)
    s, t = randn(*shapes), randn(*shapes)
    parts = build("cwd", [(2, 4, 4)], [(2, 4, 4)])(s[:, :2], t[:, :2])
    s[:, 2] = t[:, 2] = low
    value, gradient = graded(loss, s, t, None)
    close(value, parts * 2 / 3)  # a mean over the channels, of which one adds nothing
    assert gradient.isfinite().all()
    t[:, :2, 0, 0] = s[:, :2, 0, 0] = low  # a position that neither has
    assert loss(s, t).isfinite()


@pytest.mark.parametrize("low", [-INF, -1e9])
def test_logits_beside_features(low):
    shapes = [(5,), (6, 4, 4)]
    for name in ("srd", "dist_plus"):
        loss = build(name, shapes, shapes)
        s, t = [randn(4, 5), randn(4, 6, 4, 4)], [randn(4, 5), randn(4, 6, 4, 4)]
        expected = loss([s[0][:, :4], s[1]], [t[0][:, :4], t[1]])
        s[0][:, 4] = t[0][:, 4] = low
        s[0].requires_grad_()
        value = loss(s, t)
        close(value, expected)
        assert torch.autograd.grad(value, s[0])[0].isfinite().all()
    loss = build("sskd", [(5,), (6,)], [(5,), (6,)])
    s, t, y = [randn(16, 5), randn(16, 6)], [randn(16, 5), randn(16, 6)], torch.arange(4)
    expected = loss([s[0][:, :4], s[1]], [t[0][:, :4], t[1]], target=y)
    s[0][:, 4] = t[0][:, 4] = low
    close(loss(s, t, target=y), expected)
