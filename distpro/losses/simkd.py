"""SimKD, knowledge distillation with the reused teacher classifier (Chen et al., CVPR 2022), Eq. 4.

    loss = mean over all elements of (P(s) - t)^2

of the last maps before pooling, ``s`` (N, C_s, H_s, W_s) and ``t`` (N, C_t, H_t, W_t), after the ReLU. The projector P
is conv1x1, conv3x3, conv1x1 without bias, each with BatchNorm and ReLU; C_t / ``factor`` (2) channels in between.
Of different sizes the larger map is average-pooled first.

This is the whole published objective (no task loss, no KD), and the student that is deployed predicts with the
teacher's classifier on the projected features: ``predict``. Departure: none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from distpro.losses._maps import BatchNorm2d, full, one_pair, pooled, same_size
from distpro.losses.base import LOSSES, DistillationLoss, Shape, single


@LOSSES.register("simkd")
class SimKD(DistillationLoss):
    """Mean squared error between the projected last student map and the teacher's."""

    title = "Knowledge Distillation with the Reused Teacher Classifier"
    paper = "Chen et al., Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022"
    year = 2022
    family = "feature"
    reads = "last features before pooling"
    formula = "mean (P(s) - t)^2"

    def __init__(self, student_shapes: Sequence[Shape] = (), teacher_shapes: Sequence[Shape] = (), factor: int = 2):
        super().__init__(student_shapes, teacher_shapes)
        student, teacher = one_pair("loss 'simkd'", self.student_shapes, self.teacher_shapes)
        mid = max(1, teacher[0] // factor)
        self.projector = nn.Sequential(
            *_block(student[0], mid, 1),
            *_block(mid, mid, 3),
            *_block(mid, teacher[0], 1),
        )

    def forward(
        self,
        student: Tensor | Sequence[Tensor],
        teacher: Tensor | Sequence[Tensor],
        target: Tensor | None = None,
        index: Tensor | None = None,
    ) -> Tensor:
        features = single(teacher, "loss 'simkd'").detach()
        source, features = same_size(single(student, "loss 'simkd'"), full(features))
        return F.mse_loss(full(self.projector(source)), features)

    def predict(self, student: Tensor, classifier: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits of the deployed student: the teacher's ``classifier`` (N, C_t) -> (N, K) on the pooled projection."""
        size = [min(a, b) for a, b in zip(student.shape[2:], self.teacher_shapes[0][1:], strict=True)]
        return classifier(self.projector(pooled(student, size)).mean((2, 3)))


def _block(in_channels: int, out_channels: int, kernel: int) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    return [conv, BatchNorm2d(out_channels), nn.ReLU()]
