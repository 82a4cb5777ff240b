"""Intra-class feature variation distillation (Wang et al., ECCV 2020), Eq. 1-3.

Per image, the class centre of a pixel is the mean feature of the pixels of its class; M(f) is the map of cosine
similarities between pixels and their centres:

    loss = mean over batch and positions of (M(s) - M(t))^2

``s`` (N, C_s, H, W), ``t`` (N, C_t, H, W): features in front of the classifier; channels may differ; of different sizes
the larger map is average-pooled first. ``target`` (N, H_y, W_y) int64 is brought to that size by nearest neighbour.
``num_classes`` K is the builder's to know; labels outside 0 .. K-1 are void (255): as in the authors' code, where the
centre of such a pixel is its own feature, its similarity is 1 for both models, so that void pixels have no influence
but for the number of positions, which counts all. The labels say so, no mask is needed.

`pixel_kd` is the pixel-wise KD that the authors add. Their weights are 200 (this loss) and 10 (pixel_kd), and they use
an adversarial loss too (not here). Departure: none in value; the sum over classes is one product, not a loop.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distpro.losses._maps import divergence, full, matmul, one_pair, same_size
from distpro.losses._options import COUNT
from distpro.losses.base import LOSSES, DistillationLoss, Shape, Tensors, single
from pathways.registry import UserError


def pixel_kd(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of per-pixel class distributions from logits (N, K, H, W): mean over *all* elements, T = 1."""
    log_s, log_t = F.log_softmax(full(student), dim=1), F.log_softmax(full(teacher.detach()), dim=1)
    return divergence(log_s, log_t).mean()


@LOSSES.register("ifvd")
class IntraClassVariation(DistillationLoss):
    """Squared difference of the similarities between pixels and their class centres."""

    title = "Intra-class Feature Variation Distillation for Semantic Segmentation"
    paper = "Wang et al., Intra-class Feature Variation Distillation for Semantic Segmentation, ECCV 2020"
    year = 2020
    family = "dense"
    reads = "features in front of the classifier"
    taps = ("last",)
    needs = ("num_classes",)
    formula = "mean (M(s) - M(t))^2, M(f) = cos(f, class centre of f)"
    needs_target = True
    ranges = {"num_classes": COUNT}

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        num_classes: int | None = None,
    ):
        super().__init__(student_shapes, teacher_shapes)
        if self.student_shapes or self.teacher_shapes:
            one_pair(self.what, self.student_shapes, self.teacher_shapes)
        if num_classes is None:
            raise UserError("loss 'ifvd' needs num_classes, the number of classes in the labels")
        self.num_classes = num_classes

    def forward(
        self, student: Tensors, teacher: Tensors, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        if target is None or target.dim() != 3:
            found = "none" if target is None else f"shape {tuple(target.shape)}"
            raise UserError(f"loss 'ifvd' needs a label map (N, H, W) as target, got {found}")
        features = full(single(student, self.what)), full(single(teacher, self.what).detach())
        student, teacher = same_size(*features)
        members = self._members(target, student)
        return F.mse_loss(_similarity(student, members), _similarity(teacher, members))

    def _members(self, target: Tensor, like: Tensor) -> Tensor:
        """Class membership (N, HW, K) of the positions of a map, in its type."""
        labels = F.interpolate(target[:, None].float(), size=like.shape[2:], mode="nearest").flatten(1)
        return (labels[..., None] == torch.arange(self.num_classes, device=labels.device)).to(like.dtype)


def _similarity(f: Tensor, members: Tensor) -> Tensor:
    """Cosine similarity (N, HW) of each pixel of (N, C, H, W) with its class centre; 1 for those of no class."""
    labelled = members.sum(2) > 0
    f = f.flatten(2).masked_fill(~labelled[:, None], 0)
    centres = matmul(f, members) / (members.sum(1, keepdim=True) + 1e-6)
    similarity = F.cosine_similarity(f, matmul(centres, members.transpose(1, 2)), dim=1, eps=1e-8)
    return similarity.masked_fill(~labelled, 1)
