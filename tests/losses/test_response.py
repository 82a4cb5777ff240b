"""Response-based losses against independent truths: formulas written out sample by sample in float64, analytic
cases, and properties that their papers rely on. Golden numbers are in ``golden_response_relation.py``."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from distpro.losses import build_loss
from tests.losses.examples_response_relation import EXAMPLES
from tests.losses.truth import build, close, kl, mean_kl, randn, softmax


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


LOGIT_LOSSES = sorted(n for n, e in EXAMPLES.items() if e["student_shapes"] == [(5,)])


@pytest.mark.parametrize("name", LOGIT_LOSSES)
def test_dense_logits_are_samples_position_by_position(name):
    loss = build(name)
    s, t, y = randn(2, 5, 3, 4), randn(2, 5, 3, 4), torch.randint(5, (2, 3, 4))
    flat_s, flat_t = (
        torch.stack([x[n, :, i, j] for n in range(2) for i in range(3) for j in range(4)]) for x in (s, t)
    )
    close(loss(s, t, target=y), loss(flat_s, flat_t, target=y.flatten()))


@pytest.mark.parametrize(
    "name", sorted(set(LOGIT_LOSSES) - {"deit", "kd_logits", "tf_kd", "ls"})
)  # decisions, `deit`: none
def test_the_teachers_logits_are_a_minimum(name):
    loss = build(name)
    t, y = randn(6, 5), torch.randint(5, (6,))
    s = t.clone().requires_grad_()
    value = loss(s, t, target=y)
    (grad,) = torch.autograd.grad(value, s)
    close(value, 0.0, atol=1e-6, rtol=0)  # dist adds eps = 1e-8 to a product of norms of about 0.1
    close(grad, torch.zeros_like(s), atol=1e-6, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kd_and_its_mixture(temperature):
    s, t, y = randn(3, 4), randn(3, 4), torch.tensor([0, 3, 1])
    expected = temperature**2 * mean_kl(s, t, temperature)
    close(build("kd", temperature=temperature)(s, t), expected)
    mixed = build("kd", temperature=temperature, ce_weight=0.3)
    task = -sum(math.log(softmax(row)[label]) for row, label in zip(s.tolist(), y.tolist(), strict=True)) / 3
    close(mixed(s, t, target=y), 0.3 * task + 0.7 * expected)


def test_dkd_recombines_to_kd():
    """KL(p_t || p_s) = TCKD + (1 - p_t[y]) NCKD for each sample."""
    loss_t, loss_n = build("dkd_target"), build("dkd_nontarget")
    for _ in range(3):
        s, t, y = randn(1, 6), randn(1, 6), torch.randint(6, (1,))
        other = 1 - softmax(t[0].tolist(), 4.0)[y]
        close(build("kd")(s, t), loss_t(s, t, target=y) + other * loss_n(s, t, target=y))


def test_dkd_is_the_weighted_sum_of_its_parts():
    s, t, y = randn(6, 5), randn(6, 5), torch.randint(5, (6,))
    target, nontarget = (build(f"dkd_{part}", temperature=3.0)(s, t, target=y) for part in ("target", "nontarget"))
    whole = build("dkd", alpha=0.7, beta=2.5, temperature=3.0)(s, t, target=y)
    close(whole, 0.7 * target + 2.5 * nontarget)
    expected_target, expected_nontarget = 0.0, 0.0
    for row_s, row_t, label in zip(s.tolist(), t.tolist(), y.tolist(), strict=True):
        p, q = softmax(row_t, 3.0), softmax(row_s, 3.0)
        expected_target += 9 * kl([p[label], 1 - p[label]], [q[label], 1 - q[label]]) / 6
        others = [[x for k, x in enumerate(d) if k != label] for d in (p, q)]
        expected_nontarget += 9 * kl(*([x / sum(d) for x in d] for d in others)) / 6
    close(target, expected_target)
    close(nontarget, expected_nontarget)


@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "logit_std", "mlkd", "skd"])
def test_sure_predictions_stay_finite(name):
    s, t = torch.eye(4).mul(1e4).requires_grad_(), torch.eye(4).roll(1, 0).mul(1e4)
    value = build_loss(name)(s, t, target=torch.arange(4))
    value.backward()
    assert value.isfinite() and s.grad.isfinite().all()


def test_dist_ignores_scale_and_offset_of_probabilities():
    """One minus correlation is invariant to a s + b with a > 0 in each row; here with two classes, where every
    non-constant prediction of the right order is perfectly correlated between the classes."""
    s, t = torch.tensor([[0.1, 2.0], [1.0, 0.2]]), torch.tensor([[-3.0, 9.0], [0.6, 0.5]])
    close(build_loss("dist", gamma=0.0)(s, t), 0.0, atol=1e-6, rtol=0)
    close(build_loss("dist", gamma=0.0)(s, -t), 2.0)


def test_tf_kd_virtual_teacher_is_right_with_the_stated_probability():
    loss = build("tf_kd", form="virtual", correct=0.9)
    virtual = loss.virtual(randn(2, 5), torch.tensor([4, 0]))
    close(virtual, [[0.025] * 4 + [0.9], [0.9] + [0.025] * 4])


def test_logit_std_is_kd_of_standardised_logits_and_ignores_the_teachers_scale():
    s, t = randn(4, 5), randn(4, 5)

    def z(x):
        rows = [(row - row.mean()) / ((row - row.mean()).square().sum() / 4).sqrt() for row in x]
        return torch.stack(rows)

    loss = build("logit_std")
    close(loss(s, t), 4 * mean_kl(z(s), z(t), 2.0), rtol=1e-6, atol=0)
    close(loss(s, 7 * t + 3), loss(s, t), rtol=1e-6, atol=0)


def test_logit_std_of_dkd():
    s, t, y = 3 * randn(4, 5), randn(4, 5), torch.randint(5, (4,))
    z_s, z_t = ((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in (s, t))
    loss = build("logit_std", of="dkd", beta=2.0)
    close(loss(s, t, target=y), build("dkd", beta=2.0, temperature=2.0)(z_s, z_t, target=y), rtol=1e-6, atol=0)
    assert loss.needs_target and not build_loss("logit_std").needs_target


def test_ctkd_starts_at_the_published_temperature_and_is_kd_there():
    loss = build("ctkd")
    s, t = randn(4, 5), randn(4, 5)
    temperature = 1 + 20 / (1 + math.exp(-1))
    close(loss.temperature, temperature)
    close(loss(s, t), temperature**2 * mean_kl(s, t, temperature))


@pytest.mark.parametrize(("calls", "strength"), [(0, 0.0), (5, 0.5), (10, 1.0), (13, 1.0)])
def test_ctkd_reverses_the_gradient_by_the_temperature_with_growing_strength(calls, strength):
    loss = build("ctkd", warmup_steps=10)
    s, t = randn(4, 5), randn(4, 5)
    for _ in range(calls):
        loss(s, t)
    close(loss.reversal.double(), strength, atol=1e-6, rtol=0)

    def kd(theta):
        return build("kd", temperature=1 + 20 / (1 + math.exp(-theta)))(s, t).item()

    slope = (kd(1 + 1e-5) - kd(1 - 1e-5)) / 2e-5
    (grad,) = torch.autograd.grad(loss(s, t), loss.theta)
    close(grad, -strength * slope, rtol=1e-5, atol=1e-6)


def test_ctkd_counts_training_steps_only():
    loss = build_loss("ctkd")
    s, t = torch.randn(4, 5), torch.randn(4, 5)
    loss(s, t)
    with torch.no_grad():
        loss(s, t)
    loss.eval()(s, t)
    assert loss.step == 1 and "step" in loss.state_dict()


def test_mlkd_sums_three_levels_over_temperatures():
    s, t = randn(3, 4), randn(3, 4)
    expected = 0.0
    for temperature in (1.5, 4.0):
        p, q = ([softmax(row, temperature) for row in x.tolist()] for x in (s, t))
        expected += temperature**2 * mean_kl(s, t, temperature)
        for n in range(3):
            for m in range(3):
                dots = [sum(a * b for a, b in zip(x[n], x[m], strict=True)) for x in (p, q)]
                expected += (dots[0] - dots[1]) ** 2 / 3
        for k in range(4):
            for m in range(4):
                dots = [sum(row[k] * row[m] for row in x) for x in (p, q)]
                expected += (dots[0] - dots[1]) ** 2 / 4
    close(build("mlkd", temperatures=[1.5, 4.0])(s, t), expected)


def test_mlkd_standardises_the_logits_of_its_kl_part_alone():
    s, t = randn(3, 4), randn(3, 4)
    options = {"temperatures": [2.0]}
    plain, standardised = (build("mlkd", **options, standardize=on)(s, t) for on in (False, True))
    close(standardised - plain, build("logit_std")(s, t) - build("kd", temperature=2.0)(s, t))


@pytest.mark.parametrize("form", ["paper", "code"])
def test_skd_is_kl_and_the_mahalanobis_length_of_similarity_differences(form):
    s, t = randn(6, 5), randn(6, 5)
    d = torch.stack([F.cosine_similarity(s, a) - F.cosine_similarity(t, b) for a, b in zip(s, t, strict=True)])
    if form == "code":
        d = d / 5
    inverse = torch.linalg.inv(torch.cov(d.T) + 0.3 * torch.eye(6, dtype=torch.float64))
    direction = sum((row @ inverse @ row).sqrt() for row in d) / 6
    if form == "code":  # three of the five classes are at most the median
        direction = direction * 3 / 5
    instance = mean_kl(s, t, 2.0)
    if form == "code":  # three of the six samples are at most the median
        unsure = t.softmax(1).amax(1).argsort()[:3]
        instance = 4 * mean_kl(s[unsure], t[unsure], 2.0) / 2
    options = {"temperature": 2.0, "tikhonov": 0.3, "form": form}
    close(build("skd", **options, direction_weight=0.0)(s, t), instance)
    close(build("skd", **options, instance_weight=0.0)(s, t), direction)
    close(build("skd", **options, instance_weight=0.9, direction_weight=0.4)(s, t), 0.9 * instance + 0.4 * direction)


def test_ls_is_kd_from_a_uniform_teacher_up_to_a_constant():
    s, y = randn(6, 5, requires_grad=True), torch.randint(5, (6,))
    task, uniform = F.cross_entropy(s, y), build("kd", temperature=1.0)(s, torch.zeros(6, 5, dtype=torch.float64))
    value = build("ls", smoothing=0.2)(s, [], target=y)
    close(value, 0.8 * task + 0.2 * (uniform + math.log(5)))


def test_ghnd_adds_hnd_over_depths():
    shapes = [(3, 4, 4), (2, 2, 2)]
    s, t = [randn(2, *x) for x in shapes], [randn(2, *x) for x in shapes]
    single = [build("hnd", [x], [x])(a, b) for x, a, b in zip(shapes, s, t, strict=True)]
    close(single[0], sum((a - b) ** 2 for a, b in zip(s[0].flatten().tolist(), t[0].flatten().tolist(), strict=True)))
    close(build("ghnd", shapes, shapes).levels(s, t), torch.stack(single))


def test_dist_plus_adds_correlations_over_channels_and_over_samples():
    s, t = [randn(4, 5), randn(4, 3, 2, 2)], [randn(4, 5), randn(4, 3, 2, 2)]

    def rho(a, b):
        return torch.corrcoef(torch.stack([a, b]))[0, 1]

    positions = [(i, j) for i in range(2) for j in range(2)]
    channel = sum(rho(s[1][n, :, i, j], t[1][n, :, i, j]) for n in range(4) for i, j in positions) / 16
    spatial = sum(rho(s[1].sum(1)[:, i, j], t[1].sum(1)[:, i, j]) for i, j in positions) / 4
    logits = build("dist", beta=2.0, gamma=2.0, tau=1.5)(s[0], t[0])
    options = {"beta": 2.0, "gamma": 2.0, "tau": 1.5, "iota": 0.7, "kappa": 0.3}
    expected = logits + 0.7 * (1 - channel) + 0.3 * (1 - spatial)
    close(build("dist_plus", **options)(s, t), expected, rtol=1e-6, atol=0)
    reproduced = build("dist_plus", form="torchdistill", **options)
    close(reproduced(s, t), logits + 0.7 * channel + 0.3 * (1 - spatial), rtol=1e-6, atol=0)
    close(build("dist_plus")(t, t), 0.0, atol=1e-6, rtol=0)


def test_srd_is_the_log_of_summed_powers_and_kl():
    loss = build("srd", [(5,), (3, 2, 2)], [(5,), (4,)], exponent=3.0, temperature=2.0)
    s, t = [randn(6, 5), randn(6, 3, 2, 2)], [randn(6, 5), randn(6, 4)]

    def norm(z):
        return (z - z.mean(0)) / ((z - z.mean(0)).square().mean(0) + 1e-4).sqrt()

    z_s = norm(s[1].mean((2, 3)) @ loss.projector.weight.T + loss.projector.bias)
    feature = (z_s - norm(t[1])).abs().pow(3).sum().log()
    close(loss(s, t), 2 * feature + mean_kl(s[0], t[0], 2.0))
    assert {n for n, _ in loss.named_parameters()} == {"projector.weight", "projector.bias"}


def test_srrl_compares_embeddings_and_the_teachers_logits_of_them():
    classifier = torch.nn.Linear(4, 7).double()
    loss = build("srrl", [(3, 2, 2)], [(4,)], classifier=classifier)
    s, t = randn(6, 3, 2, 2), randn(6, 4)
    h = s.mean((2, 3)) @ loss.transfer[0].weight.T
    h = ((h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()).relu()
    expected = (h - t).square().mean() + (classifier(h) - classifier(t)).square().mean()
    close(loss(s, t), expected, rtol=1e-6, atol=0)  # the copy of the classifier passed through float32
    assert all(p.shape[0] == 4 for p in loss.parameters())  # the classifier is not trained
