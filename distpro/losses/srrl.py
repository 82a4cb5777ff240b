"""Softmax regression representation learning (Yang et al., ICLR 2021).

    h = ReLU(BN(linear(f_s)))
    loss = mean (h - f_t)^2 + mean (W h - W f_t)^2

of embeddings (N, D) before the classifier; maps (N, C, H, W) are averaged over positions. ``classifier`` is the
teacher's last linear layer (or its weight, (K, D_t)); it stays as it is. Its bias cancels in the difference of logits.
The linear layer is the published 1x1 convolution, without bias; both parts have weight 1.

Departure: the authors' ImageNet code compares channel statistics of the maps in the first part; this is the paper's
form, which SimKD's and CTKD's code use.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from distpro.losses._maps import BatchNorm1d, full, matmul, one_pair
from distpro.losses._rows import pooled_embedding
from distpro.losses.base import LOSSES, DistillationLoss, Shape, Tensors, single
from pathways.registry import UserError


@LOSSES.register("srrl")
class SoftmaxRegression(DistillationLoss):
    """Squared error of the projected embedding, and of what the teacher's classifier makes of it."""

    title = "Softmax Regression Representation Learning"
    paper = "Yang et al., Knowledge Distillation via Softmax Regression Representation Learning, ICLR 2021"
    year = 2021
    family = "feature"
    reads = "embedding"
    taps = ("embedding",)
    needs = ("classifier",)
    formula = "mean (h - f_t)^2 + mean (W h - W f_t)^2, h = ReLU(BN(linear(f_s)))"

    classifier: Tensor

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        classifier: nn.Linear | Tensor | None = None,
    ):
        super().__init__(student_shapes, teacher_shapes)
        (width_s, *_), (width_t, *_) = one_pair(self.what, self.student_shapes, self.teacher_shapes, dims=(1, 3))
        weight = classifier.weight if isinstance(classifier, nn.Linear) else classifier
        if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[1] != width_t:
            raise UserError(f"loss 'srrl' needs classifier, the teacher's last linear layer ({width_t} -> classes)")
        self.register_buffer("classifier", weight.detach().clone(), persistent=False)
        self.transfer = nn.Sequential(nn.Linear(width_s, width_t, bias=False), BatchNorm1d(width_t), nn.ReLU())

    def forward(
        self, student: Tensors, teacher: Tensors, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        h = full(self.transfer(pooled_embedding(single(student, self.what))))
        f_t = full(pooled_embedding(single(teacher, self.what).detach()))
        return F.mse_loss(h, f_t) + matmul(h - f_t, self.classifier.T).square().mean()
