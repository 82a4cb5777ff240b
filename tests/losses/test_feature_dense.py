"""Feature-based and dense losses against independent truths: formulas written out sample by sample in float64,
analytic cases, and properties that their papers rely on. Golden numbers are in ``golden_feature_dense.py``."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from distpro.losses import build_loss
from distpro.losses.ft import unit_distance
from distpro.losses.ofd import margin
from pathways.registry import UserError

LEVELS = [(6, 8, 8), (8, 4, 4), (10, 2, 2)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _inputs(shapes, batch=4, requires_grad=False, dtype=torch.float64):
    return [torch.randn(batch, *s, dtype=dtype, requires_grad=requires_grad) for s in shapes]


def _build(name, student, teacher, train=False, **params):
    return build_loss(name, student, teacher, **params).double().train(train)


def _pool_pair(s, t):
    size = [min(a, b) for a, b in zip(s.shape[-2:], t.shape[-2:], strict=True)]
    return F.adaptive_avg_pool2d(s, size), F.adaptive_avg_pool2d(t, size)


def _attention(f):
    """Attention map of one sample (C, H, W)."""
    a = (f**2).sum(0).flatten()
    return a / a.norm()


# --- levels and messages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["ab", "at", "cwd", "dab", "hint", "hcl", "ickd", "l2", "mgd", "nst", "ofd", "structured", "vid"]
)
def test_levels_are_independent_and_in_order(name):
    shapes = [(8, 8, 8), (8, 4, 4), (8, 2, 2)]
    loss = _build(name, shapes, shapes)
    student, teacher = _inputs(shapes), _inputs(shapes)

    def levels(teacher):
        torch.manual_seed(1)
        return loss.levels(student, teacher)

    before = levels(teacher)
    after = levels([teacher[0], torch.randn_like(teacher[1]), teacher[2]])
    assert (before == after).tolist() == [True, False, True]
    torch.manual_seed(1)
    torch.testing.assert_close(loss(student, teacher), before.sum())


@pytest.mark.parametrize("name", ["at", "hint", "review"])
def test_unequal_numbers_of_levels_are_refused(name):
    with pytest.raises(UserError, match="got 3"):
        build_loss(name, LEVELS, LEVELS)(_inputs(LEVELS), _inputs(LEVELS[:2]))


@pytest.mark.parametrize(
    ("name", "student", "teacher", "params", "message"),
    [
        ("hint", [(4, 8, 8)], [(4,)], {}, r"\(C, H, W\)"),
        ("hint", [], [], {}, "one student shape per teacher shape"),
        ("at", [(9, 4)], [(9, 4)], {}, r"\(C, H, W\), got \(9, 4\)"),
        ("ft", [(4, 8, 8)] * 2, [(4, 8, 8)] * 2, {}, "one tensor per model, got 2"),
        ("kdsvd", [(4, 8, 8)] * 2, [(4, 8, 8), (5, 8, 8)], {}, "equal channel"),
        ("hcl", [(4, 8, 8)], [(5, 8, 8)], {}, "equal channel"),
        ("l2", [(9, 4)], [(10, 4)], {}, "cannot compare"),
        ("at", [], [], {"form": "papr"}, "paper"),
        ("ft", [(4, 8, 8)], [(4, 8, 8)], {"form": "flatt"}, "did you mean 'flat'"),
        ("ft", [(4, 8, 8)], [(4, 8, 8)], {"p": 3}, "p must be 1 or 2"),
        ("ktaad", [(4, 8, 8)], [(4, 8, 8)], {"p": 3}, "p must be 1 or 2"),
        ("mgd", [(4, 8, 8)], [(4, 8, 8)], {"mask": "chanel"}, "did you mean 'channel'"),
        ("mgd", [(4, 8, 8)], [(4, 8, 8)], {"ratio": 1.0}, "below 1"),
        ("ofd", [(4, 8, 8)], [(5, 8, 8)], {"margins": [torch.zeros(4)]}, r"\[5\] channels.* got \[4\]"),
        ("structured", [(4, 8, 8)], [(4, 8, 8)], {"scale": 0}, "scale"),
        ("ifvd", [(4, 8, 8)], [(4, 8, 8)], {}, "num_classes"),
        ("afd", [(4, 8, 8)], [(4,)], {}, "feature maps"),
        ("simkd", [(4, 8, 8)], [(5, 8, 8)], {"classifier": torch.nn.Linear(6, 3)}, "reads 6 features .* 5 channels"),
        ("semckd", [], [(4, 8, 8)], {}, "feature maps"),
        ("review", LEVELS, LEVELS, {"hcl": {"decoy": 1}}, "did you mean 'decay'"),
        ("review", LEVELS, LEVELS, {"hcl": "no"}, "true, false or a mapping"),
    ],
)
def test_wrong_use_is_explained(name, student, teacher, params, message):
    with pytest.raises(UserError, match=message):
        build_loss(name, student, teacher, **params)


# --- hint, at, vid, ab --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("student", "teacher", "kernel"),
    [((3, 32, 32), (5, 8, 8), (25, 25)), ((3, 8, 9), (5, 8, 4), (1, 6)), ((3, 4, 4), (5, 12, 12), (3, 3))],
)
def test_hint_regressor_follows_the_sizes(student, teacher, kernel):
    loss = _build("hint", [student], [teacher])
    s, t = _inputs([student]), _inputs([teacher])
    assert loss.regressors[0].conv.kernel_size == kernel
    expected = F.mse_loss(*_pool_pair(loss.regressors[0](s[0]), t[0]))
    torch.testing.assert_close(loss(s, t), expected)


def test_at_ignores_scale_and_odd_powers_take_absolute_values():
    loss = build_loss("at", p=3)
    s, t = _inputs([(4, 6, 6)])[0], _inputs([(7, 6, 6)])[0]
    torch.testing.assert_close(loss(s, t), loss(-5 * s, t))


def test_vid_starts_at_its_variance_and_learns_it():
    loss = _build("vid", LEVELS, LEVELS, variance=2.0)
    s, t = _inputs(LEVELS), _inputs(LEVELS)
    expected = [
        0.5 * (((g.regressor(a) - b) ** 2).mean() / 2 + math.log(2))
        for g, a, b in zip(loss.gaussians, s, t, strict=True)
    ]
    torch.testing.assert_close(
        loss.levels(s, t), torch.stack(expected), rtol=1e-6, atol=0
    )  # log_scale is made in float32
    assert [n for n, _ in loss.named_parameters() if "log_scale" in n] == [f"gaussians.{i}.log_scale" for i in range(3)]


def test_ab_is_zero_only_beyond_the_margin_on_the_teachers_side():
    shapes = [(2, 3, 3)]
    loss = build_loss("dab", shapes, shapes, margin=1.0)
    t = torch.randn(4, 2, 3, 3)
    assert loss(1.01 * t.sign(), t) == 0
    torch.testing.assert_close(loss(torch.zeros_like(t), t), torch.tensor(18.0))  # 18 neurons a sample, each margin^2
    torch.testing.assert_close(loss(-t.sign(), t), torch.tensor(72.0))


# --- ofd ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "bias"), [(1.0, 0.0), (-0.7, 0.4), (0.3, -0.5), (2.0, 5.0)])
def test_ofd_margin_is_the_mean_of_the_negative_part_of_a_gaussian(weight, bias):
    x = torch.linspace(bias - 12 * abs(weight), 0, 400_001, dtype=torch.float64)
    density = torch.exp(-(((x - bias) / weight) ** 2) / 2)
    expected = torch.trapezoid(x * density, x) / torch.trapezoid(density, x)
    found = margin(torch.tensor([weight], dtype=torch.float64), torch.tensor([bias], dtype=torch.float64))
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=0)


def test_ofd_margin_of_a_channel_that_is_never_negative():
    torch.testing.assert_close(margin(torch.tensor([0.5]), torch.tensor([10.0])), torch.tensor([-1.5]))


def test_ofd_takes_the_margin_from_the_batch_if_none_is_given():
    s, t = _inputs([(3, 4, 4)]), _inputs([(5, 8, 8)])
    negative = [c[c < 0].mean() for c in t[0].transpose(0, 1)]
    free = _build("ofd", [(3, 4, 4)], [(5, 8, 8)])
    given = _build("ofd", [(3, 4, 4)], [(5, 8, 8)], margins=[torch.stack(negative)])
    given.load_state_dict(free.state_dict(), strict=False)
    torch.testing.assert_close(free(s, t), given(s, t), rtol=1e-6, atol=0)  # margins are stored in float32


# --- ft, pad_l2, l2, simkd, mgd -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ft", "ktaad"])
def test_the_first_stage_trains_the_autoencoder_and_the_second_leaves_it_alone(name):
    loss = build_loss(name, [(6, 4, 4)], [(8, 4, 4)]).train()
    autoencoder = loss.paraphraser if name == "ft" else loss.translator
    own = {id(p) for p in autoencoder.parameters()}
    s, t = torch.randn(4, 6, 4, 4), torch.randn(4, 8, 4, 4)

    loss.pretrain(s, t).backward()
    assert {id(p) for p in loss.parameters() if p.grad is not None} == own
    loss.zero_grad(set_to_none=True)
    before = {k: v.clone() for k, v in autoencoder.state_dict().items()}
    loss(s, t).backward()
    assert {id(p) for p in loss.parameters() if p.grad is None} == own
    assert all(torch.equal(before[k], v) for k, v in autoencoder.state_dict().items())


def test_pad_learns_the_squared_error_as_its_variance():
    loss = _build("pad_l2", [(6,)], [(6,)], eps=0.0)
    s, t = _inputs([(6,)])[0], _inputs([(6,)])[0]
    v = ((s - t) ** 2).log().requires_grad_()
    value = loss.distance(s, t, v)
    torch.testing.assert_close(value, 1 + v.mean())
    torch.testing.assert_close(torch.autograd.grad(value, v)[0], torch.zeros_like(v))


def test_pad_reads_maps_as_their_average_and_starts_with_l2():
    loss = _build("pad_l2", [(6, 4, 4)], [(8, 2, 2)])
    s, t = _inputs([(6, 4, 4)])[0], _inputs([(8, 2, 2)])[0]
    vector = _build("pad_l2", [(6,)], [(8,)])
    vector.load_state_dict(loss.state_dict())
    torch.testing.assert_close(loss(s, t), vector(s.mean((2, 3)), t.mean((2, 3))))
    torch.testing.assert_close(loss.pretrain(s, t), ((loss.project(s.mean((2, 3))) - t.mean((2, 3))) ** 2).mean())


@pytest.mark.parametrize(
    ("student", "teacher"), [((6,), (8,)), ((9, 6), (9, 8)), ((6, 8, 8), (8, 4, 4)), ((6, 2, 2), (6, 4, 4))]
)
def test_l2_is_the_squared_error_after_projection(student, teacher):
    loss = _build("l2", [student], [teacher])
    s, t = _inputs([student])[0], _inputs([teacher])[0]
    projected, expected = loss.project[0](s), t
    if len(student) == 3:
        projected, expected = _pool_pair(projected, t)
    torch.testing.assert_close(loss(s, t), ((projected - expected) ** 2).mean())


@pytest.mark.parametrize("sizes", [(4, 4), (8, 4), (4, 8)])
def test_simkd_error_and_prediction(sizes):
    classifier = torch.nn.Linear(8, 3, bias=sizes != (4, 4))
    loss = _build("simkd", [(6, sizes[0], sizes[0])], [(8, sizes[1], sizes[1])], classifier=classifier)
    s, t = _inputs([(6, sizes[0], sizes[0])])[0], _inputs([(8, sizes[1], sizes[1])])[0]
    source, expected = _pool_pair(s, t)
    projected = loss.projector(source)
    assert projected.min() == 0 and [m.out_channels for m in loss.projector if hasattr(m, "out_channels")] == [4, 4, 8]
    torch.testing.assert_close(loss(s, t), ((projected - expected) ** 2).mean())
    torch.testing.assert_close(loss.predict(s), classifier.double()(projected.mean((2, 3))))


def test_simkd_keeps_the_classifier_frozen_and_saves_it():
    shapes, classifier = ([(6, 4, 4)], [(8, 4, 4)]), torch.nn.Linear(8, 3)
    loss = build_loss("simkd", *shapes, classifier=classifier).eval()
    assert all(name.startswith("projector") for name, _ in loss.named_parameters())
    s = torch.randn(2, 6, 4, 4)
    expected = loss.predict(s)
    torch.nn.init.zeros_(classifier.weight)  # what becomes of the teacher afterwards does not matter
    restored = build_loss("simkd", *shapes, classifier=classifier).eval()
    restored.load_state_dict(loss.state_dict())
    torch.testing.assert_close(restored.predict(s), expected)


def test_simkd_without_a_classifier_does_not_predict():
    with pytest.raises(UserError, match="built without one"):
        build_loss("simkd", [(6, 4, 4)], [(8, 4, 4)]).predict(torch.randn(2, 6, 4, 4))


def test_mgd_without_mask_is_the_generation_error():
    loss = _build("mgd", [(6, 4, 4)], [(8, 4, 4)], ratio=0.0, alpha=0.5)
    s, t = _inputs([(6, 4, 4)])[0], _inputs([(8, 4, 4)])[0]
    generated = loss.generation[0](loss.align[0](s))
    torch.testing.assert_close(loss(s, t), 0.5 * ((generated - t) ** 2).sum() / 4)


@pytest.mark.parametrize(("mask", "ratio", "over"), [("channel", 0.15, (2, 3)), ("position", 0.75, (1,))])
def test_mgd_masks_whole_channels_or_positions_at_its_ratio(mask, ratio, over):
    loss = build_loss("mgd", [(64, 8, 8)], [(64, 8, 8)], mask=mask, ratio=ratio)
    seen = []
    loss.generation[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    loss(torch.ones(64, 64, 8, 8), torch.zeros(64, 64, 8, 8))
    kept = seen[0].amax(over)
    assert torch.equal(kept, seen[0].amin(over))  # all or nothing
    assert abs((1 - kept.mean()) - ratio) < 4 * math.sqrt(ratio * (1 - ratio) / kept.numel())


# --- afd, semckd, kdsvd -------------------------------------------------------------------------------------------


def test_afd_is_the_attention_weighted_error_of_attention_maps():
    teachers = [(7, 4, 4), (9, 4, 4)]
    loss = _build("afd", LEVELS, teachers, dim=5)
    student, teacher = _inputs(LEVELS), _inputs(teachers)
    expected = torch.zeros(len(teachers), dtype=torch.float64)
    for n in range(4):
        s, t = [f[n : n + 1] for f in student], [f[n : n + 1] for f in teacher]
        query = [q(f.mean((2, 3))) for q, f in zip(loss.query, t, strict=True)]
        key = [loss.bilinear(F.relu(k(f.mean((2, 3))))).view(2, 5) for k, f in zip(loss.key, s, strict=True)]
        for i, f_t in enumerate(t):
            logits = [
                (query[i][0] @ k[i] + loss.position_t[i] @ loss.position_s[j]) / math.sqrt(5) for j, k in enumerate(key)
            ]
            attention = torch.stack(logits).softmax(0)
            for j, f_s in enumerate(s):
                energy = F.adaptive_avg_pool2d((f_s[0] ** 2).mean(0, keepdim=True), f_t.shape[2:]).flatten()
                error = ((energy / energy.norm() - _attention(f_t[0])) ** 2).mean()
                expected[i] += attention[j].detach() * error / 4
    torch.testing.assert_close(loss.levels(student, teacher).detach(), expected)


def test_semckd_is_the_attention_weighted_projected_error():
    teachers = [(7, 8, 8), (9, 2, 2)]
    loss = _build("semckd", LEVELS, teachers, batch_size=8, soft=0.5)
    student, teacher = _inputs(LEVELS), _inputs(teachers)

    def embed(perceptron, f):  # a batch of 4 in rows of 8: the weights of absent samples do not matter
        rows = torch.stack([torch.stack([(a * b).sum() for b in f]) for a in f])
        hidden = F.relu(rows @ perceptron[0].weight[:, :4].T + perceptron[0].bias)
        out = hidden @ perceptron[2].weight.T + perceptron[2].bias
        return out / out.norm(dim=1, keepdim=True)

    query = [embed(q, f) for q, f in zip(loss.query, student, strict=True)]
    key = [embed(k, f) for k, f in zip(loss.key, teacher, strict=True)]
    expected = torch.zeros(2, dtype=torch.float64)
    for n, i in itertools.product(range(4), range(3)):
        attention = torch.stack([query[i][n] @ k[n] / 0.5 for k in key]).softmax(0)
        for j in range(2):
            s, t = _pool_pair(student[i], teacher[j])
            error = ((loss.regressors[i][j](s)[n] - t[n]) ** 2).mean()
            expected[j] += (attention[j] * error).detach() / (4 * 3)
    torch.testing.assert_close(loss.levels(student, teacher).detach(), expected)


def test_semckd_refuses_batches_beyond_its_size():
    loss = build_loss("semckd", [(4, 2, 2)], [(4, 2, 2)], batch_size=8)
    with pytest.raises(UserError, match="up to 8 samples, got 9"):
        loss(torch.randn(9, 4, 2, 2), torch.randn(9, 4, 2, 2))


def test_kdsvd_of_equal_maps_is_zero_and_ignores_rotations_of_positions():
    shapes = [(5, 4, 4), (6, 3, 3)]
    loss = build_loss("kdsvd", shapes, shapes, k=2)
    t = _inputs(shapes)
    torch.testing.assert_close(loss(t, t), torch.zeros((), dtype=torch.float64))
    mixed = [
        f.flatten(2) @ torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
        for f, n in zip(t, (16, 9), strict=True)
    ]
    s = [m.view_as(f) for m, f in zip(mixed, t, strict=True)]
    torch.testing.assert_close(loss(s, t), torch.zeros((), dtype=torch.float64))
    assert loss(_inputs(shapes), t) > 1e-3


def test_kdsvd_needs_two_levels():
    with pytest.raises(UserError, match="needs two or more per model, got 1"):
        build_loss("kdsvd")(torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3))


# --- dense --------------------------------------------------------------------------------------------------------


def test_ktaad_affinity_equals_the_distance_of_explicit_matrices():
    loss = _build("ktaad", [(6, 4, 4)], [(8, 4, 4)])
    s, t = _inputs([(5, 4, 4)])[0], _inputs([(5, 4, 4)])[0]
    s[0, 0] = 0  # a dead channel has a zero matrix
    expected = 0.0
    for a, b in zip(s.flatten(2).flatten(0, 1), t.flatten(2).flatten(0, 1), strict=True):
        a, b = a / a.norm().clamp(min=1e-12), b / b.norm()
        expected = expected + (torch.outer(a, a) - torch.outer(b, b)).norm() / 16 / 4
    torch.testing.assert_close(loss.affinity(s, t), expected)


def test_ktaad_is_the_weighted_sum_and_finite_at_its_minimum():
    loss = _build("ktaad", [(6, 4, 4)], [(8, 4, 4)], adaptation_weight=2.0, affinity_weight=3.0)
    s, t = _inputs([(6, 4, 4)])[0], _inputs([(8, 4, 4)])[0]
    code = loss.translator.encoder(t)
    adaptation = unit_distance(loss.feature_adapter(s), code, 1)
    expected = 2 * adaptation + 3 * loss.affinity(loss.affinity_adapter(s), code)
    torch.testing.assert_close(loss(s, t), expected)
    same = s.clone().requires_grad_()
    value = unit_distance(same, s, 2) + loss.affinity(same, s)
    assert value == 0 and torch.autograd.grad(value, same)[0].isfinite().all()


def test_ifvd_is_the_squared_difference_of_similarities_to_class_centres():
    loss = build_loss("ifvd", num_classes=3)
    s, t = _inputs([(5, 4, 4)], batch=2)[0], _inputs([(7, 4, 4)], batch=2)[0]
    labels = torch.randint(0, 3, (2, 4, 4))
    labels[0, 0] = 255
    expected = 0.0
    for f, g, y in zip(s, t, labels, strict=True):
        for i, j in itertools.product(range(4), range(4)):
            if y[i, j] == 255:
                continue
            members = y == y[i, j]
            similarity = [F.cosine_similarity(x[:, i, j], x[:, members].mean(1), dim=0) for x in (f, g)]
            expected = expected + (similarity[0] - similarity[1]) ** 2 / 32
    target = labels.repeat_interleave(3, 1).repeat_interleave(3, 2)
    torch.testing.assert_close(loss(s, t, target=target), expected, rtol=1e-5, atol=0)  # counts carry 1e-6


def test_ifvd_needs_a_label_map():
    loss = build_loss("ifvd", num_classes=3)
    with pytest.raises(UserError, match="got none"):
        loss(torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3))


def test_cwd_is_the_mean_divergence_of_channel_distributions():
    loss = build_loss("cwd", [(3, 4, 5)], [(3, 4, 5)], temperature=2.0)
    s, t = _inputs([(3, 4, 5)])[0], _inputs([(3, 4, 5)])[0]
    expected = 0.0
    for a, b in zip(s.flatten(0, 1), t.flatten(0, 1), strict=True):
        p, q = (b.flatten() / 2).softmax(0), (a.flatten() / 2).softmax(0)
        expected = expected + 4 * (p * (p / q).log()).sum() / 12
    torch.testing.assert_close(loss(s, t), expected)
    torch.testing.assert_close(loss(s + torch.randn(4, 3, 1, 1, dtype=torch.float64), t), expected)  # per-channel shift


@pytest.mark.slow
@pytest.mark.parametrize(("scale", "nodes"), [(0.5, 2), (0.3, 4), (0.01, 7)])
def test_structured_is_the_squared_difference_of_pairwise_cosines(scale, nodes):
    loss = build_loss("structured", scale=scale)
    s, t = _inputs([(5, 8, 8) if nodes != 7 else (5, 7, 7)])[0], _inputs([(6, 8, 8) if nodes != 7 else (6, 7, 7)])[0]
    window = max(1, int(s.shape[2] * scale))
    grid = [F.max_pool2d(f, window, ceil_mode=True).flatten(2) for f in (s, t)]
    assert grid[0].shape[2] == nodes**2
    expected = 0.0
    for n, a, b in itertools.product(range(4), range(nodes**2), range(nodes**2)):
        cosines = [F.cosine_similarity(g[n, :, a], g[n, :, b], dim=0) for g in grid]
        expected = expected + (cosines[0] - cosines[1]) ** 2 / (4 * nodes**4)
    torch.testing.assert_close(loss(s, t), expected, rtol=1e-6, atol=0)  # norms carry 1e-8
