"""MiniLM v2: relations of queries, keys and values (Wang et al., Findings of ACL 2021, Eq. 4 to 6).

    R(A)   = softmax(A_r A_r^T / sqrt(d_r))         of each of R relation heads, A one of Q, K, V
    loss   = sum over Q, K, V of the mean over relation heads and tokens of KL(R_t || R_s)

A config taps the projections of one layer of each model, ``[....query, ....key, ....value]``: of the student the last, of the
teacher the last of a base model, or one further down of a large one. Their widths are cut into ``relations`` R heads of their own,
so that neither widths nor attention heads need to match. A sample's mean is over its tokens; the loss is the mean over samples.
With a mask, padding is neither a row nor a column of a relation. ``relations`` = 12, a BERT-base's attention heads; the paper takes
48 for its base-sized teachers. Departure: none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distpro.losses._heads import check_heads, scores, token_mask, token_widths
from distpro.losses._maps import divergence, full
from distpro.losses._options import COUNT
from distpro.losses.base import LOSSES, DistillationLoss, Mask, Shape, Tensors, as_list
from pathways.registry import UserError


@LOSSES.register("minilm")
class Relations(DistillationLoss):
    """KL divergence of the self-attention relations of queries, keys and values."""

    title = "MiniLMv2"
    paper = "Wang et al., MiniLMv2: Multi-Head Self-Attention Relation Distillation, Findings of ACL 2021"
    year = 2021
    family = "relation"
    reads = "tokens: queries, keys and values of a layer"
    taps = ("stages",)
    masked = True
    formula = "sum_(Q,K,V) mean KL(softmax(A_t A_t^T / sqrt(d)) || softmax(A_s A_s^T / sqrt(d)))"
    ranges = {"relations": COUNT}

    def __init__(self, student_shapes: Sequence[Shape] = (), teacher_shapes: Sequence[Shape] = (), relations: int = 12):
        super().__init__(student_shapes, teacher_shapes)
        shapes = self.student_shapes, self.teacher_shapes
        if [len(side) for side in shapes] != [3, 3]:
            raise UserError(
                f"{self.what} reads the queries, keys and values of one layer of each model: name student_taps and "
                f"teacher_taps, got {len(shapes[0])} and {len(shapes[1])}"
            )
        for width in (*token_widths(self.what, shapes[0]), *token_widths(self.what, shapes[1])):
            check_heads(self.what, width, relations)
        self.relations = relations

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
        for s, t in zip(ours, theirs, strict=True):
            log_s, log_t = (self._log_relations(x, counts) for x in (s, t))
            rows = divergence(log_s, log_t).sum(3).mean(1)  # (N, L)
            if counts is not None:
                rows = rows.masked_fill(~counts, 0)
            tokens = rows.shape[1] if counts is None else counts.sum(1).clamp(min=1)
            losses.append((rows.sum(1) / tokens).mean())
        return torch.stack(losses).sum()

    def _log_relations(self, x: Tensor, counts: Tensor | None) -> Tensor:
        found = scores(x, x, self.relations)
        if counts is not None:
            found = found.masked_fill(~counts[:, None, None, :], -math.inf)
        return found.log_softmax(3)
