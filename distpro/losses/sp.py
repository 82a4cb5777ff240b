"""Similarity-preserving knowledge distillation (Tung and Mori, ICCV 2019).

    G = f f^T, every row divided by its L2 norm           (N, N), f flattened to (N, C H W)
    loss_i = ||G_i^t - G_i^s||^2 / N^2

Maps (N, C, H, W) or embeddings (N, D); channels and sizes may differ; any number of levels (RepDistiller reads the
last map before pooling). No options, no parameters; RepDistiller's weight is 3000. Departure: none.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distpro.losses._maps import PairedLevels, matmul
from distpro.losses.base import LOSSES


def similarity(f: Tensor) -> Tensor:
    """Row-normalised Gram matrix (N, N) of a batch."""
    f = f.flatten(1)
    return F.normalize(matmul(f, f.T), dim=1)


@LOSSES.register("sp")
class SimilarityPreserving(PairedLevels):
    """Squared difference of the batch's row-normalised Gram matrices."""

    title = "Similarity-Preserving Knowledge Distillation"
    paper = "Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019"
    year = 2019
    family = "relation"
    reads = "last features before pooling, or embedding"
    taps = ("last",)
    dims = (1, 2, 3)
    needs_shapes = False
    formula = "|G^t - G^s|^2 / N^2, G = row-normalised f f^T"

    def level(self, i: int, student: Tensor, teacher: Tensor) -> Tensor:
        return (similarity(teacher) - similarity(student)).square().mean()
