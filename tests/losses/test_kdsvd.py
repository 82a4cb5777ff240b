"""KDSVD of maps whose singular values coincide: dead channels, constant maps, a pattern that two directions share."""

from __future__ import annotations

import pytest
import torch
from torch import linalg

from distpro.losses import build_loss
from distpro.losses.kdsvd import _distance, _kernel, _svd
from tests.losses.truth import build, close

SHAPES = [(8, 9, 7), (16, 5, 4)]
WIDE = [(8, 9, 7), (16, 3, 3)]  # fewer positions than channels


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def maps(shapes=SHAPES, n=6, dtype=torch.float64):
    """A teacher's, and a student's that agrees with it to a tenth, so that the leading vectors are matched."""
    teacher = [torch.randn(n, *x, dtype=dtype).relu() for x in shapes]
    return [(t + 0.1 * torch.randn_like(t)).relu() for t in teacher], teacher


def plain(student, teacher, k=1):
    """The loss as its definition has it, with PyTorch's decomposition as it is."""
    vectors = []
    for s, t in zip(student, teacher, strict=True):
        scale, v_t = _svd(t, k)
        _, v_s = _svd(s, k + 3)
        cosine = v_s.transpose(1, 2) @ v_t
        best = cosine.abs() == cosine.abs().amax(1, keepdim=True)
        vectors.append((v_s @ torch.where(best, cosine.sign(), 0.0) * scale[:, None], v_t * scale[:, None]))
    (s0, t0), (s1, t1) = vectors
    return _distance(_kernel(s1, s0), _kernel(t1, t0), torch.ones(len(s0), dtype=torch.bool))


def graded(loss, student, teacher):
    student = [s.clone().requires_grad_() for s in student]
    value = loss(student, teacher)
    return value.detach(), torch.autograd.grad(value, student)


@pytest.mark.parametrize("shapes", [SHAPES, WIDE])
@pytest.mark.parametrize("k", [1, 2])
def test_ordinary_maps_have_the_decompositions_value_and_derivative(shapes, k):
    student, teacher = maps(shapes)
    value, gradients = graded(build("kdsvd", shapes, shapes, k=k), student, teacher)
    expected, expected_gradients = graded(lambda s, t: plain(s, t, k), student, teacher)
    close(value, expected, rtol=1e-9, atol=0)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        close(ours, theirs, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("shapes", [SHAPES, WIDE])
def test_dead_channels_are_no_reason_to_leave_a_sample_out(shapes):
    """The value is the definition's, and the derivative that of the live channels alone."""
    student, teacher = maps(shapes)
    live = [0, 2, 3, 7]
    dead = [c for c in range(shapes[1][0]) if c not in live]
    student[1][:, dead] = 0
    value, gradients = graded(build("kdsvd", shapes, shapes), student, teacher)
    close(value, plain(student, teacher), rtol=1e-9, atol=0)

    def of_live(s):
        whole = torch.zeros_like(student[1])
        return plain([student[0], whole.index_copy(1, torch.tensor(live), s)], teacher)

    # the difference quotient of the definition's value, in a direction of the live channels
    direction, h = torch.randn_like(student[1][:, live]), 1e-6
    quotient = (of_live(student[1][:, live] + h * direction) - of_live(student[1][:, live] - h * direction)) / (2 * h)
    close((gradients[1][:, live] * direction).sum(), quotient, rtol=1e-5, atol=1e-9)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("shapes", [SHAPES, WIDE])
def test_the_derivative_is_that_of_the_value_where_channels_are_dead(shapes):
    student, teacher = maps(shapes, n=2)
    student[1][:, 5:] = 0  # as many live as there are candidates: which vector is matched does not jump
    loss = build("kdsvd", shapes, shapes)
    inputs = [s.requires_grad_() for s in student]
    assert torch.autograd.gradcheck(lambda *s: loss(list(s), teacher), inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shapes", [SHAPES, WIDE])
def test_samples_without_directions_of_their_own_are_left_out(shapes, dtype):
    """Of value and gradient; the others are what they are without them."""
    student, teacher = maps(shapes, dtype=dtype)
    loss = build_loss("kdsvd", shapes, shapes).to(dtype)
    rows, columns = student[1].shape[2] * student[1].shape[3], student[1].shape[1]
    two_alike = torch.eye(rows, columns, dtype=dtype).T.reshape(student[1][0].shape)  # all singular values are 1
    others = [x[1:] for x in student], [x[1:] for x in teacher]
    expected, expected_gradients = graded(loss, *others)
    for change in (torch.zeros_like(two_alike), two_alike, two_alike * 1e-30):
        student[1][0] = change
        value, gradients = graded(loss, student, teacher)
        close(value, expected * 5 / 6)
        for ours, theirs in zip(gradients, expected_gradients, strict=True):
            close(ours[1:], theirs * 5 / 6)
            assert (ours[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_1_samples_have_finite_gradients(dtype):
    """One pattern in all channels, or one channel alone, as after a ReLU in a dim image."""
    student, teacher = maps(dtype=dtype)
    student[0][0] = 1
    student[1][1, 1:] = 0
    student[1][2] = student[1][2, :1] * torch.rand(16, 1, 1, dtype=dtype)
    loss = build_loss("kdsvd", SHAPES, SHAPES).to(dtype)
    value, gradients = graded(loss, student, teacher)
    assert value.isfinite() and value > 0 and all(g.isfinite().all() for g in gradients)
    # where the pattern is the teacher's own leading one, it is matched, counts and has a gradient
    u, s, vh = linalg.svd(teacher[1].flatten(2).transpose(1, 2), full_matrices=False)
    student[1] = (u[:, :, :1] * s[:, None, :1] @ vh[:, :1]).transpose(1, 2).reshape(student[1].shape)
    student[0] = teacher[0] + 0.1
    value, gradients = graded(loss, student, teacher)
    assert value > 0 and all(g.isfinite().all() and g.flatten(1).any(1).all() for g in gradients)


def test_a_convolution_in_front_stays_a_number():
    conv = torch.nn.Conv2d(8, 16, 1)
    x = torch.randn(6, 8, 5, 4)
    with torch.no_grad():
        conv.bias[1:] = -3.0
        x[0] *= 0.1
    shapes = [(8, 5, 4), (16, 5, 4)]
    teacher = [torch.randn(6, *shape) for shape in shapes]
    build_loss("kdsvd", shapes, shapes)([x, conv(x).relu()], teacher).backward()
    assert conv.weight.grad.isfinite().all()
