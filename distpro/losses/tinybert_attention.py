"""TinyBERT's attention scores before the softmax (Jiao et al., Findings of EMNLP 2020, Eq. 7), as its authors' code computes them.

    A      = Q K^T / sqrt(d)                        of each head, 0 where it is at most -100
    loss_i = mean over heads and pairs of tokens of (A_i(s) - A_i(t))^2

transformers' modules do not give these scores, so they are computed of what they are made of: a config taps the projections of the
queries and of the keys, one after the other for each layer: ``[....query, ....key, ....query, ....key]``. Models with a bias or a
rotation of positions inside of their attention have other scores than these. ``heads``: of the student and of the teacher, which
must be as many; read from the model's config where it says them. The code adds -10,000 to the scores of padded keys and sets these
to 0 in both models. Departure: the mean is over the pairs of tokens that count, where theirs is over the padding too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distpro.losses._heads import check_heads, scores, token_mask, token_widths
from distpro.losses._maps import full
from distpro.losses._options import COUNT
from distpro.losses.base import LOSSES, DistillationLoss, Mask, Shape, Tensors, as_list
from pathways.registry import UserError

LOWEST = -100.0
"""Scores that are at most this are a mask's."""


@LOSSES.register("tinybert_attention")
class AttentionScores(DistillationLoss):
    """Mean squared error of attention scores before the softmax."""

    title = "TinyBERT (attention)"
    paper = "Jiao et al., TinyBERT: Distilling BERT for Natural Language Understanding, Findings of EMNLP 2020"
    year = 2020
    family = "relation"
    reads = "tokens: queries and keys of layers, in turn"
    taps = ("stages",)
    needs = ("heads",)
    masked = True
    formula = "sum_i mean (Q_s K_s^T / sqrt(d_s) - Q_t K_t^T / sqrt(d_t))^2"
    ranges = {"heads": COUNT}

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        heads: Sequence[int] | None = None,
    ):
        super().__init__(student_shapes, teacher_shapes)
        shapes = self.student_shapes, self.teacher_shapes
        if len(shapes[0]) != len(shapes[1]) or not shapes[0] or len(shapes[0]) % 2:
            raise UserError(
                f"{self.what} reads the queries and the keys of each layer in turn, of as many layers of both models: name "
                f"student_taps and teacher_taps, got {len(shapes[0])} and {len(shapes[1])}"
            )
        if heads is None or len(heads) != 2:
            raise UserError(f"{self.what}: heads must be [the student's, the teacher's], got {heads}")
        if heads[0] != heads[1]:
            raise UserError(
                f"{self.what} compares head by head, but there are {heads[0]} and {heads[1]}: loss minilm need not"
            )
        for width in (*token_widths(self.what, shapes[0]), *token_widths(self.what, shapes[1])):
            check_heads(self.what, width, heads[0])
        self.heads = list(heads)

    def forward(
        self,
        student: Tensors,
        teacher: Tensors,
        target: Tensor | None = None,
        index: Tensor | None = None,
        mask: Mask = None,
    ) -> Tensor:
        ours, theirs = [full(x) for x in as_list(student)], [full(x.detach()) for x in as_list(teacher)]
        counts = token_mask(self.what, mask, ours)
        losses = []
        for place in range(0, len(ours), 2):
            a, b = (self._scores(*x[place : place + 2]) for x in (ours, theirs))
            squares = (a - b).square()
            if counts is None:
                losses.append(squares.mean())
                continue
            pairs = (counts[:, None, :, None] & counts[:, None, None, :]).expand_as(squares)
            losses.append(squares.masked_fill(~pairs, 0).sum() / pairs.sum())
        return torch.stack(losses).sum()

    def _scores(self, queries: Tensor, keys: Tensor) -> Tensor:
        found = scores(queries, keys, self.heads[0])
        return found.masked_fill(found <= LOWEST, 0)
