"""Neuron selectivity transfer (Huang & Wang, 2017), Eq. 7 with the polynomial kernel.

Per level, with each channel's map flattened to HW and L2-normalised, k(a, b) = (a . b)^2 (degree 2, c = 0):

    loss = mean k(t, t) + mean k(s, s) - 2 mean k(s, t),   means over batch and channel pairs

``s`` (N, C_s, H, W), ``t`` (N, C_t, H, W); channels may differ; of different sizes the larger map is average-pooled
first. With a mask a channel's map is that of the positions that count. No options; RepDistiller's weight is 50.
Departure: none (RepDistiller's and mdistiller's values).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distpro.losses._maps import matmul
from distpro.losses._masks import MaskedLevels, same_size_counted
from distpro.losses.base import LOSSES


@LOSSES.register("nst")
class NeuronSelectivity(MaskedLevels):
    """Maximum mean discrepancy between the two sets of channel patterns."""

    title = "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer"
    paper = (
        "Huang & Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, arXiv:1707.01219 (2017)"
    )
    year = 2017
    family = "feature"
    reads = "features of all stages"
    taps = ("stages",)
    needs_shapes = False
    formula = "mean k(t,t) + mean k(s,s) - 2 mean k(s,t), k(a,b) = (a.b)^2 of normalised channels"

    def level(self, i: int, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        student, teacher, _ = same_size_counted(student, teacher, mask)
        student, teacher = (F.normalize(f.flatten(2), dim=2) for f in (student, teacher))
        return _kernel(teacher, teacher) + _kernel(student, student) - 2 * _kernel(student, teacher)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    """Mean of k over all pairs of channels, of (N, C_a, HW) and (N, C_b, HW)."""
    return matmul(a, b.transpose(1, 2)).square().mean()
