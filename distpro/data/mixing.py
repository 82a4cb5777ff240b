"""Augmentations that mix the samples of a batch, and with them their labels: mixup and CutMix."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distpro.data.augment import AUGMENTATIONS, Augmentation, Grid, check_value
from distpro.data.counter import BITS


class Mixing(Augmentation):
    """Base. Each sample is mixed, with probability ``p``, with the one before it in the (shuffled) batch; λ, the sample's
    own share, has the distribution Beta(α, α). Which samples meet depends on batch size and rank; the rest does not.

    Labels become probabilities (N, K): losses that need one label per sample refuse them.
    """

    draws = 2

    def __init__(self, alpha: float, p: float):
        name = type(self).__name__.lower()
        check_value(name, "alpha", alpha, alpha > 0, "above 0")
        check_value(name, "p", p, 0 <= p <= 1, "a probability between 0 and 1")
        self.alpha, self.p = alpha, p
        self._quantiles = beta_quantiles(alpha)

    def __call__(self, grid: Grid, *drawn: Tensor) -> None:
        raise AssertionError("mixes batches, does not move pixels")

    def mix(self, x: Tensor, y: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed images (N, C, H, W) and probabilities (N, K); ``drawn``: (N, draws) int64."""
        uniform = drawn.double() / (1 << BITS)
        share = torch.where(uniform[:, 0] < self.p, interpolated(self._quantiles.to(x.device), uniform[:, 1]), 1.0)
        x, share = self.blend(x, share, uniform[:, 2:])
        weight = share.to(y.dtype)[:, None]
        return x, weight * y + (1 - weight) * y.roll(1, 0)

    def blend(self, x: Tensor, share: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """The images with ``share`` (N,) of their own, and the share that they really have."""
        raise NotImplementedError


@AUGMENTATIONS.register("mixup")
class Mixup(Mixing):
    """λ x + (1 − λ) x' (Zhang, Cisse, Dauphin, Lopez-Paz: "mixup: Beyond Empirical Risk Minimization", ICLR 2018)."""

    def __init__(self, alpha: float = 0.2, p: float = 1.0):
        super().__init__(alpha, p)

    def blend(self, x: Tensor, share: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        return torch.lerp(x.roll(1, 0), x, share.to(x.dtype)[:, None, None, None]), share


@AUGMENTATIONS.register("cutmix")
class CutMix(Mixing):
    """A rectangle of the other image, of 1 − λ of the area and the image's proportions around a random pixel; λ is then
    what is left after the border has cut it (Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers
    with Localizable Features", ICCV 2019)."""

    draws = 4

    def __init__(self, alpha: float = 1.0, p: float = 0.5):
        super().__init__(alpha, p)

    def blend(self, x: Tensor, share: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        inside, area = torch.ones((), dtype=torch.bool, device=x.device), torch.ones_like(share)
        for side, (size, at) in enumerate(zip(x.shape[2:], place.unbind(1), strict=True)):
            half, centre = (size * (1 - share).sqrt()).floor() / 2, (size * at).floor()
            first, last = (centre - half).floor().clamp(0, size), (centre + half).floor().clamp(0, size)
            pixel = torch.arange(size, device=x.device).view((1, 1, -1, 1) if side == 0 else (1, 1, 1, -1))
            inside = inside & (pixel >= first[:, None, None, None]) & (pixel < last[:, None, None, None])
            area = area * (last - first) / size
        return torch.where(inside, x.roll(1, 0), x), 1 - area


def beta_quantiles(alpha: float, points: int = 4097) -> Tensor:
    """Quantiles of Beta(α, α) between 0 and 1/2: (2, points) float64, probability and x.

    At equal steps of s = x^b, b = min(α, 1), in which the density x^(α-b) (1-x)^(α-1) is smooth even where α < 1 makes
    that of x infinite at 0.
    """
    bend = min(alpha, 1.0)
    s = torch.linspace(0, 0.5**bend, points, dtype=torch.float64)
    x = s ** (1 / bend)
    mass = torch.cumulative_trapezoid(x ** (alpha - bend) * (1 - x) ** (alpha - 1), s)
    return torch.stack([F.pad(mass / mass[-1] / 2, (1, 0)), x])


def interpolated(quantiles: Tensor, probability: Tensor) -> Tensor:
    """Quantiles of the symmetric distribution at ``probability`` (N,) in [0, 1)."""
    known, x = quantiles
    low = torch.minimum(probability, 1 - probability)
    right = torch.searchsorted(known, low.contiguous()).clamp(1, len(known) - 1)
    span = (known[right] - known[right - 1]).clamp(min=math.ulp(0.0))
    value = torch.lerp(x[right - 1], x[right], ((low - known[right - 1]) / span).clamp(0, 1))
    return torch.where(probability < 0.5, value, 1 - value)
