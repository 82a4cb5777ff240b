"""TinyBERT's hidden states and embeddings (Jiao et al., Findings of EMNLP 2020, Eq. 8 and 9), as its authors' code computes them.

    loss_i = mean over all tokens and channels of (W s_i + b - t_i)^2

``s_i`` (N, L, D_s) and ``t_i`` (N, L, D_t) are the embeddings' output and the hidden states of layers, which a config pairs: layer
i of M of the student with layer i N/M of the teacher. ``W`` and ``b`` are one learned projection for all of them, also where the
widths are equal. Attention is a loss of its own, `tinybert_attention`. Departure: with a mask the mean is over the tokens that
count, where theirs is over the padding too.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from distpro.losses._heads import token_widths
from distpro.losses._masks import MaskedLevels, mean_square
from distpro.losses.base import LOSSES, Shape
from pathways.registry import UserError


@LOSSES.register("tinybert")
class HiddenStates(MaskedLevels):
    """Mean squared error of hidden states and embeddings, through one projection."""

    title = "TinyBERT (hidden states and embeddings)"
    paper = "Jiao et al., TinyBERT: Distilling BERT for Natural Language Understanding, Findings of EMNLP 2020"
    year = 2020
    family = "feature"
    reads = "tokens after the embeddings and after layers"
    taps = ("stages",)
    dims = (2,)
    formula = "sum_i mean (W s_i + b - t_i)^2"

    def __init__(self, student_shapes: Sequence[Shape] = (), teacher_shapes: Sequence[Shape] = ()):
        super().__init__(student_shapes, teacher_shapes)
        ours, theirs = (token_widths(self.what, s) for s in (self.student_shapes, self.teacher_shapes))
        if len(set(ours)) > 1 or len(set(theirs)) > 1:
            raise UserError(f"{self.what} has one projection for all layers, got widths {ours} and {theirs}")
        self.project = nn.Linear(ours[0], theirs[0])

    def level(self, i: int, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        return mean_square(self.project(student), teacher, mask)
