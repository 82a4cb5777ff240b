"""Structured knowledge distillation, the pair-wise term (Liu et al., CVPR 2019), Eq. 2.

    loss_i = mean over batch and pairs of positions (a, b) of (G(s)_ab - G(t)_ab)^2

with G(f)_ab the cosine similarity of the feature vectors at two positions. ``s`` (N, C_s, H, W), ``t`` (N, C_t, H, W);
channels may differ; of different sizes the larger map is average-pooled first. Both are then max-pooled to nodes of
``scale`` times the map's height and width: 0.5, the authors' default, leaves 2 x 2 nodes; small scales cost (HW)^2. A
node is the maximum of its window, void pixels or not, so there is no mask. The pixel-wise term is `kd` at temperature
1, whose positions are rows. The authors' weight is 1 (and 10 for their pixel-wise term, 0.1 for the adversarial one).

Departure: the authors' code holds the norms of the feature vectors constant in the gradient; here the gradient is that
of the formula. Values agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, linalg

from distpro.losses._maps import PairedLevels, matmul, same_size
from distpro.losses._options import Range
from distpro.losses.base import LOSSES, Shape


@LOSSES.register("structured")
class PairWise(PairedLevels):
    """Squared difference of the similarities between all pairs of positions."""

    title = "Structured Knowledge Distillation for Semantic Segmentation (pair-wise)"
    paper = "Liu et al., Structured Knowledge Distillation for Semantic Segmentation, CVPR 2019"
    year = 2019
    family = "dense"
    reads = "features in front of the classifier"
    taps = ("last",)
    needs_shapes = False
    formula = "mean_(n,a,b) (cos(s_a, s_b) - cos(t_a, t_b))^2 of max-pooled maps"
    ranges = {"scale": Range(0, 1, above=True)}

    def __init__(self, student_shapes: Sequence[Shape] = (), teacher_shapes: Sequence[Shape] = (), scale: float = 0.5):
        super().__init__(student_shapes, teacher_shapes)
        self.scale = scale

    def level(self, i: int, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = same_size(student, teacher)
        return (self._affinity(student) - self._affinity(teacher)).square().mean()

    def _affinity(self, f: Tensor) -> Tensor:
        """Cosine similarities (N, nodes, nodes)."""
        window = tuple(max(1, int(side * self.scale)) for side in f.shape[2:])
        nodes = F.max_pool2d(f, window, ceil_mode=True).flatten(2)
        nodes = nodes / (linalg.vector_norm(nodes, dim=1, keepdim=True) + 1e-8)
        return matmul(nodes.transpose(1, 2), nodes)
