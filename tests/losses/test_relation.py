"""Relation-based losses against independent truths: formulas written out sample by sample in float64, analytic
cases, and properties that their papers rely on. Golden numbers are in ``golden_response_relation.py``."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from distpro.losses import build_loss
from tests.losses.truth import build, close, mean_kl, randn, softmax


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _rotation(n):
    return torch.linalg.qr(randn(n, n))[0]


@pytest.mark.parametrize(
    ("name", "params", "scale"),
    [("rkd", {}, 3.0), ("pkt", {}, 3.0), ("sp", {}, 3.0), ("cc", {"form": "bilinear", "feat_dim": None}, 1.0)],
)
def test_relations_do_not_see_rotations_and_scale(name, params, scale):
    s, t = randn(6, 4), randn(6, 5)
    loss = build(name, **params)
    close(loss(scale * s @ _rotation(4), t), loss(s, t), rtol=1e-5, atol=1e-9)
    close(loss(t, scale * t @ _rotation(5)), 0.0, atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", ["rkd", "pkt", "sp"])
def test_relations_do_not_depend_on_the_order_of_the_batch(name):
    s, t, order = randn(6, 4), randn(6, 5), torch.randperm(6)
    close(build(name)(s[order], t[order]), build(name)(s, t))


def test_rkd_triangle():
    """Student: equilateral triangle; teacher: three points on a line, the middle one halfway."""
    s = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]], dtype=torch.float64)
    t = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    d_s, d_t = [1.0, 1.0, 1.0], [0.75, 0.75, 1.5]  # pairs 01, 12, 02 over their means
    distance = 2 * sum(0.5 * (a - b) ** 2 for a, b in zip(d_s, d_t, strict=True)) / 9
    a_t = {0: 1.0, 1: -1.0, 2: 1.0}  # cosine at each corner; 1/2 in the equilateral one
    angle = sum(2 * (0.5 * 0.5**2 if a == 1.0 else 1.5 - 0.5) for a in a_t.values()) / 27
    close(build("rkd", w_a=0.0)(s, t), 25 * distance)
    close(build("rkd", w_d=0.0)(s, t), 50 * angle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rkd_angles_are_those_of_the_edges(dtype):
    """Wide embeddings far from the origin, two of them the same, against unit vectors in float64; and finite gradients."""
    s = (randn(6, 300) + 5)[[0, 1, 2, 3, 4, 4, 5]].to(dtype).requires_grad_()
    t = randn(7, 300) + 5
    angles = []
    for e in (s.detach().double(), t):
        edges = F.normalize(e[None] - e[:, None], dim=2)
        angles.append(torch.einsum("jid,jkd->jik", edges, edges))
    loss = build("rkd", w_d=0.0)(s, t.to(dtype))
    close(loss.double(), 50 * F.smooth_l1_loss(*angles), rtol=1e-5 if dtype is torch.float32 else 1e-10, atol=0)
    loss.backward()
    assert s.grad.isfinite().all() and s.grad.abs().max() < 1


def test_sp_adds_up_over_levels():
    s, t = [randn(4, 3, 2, 2), randn(4, 5)], [randn(4, 2, 4, 4), randn(4, 7)]
    loss = build("sp")
    close(loss.levels(s, t), torch.stack([loss(a, b) for a, b in zip(s, t, strict=True)]))


def test_fsp_of_one_pixel_maps_is_the_difference_of_outer_products():
    s, t = [randn(2, 3, 1, 1), randn(2, 4, 1, 1)], [randn(2, 3, 1, 1), randn(2, 4, 1, 1)]
    g_s, g_t = (torch.einsum("ni,nj->nij", *(f[..., 0, 0] for f in x)) for x in (s, t))
    close(build("fsp")(s, t), (g_s - g_t).square().mean())
    close(build("fsp", form="norm")(s, t), (g_s - g_t).square().sum(1).sqrt().sum() / 2)


def test_cc_gaussian_kernel_approaches_the_radial_basis_function_on_unit_vectors():
    s, t = (F.normalize(randn(5, 3), dim=1) for _ in range(2))
    k_s, k_t = (torch.exp(-0.4 * torch.cdist(x, x).square()) for x in (s, t))
    loss = build("cc", form="gaussian", feat_dim=None, max_p=20)
    close(loss(s, t), (k_s - k_t).norm() / 25)


def test_crd_first_call_is_the_nce_loss_with_its_own_normalisation():
    loss = build("crd", [(3,)], [(4,)], n_data=20, feat_dim=5, nce_k=2)
    s, t, index = randn(2, 3), randn(2, 4), torch.tensor([[7, 1, 19], [3, 3, 0]])
    e_s, e_t = F.normalize(loss.embed_s(s), dim=1), F.normalize(loss.embed_t(t), dim=1)
    expected = 0.0
    for e, memory in ((e_s, loss.memory_t.clone()), (e_t, loss.memory_s.clone())):
        raw = [[math.exp((memory[j] @ e[n]).item() / 0.07) for j in index[n].tolist()] for n in range(2)]
        z, noise = 20 * sum(map(sum, raw)) / 6, 2 / 20
        for positive, *negatives in raw:
            expected -= math.log(positive / z / (positive / z + noise + 1e-7)) / 2
            expected -= sum(math.log(noise / (x / z + noise + 1e-7)) for x in negatives) / 2
    close(loss(s, t, index=index), expected)


def test_crd_bank_follows_the_batch_in_training_only():
    loss = build("crd", [(3,)], [(4,)], n_data=20, feat_dim=5, nce_k=4, nce_m=0.0)
    s, t, index = randn(2, 3), randn(2, 4), torch.tensor([7, 3])
    before = loss.memory_s.clone()
    loss.eval()(s, t, index=index)
    assert torch.equal(loss.memory_s, before)
    loss.train()(s, t, index=index)
    close(loss.memory_s[index], F.normalize(loss.embed_s(s), dim=1))
    close(loss.memory_t[index], F.normalize(loss.embed_t(t), dim=1))
    others = torch.ones(20, dtype=torch.bool).index_fill_(0, index, False)
    assert torch.equal(loss.memory_s[others], before[others])


def test_crd_negatives_are_uniform_over_the_other_classes():
    labels = torch.tensor([2, 0, 1, 0, 2, 2, 0, 2])
    loss = build_loss("crd", [(3,)], [(4,)], n_data=8, nce_k=40_000, labels=labels)
    drawn = loss.draw_negatives(torch.tensor([1, 2, 5]))
    for row, own in zip(drawn, (0, 1, 2), strict=True):
        allowed = labels != own
        counts = torch.bincount(row, minlength=8)
        assert counts[~allowed].sum() == 0
        share = 1 / allowed.sum().item()
        deviation = math.sqrt(share * (1 - share) / 40_000)
        assert (counts[allowed] / 40_000 - share).abs().max() < 5 * deviation


def test_crd_negatives_without_labels_come_from_everywhere():
    loss = build_loss("crd", [(3,)], [(4,)], n_data=8, nce_k=1000)
    assert loss.draw_negatives(torch.tensor([1])).unique().tolist() == list(range(8))


def test_crd_learns_to_tell_pairs_apart():
    loss = build_loss("crd", [(8,)], [(8,)], n_data=32, feat_dim=8, nce_k=16, labels=torch.arange(32))
    teacher = torch.randn(32, 8)
    student = teacher @ torch.randn(8, 8)
    optimizer = torch.optim.Adam(loss.parameters(), 0.02)
    for _ in range(60):
        value = loss(student, teacher, index=torch.arange(32))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    similarity = F.normalize(loss.embed_s(student), dim=1) @ F.normalize(loss.embed_t(teacher), dim=1).T
    assert (similarity.argmax(1) == torch.arange(32)).float().mean() > 0.9  # 1/32 by chance


def test_sskd_keeps_right_rows_and_the_best_of_the_wrong_ones():
    loss = build("sskd", tf_ratio=0.6, head=False)
    t = torch.full((8, 4), -9.0, dtype=torch.float64)
    for row, order in {
        1: [0, 1, 2, 3],
        2: [1, 2, 3, 0],
        3: [1, 0, 2, 3],
        5: [2, 1, 0, 3],
        6: [1, 0, 2, 3],
        7: [0, 2, 1, 3],
    }.items():
        t[row, order] = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    # ranks of label 0 in rows 1-3: 0, 3, 1; of label 1 in rows 5-7: 1, 0, 2; 0.6 of the four wrong rows are 2.4
    kept = [1, 3, 5, 6]
    s, rep = randn(8, 4), randn(8, 3)
    parts = loss.parts([s, rep], [t, rep], torch.tensor([0, 1]))
    close(parts[1], 16 * mean_kl(s[[0, 4]], t[[0, 4]], 4.0))
    close(parts[2], 16 * mean_kl(s[kept], t[kept], 4.0))
    close(parts[3], 0.0, atol=1e-12, rtol=0)


def test_sskd_first_stage_trains_the_teachers_head_and_the_second_leaves_it_alone():
    loss = build_loss("sskd", [(5,), (6,)], [(5,), (8,)])
    s, t = [torch.randn(8, 5), torch.randn(8, 6)], [torch.randn(8, 5), torch.randn(8, 8)]
    head = {id(p) for p in loss.head_t.parameters()}
    loss.pretrain(s, t).backward()
    assert {id(p) for p in loss.parameters() if p.grad is not None} == head
    loss.zero_grad(set_to_none=True)
    loss(s, t, target=torch.tensor([0, 1])).backward()
    assert {id(p) for p in loss.parameters() if p.grad is None} == head


def test_sskd_first_stage_is_the_cross_entropy_of_finding_the_own_image():
    loss = build("sskd", head=False)
    rep = randn(8, 3)
    plain, rotated = rep[[0, 4]], rep[[1, 2, 3, 5, 6, 7]]
    cos = [[F.cosine_similarity(r, p, dim=0).item() for p in plain] for r in rotated]
    expected = -sum(math.log(softmax(row)[n // 3]) for n, row in enumerate(cos)) / 6
    close(loss.pretrain([], [rep, rep]), expected)
