"""Distances against transcriptions of their definitions in float64, and the hierarchical loss against golden numbers."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pathways import DISTANCES, UserError

GOLDEN = Path(os.environ.get("DISTPRO_GOLDEN", Path(__file__).resolve().parents[3] / "shared" / "golden")) / "hcl.npz"

MAPS = [
    (2, 5, 16, 16),
    (3, 4, 7, 7),
    (2, 3, 8, 5),
    (2, 3, 3, 9),
    (2, 4, 4, 4),
    (2, 4, 2, 2),
    (2, 4, 1, 1),
    (2, 3, 14, 6),
]
TOKENS = (3, 9, 6)


def pair(shape, dtype=torch.float64, closeness=1.0, seed=0):
    """A target and something at a relative distance of about ``closeness`` from it."""
    generator = torch.Generator().manual_seed(seed)
    target, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return (target + closeness * noise).to(dtype), target.to(dtype)


def pooled(map_, size, take):
    """Adaptive pooling of an (H, W) array as defined: window p covers floor(p·H/l) to ceil((p+1)·H/l)."""

    def window(p, side):
        return slice(p * side // size, -((p + 1) * side // -size))

    height, width = map_.shape
    return np.array([[take(map_[window(r, height), window(c, width)]) for c in range(size)] for r in range(size)])


def hcl_by_hand(x, target, levels=(4, 2, 1), weights=(1, 1 / 2, 1 / 4, 1 / 8), pooling="avg"):
    """Full size, then each level below the shorter side, the weights handed out in turn."""
    x, target = x.numpy(), target.numpy()
    take = {"avg": np.mean, "max": np.max}[pooling]
    terms = [np.mean((x - target) ** 2)]
    for level in levels:
        if level < min(x.shape[2:]):
            a, b = ([[pooled(m, level, take) for m in sample] for sample in side] for side in (x, target))
            terms.append(np.mean((np.array(a) - np.array(b)) ** 2))
    used = weights[: len(terms)]
    return sum(w * t for w, t in zip(used, terms, strict=True)) / sum(used)


@pytest.mark.parametrize("shape", MAPS)
@pytest.mark.parametrize(
    "params, by_hand",
    [
        ({}, {}),
        ({"pooling": "max"}, {"pooling": "max"}),
        ({"decay": 0.25}, {"weights": (1, 1 / 4, 1 / 16, 1 / 64)}),
        ({"levels": [6, 3], "level_weights": [2.0, 1.0, 0.0]}, {"levels": (6, 3), "weights": (2, 1, 0)}),
        ({"levels": [1, 2, 4]}, {"levels": (1, 2, 4)}),
        ({"levels": []}, {"levels": ()}),
    ],
)
def test_hcl_by_hand(shape, params, by_hand):
    x, target = pair(shape)
    value = DISTANCES.build("hcl", **params)(x, target)
    assert value.item() == pytest.approx(hcl_by_hand(x, target, **by_hand), rel=1e-12)


@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.is_file():
        pytest.skip(f"no {GOLDEN} (set DISTPRO_GOLDEN)")
    with np.load(GOLDEN, allow_pickle=False) as arrays:
        return {k: torch.from_numpy(arrays[k]) for k in arrays.files}


def test_hcl_golden(golden):
    """ReviewKD's code on maps of 16, 8, 4, 2 and 1: values and gradients (its own float32 error is below 2e-7)."""
    hcl, students = DISTANCES.build("hcl"), [golden[f"s{n}"].clone().requires_grad_() for n in range(1, 6)]
    losses = torch.stack([hcl(s, golden[f"t{n}"]) for n, s in enumerate(students, 1)])
    torch.testing.assert_close(losses, golden["per_map"], rtol=1e-5, atol=0)
    losses.sum().backward()
    for n, s in enumerate(students, 1):
        expected = golden[f"grad_s{n}"]
        assert (s.grad - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_hcl_golden_in_float64(golden):
    losses = [DISTANCES.build("hcl")(golden[f"s{n}"].double(), golden[f"t{n}"].double()) for n in range(1, 6)]
    assert sum(losses).item() == pytest.approx(golden["loss_f64"].item(), rel=1e-12)


def attention_by_hand(x, target, p=2.0):
    def attention(f):
        maps = np.mean(np.abs(f) ** p, axis=1 if f.ndim == 4 else 2).reshape(len(f), -1)
        return maps / np.sqrt((maps**2).sum(1, keepdims=True))

    return np.mean((attention(x) - attention(target)) ** 2)


def cosine_by_hand(x, target):
    axis = 1 if x.ndim == 4 else 2
    norms = np.sqrt((x**2).sum(axis) * (target**2).sum(axis))
    return np.mean(1 - (x * target).sum(axis) / norms)


def smooth_l1_by_hand(x, target, beta=1.0):
    d = np.abs(x - target)
    return np.mean(np.where(d < beta, d**2 / (2 * beta), d - beta / 2))


BY_HAND = {
    "l1": lambda x, t: np.mean(np.abs(x - t)),
    "l2": lambda x, t: np.mean((x - t) ** 2),
    "smooth_l1": smooth_l1_by_hand,
    "attention": attention_by_hand,
    "cosine": cosine_by_hand,
}
SPECS = [
    ("l1", {}),
    ("l2", {}),
    ("smooth_l1", {}),
    ("smooth_l1", {"beta": 0.3}),
    ("attention", {}),
    ("attention", {"p": 3.0}),
    ("cosine", {}),
]
EVERY = [*SPECS, ("hcl", {}), ("hcl", {"pooling": "max"})]


@pytest.mark.parametrize("shape", [(2, 5, 8, 6), (3, 4, 1, 1), TOKENS])
@pytest.mark.parametrize("name, params", SPECS)
def test_by_hand(name, params, shape):
    x, target = pair(shape)
    value = DISTANCES.build(name, **params)(x, target)
    assert value.item() == pytest.approx(BY_HAND[name](x.numpy(), target.numpy(), **params), rel=1e-12, abs=1e-15)


def test_hcl_of_tokens_is_their_mean_squared_error():
    x, target = pair(TOKENS)
    assert DISTANCES.build("hcl")(x, target).item() == pytest.approx(((x - target) ** 2).mean().item(), rel=1e-12)


@pytest.mark.parametrize("shape", [(2, 3, 6, 5), (2, 2, 8, 8), (1, 2, 12, 8), TOKENS])
@pytest.mark.parametrize("name, params", EVERY)
def test_gradients_and_their_gradients(name, params, shape):
    distance, (x, target) = DISTANCES.build(name, **params), pair(shape)
    inputs = (x.requires_grad_(), target.requires_grad_())
    assert torch.autograd.gradcheck(distance, inputs)
    assert torch.autograd.gradgradcheck(distance, inputs, fast_mode=True)


@pytest.mark.parametrize("name, params", EVERY)
def test_equal_features_have_distance_zero_and_no_gradient_blows_up(name, params):
    distance = DISTANCES.build(name, **params)
    _, target = pair((2, 3, 6, 5))
    assert distance(target, target).item() == pytest.approx(0, abs=1e-15)
    for other in (target, torch.zeros_like(target)):
        x = other.clone().requires_grad_()
        distance(x, torch.zeros_like(target)).backward()
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("closeness", [1.0, 0.05])
@pytest.mark.parametrize("name, params", EVERY)
def test_half_precision_features_are_compared_in_float32(name, params, closeness, dtype):
    """The value is that of the same numbers in float32, up to the rounding of the features' own dtype."""
    x, target = pair((8, 32, 16, 16), dtype, closeness)
    distance = DISTANCES.build(name, **params)
    value, exact = distance(x, target), distance(x.float(), target.float())
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("name, params", EVERY)
def test_student_and_teacher_may_differ_in_dtype(name, params):
    x, target = pair((2, 3, 6, 5), torch.bfloat16)
    x.requires_grad_()
    distance = DISTANCES.build(name, **params)
    value = distance(x, target.float())
    value.backward()
    assert x.grad.dtype == torch.bfloat16
    assert value.item() == pytest.approx(distance(x.float(), target.float()).item(), rel=1e-2)


def test_attention_ignores_the_scale_and_cosine_the_length():
    x, target = pair((2, 3, 6, 5))
    for name in ("attention", "cosine"):
        distance = DISTANCES.build(name)
        assert distance(3 * x, target).item() == pytest.approx(distance(x, target).item(), rel=1e-12)
    assert DISTANCES.build("cosine")(-target, target).item() == pytest.approx(2, rel=1e-12)


@pytest.mark.parametrize(
    "params, message",
    [
        ({"pooling": "mean"}, "pooling must be avg or max, got 'mean'"),
        ({"level_weights": [1.0, 0.5]}, r"level_weights has 2 entries, needs 4 \(full size, then levels\)"),
        ({"level": 3}, "distance 'hcl' has no parameter 'level'; did you mean 'levels'"),
    ],
)
def test_errors(params, message):
    with pytest.raises(UserError, match=message):
        DISTANCES.build("hcl", **params)


def test_float64_is_kept():
    for name in DISTANCES:
        assert DISTANCES.build(name)(*pair((2, 3, 4, 4))).dtype == torch.float64
