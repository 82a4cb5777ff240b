"""From α̃ to the weights of the terms: the normalisations of Table 7, and the threshold that drops pathways."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pathways.registry import Registry

WEIGHTINGS = Registry("weighting")


class Weighting:
    """w = normalise(α̃), both of shape (N,)."""

    def __call__(self, alpha_tilde: Tensor) -> Tensor:
        raise NotImplementedError

    def start(self, count: int) -> Tensor:
        """α̃ before the first step, (N,)."""
        return torch.ones(count)

    def pull_back(self, alpha_tilde: Tensor, gradient: Tensor) -> Tensor:
        """(∂w/∂α̃)ᵀ · gradient, shape (N,): turns dL_val/dw into dL_val/dα̃."""
        with torch.enable_grad():
            leaf = alpha_tilde.detach().requires_grad_()
            (result,) = torch.autograd.grad(self(leaf), leaf, gradient)
        return result


@WEIGHTINGS.register("biased_softmax")
class BiasedSoftmax(Weighting):
    """w_p = exp(α̃_p) / (Σ_q exp(α̃_q) + exp(g)) (Section 3.2): the weights may sum to less than one.

    Args:
        g: the bias; the paper has 1.
    """

    def __init__(self, g: float = 1.0):
        self.g = g

    def __call__(self, alpha_tilde: Tensor) -> Tensor:
        return torch.cat([alpha_tilde, alpha_tilde.new_full((1,), self.g)]).softmax(0)[:-1]


@WEIGHTINGS.register("softmax")
class Softmax(Weighting):
    """w = softmax(α̃)."""

    def __call__(self, alpha_tilde: Tensor) -> Tensor:
        return alpha_tilde.softmax(0)


@WEIGHTINGS.register("biased_l1")
class BiasedL1(Weighting):
    """w = α̃ / (‖α̃‖₁ + 1)."""

    def __call__(self, alpha_tilde: Tensor) -> Tensor:
        return alpha_tilde / (alpha_tilde.abs().sum() + 1)


@WEIGHTINGS.register("l1")
class L1(Weighting):
    """w = α̃ / ‖α̃‖₁."""

    def __call__(self, alpha_tilde: Tensor) -> Tensor:
        return alpha_tilde / alpha_tilde.abs().sum()


@WEIGHTINGS.register("sigmoid")
class Sigmoid(Weighting):
    """w = σ(α̃), each weight on its own."""

    def __call__(self, alpha_tilde: Tensor) -> Tensor:
        return alpha_tilde.sigmoid()


@WEIGHTINGS.register("log")
class Log(Weighting):
    """w = exp(α̃): each weight moves by a factor, and how hard all terms pull together is free. Starts at 1 / (N + 1) each, as
    biased softmax does."""

    def start(self, count: int) -> Tensor:
        return torch.full((count,), -math.log(count + 1))

    def __call__(self, alpha_tilde: Tensor) -> Tensor:
        return alpha_tilde.exp()
