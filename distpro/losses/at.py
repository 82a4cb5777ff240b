"""Attention transfer (Zagoruyko & Komodakis, ICLR 2017).

Per level, with the attention map a(f) = normalise(mean over channels of |f|^p) of (N, C, H, W), flattened to (N, HW):

    form "code" (default, authors' code and RepDistiller):  mean over batch and positions of (a(s) - a(t))^2
    form "paper" (Eq. 2):                                   mean over batch of ||a(s) - a(t)||_2

Channels may differ; of different sizes the larger map is average-pooled first. ``p`` is 2; RepDistiller's weight of the
sum over levels is 1000. With a mask the attention maps are those of the positions that count, which alone are
normalised and averaged. Departure: |f|^p as in the paper, where the code has f^p (the same for even p).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, linalg

from distpro.losses._masks import MaskedLevels, mean_counted, same_size_counted
from distpro.losses._options import POSITIVE
from distpro.losses.base import LOSSES, Shape, one_of


@LOSSES.register("at")
class AttentionTransfer(MaskedLevels):
    """Distance of the normalised spatial attention maps, level by level."""

    title = "Paying More Attention to Attention"
    paper = "Zagoruyko & Komodakis, Paying More Attention to Attention, ICLR 2017"
    year = 2017
    family = "feature"
    reads = "features of all stages"
    taps = ("stages",)
    needs_shapes = False
    scalars = ("p",)
    formula = "mean (a(s) - a(t))^2, a(f) = normalise(mean_c |f|^p)"
    ranges = {"p": POSITIVE}

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        p: float = 2.0,
        form: str = "code",
    ):
        super().__init__(student_shapes, teacher_shapes)
        self.p = p
        self.form = one_of(f"{self.what}: form", form, ("code", "paper"))

    def level(self, i: int, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        student, teacher, mask = same_size_counted(student, teacher, mask)
        difference = attention_map(student, self.p) - attention_map(teacher, self.p)
        if self.form == "paper":
            return linalg.vector_norm(difference, dim=1).mean()
        return mean_counted(difference.square(), None if mask is None else mask.flatten(1))


def attention_map(f: Tensor, p: float | Tensor = 2.0) -> Tensor:
    """Unit vectors (N, HW) of mean_c |f|^p, of maps (N, C, H, W)."""
    return F.normalize(_power(f, p).mean(1).flatten(1), dim=1)


def _power(f: Tensor, p: float | Tensor) -> Tensor:
    """|f|^p."""
    if not isinstance(p, Tensor):
        return f.square() if p == 2 else f.abs().pow(p)
    zero = f == 0  # where the derivative by p would be 0 · log 0
    return f.abs().masked_fill(zero, 1).pow(p).masked_fill(zero, 0)
