"""SimKD, knowledge distillation with the reused teacher classifier (Chen et al., CVPR 2022), Eq. 4.

    loss = mean over all elements of (P(s) - t)^2

of the last maps before pooling, ``s`` (N, C_s, H_s, W_s) and ``t`` (N, C_t, H_t, W_t), after the ReLU. The projector P
is conv1x1, conv3x3, conv1x1 without bias, each with BatchNorm and ReLU; C_t / ``factor`` (2) channels in between.
Of different sizes the larger map is average-pooled first.

This is the whole published objective (no task loss, no KD), and the student that is deployed predicts with the
teacher's ``classifier``, its last linear layer (C_t -> K), on the projected features: ``predict``. The loss keeps a copy
of it as buffers, which are saved with it and not trained. Departure: none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from distpro.losses._maps import BatchNorm2d, full, one_pair, pooled, same_size
from distpro.losses._options import COUNT
from distpro.losses.base import LOSSES, DistillationLoss, Shape, Tensors, single
from pathways.registry import UserError


@LOSSES.register("simkd")
class SimKD(DistillationLoss):
    """Mean squared error between the projected last student map and the teacher's."""

    title = "Knowledge Distillation with the Reused Teacher Classifier"
    paper = "Chen et al., Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022"
    year = 2022
    family = "feature"
    reads = "last features before pooling"
    taps = ("last",)
    needs = ("classifier",)
    deploys = True
    formula = "mean (P(s) - t)^2"
    ranges = {"factor": COUNT}

    classifier_weight: Tensor | None
    classifier_bias: Tensor | None

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        factor: int = 2,
        classifier: nn.Linear | None = None,
    ):
        super().__init__(student_shapes, teacher_shapes)
        student, teacher = one_pair(self.what, self.student_shapes, self.teacher_shapes)
        mid = max(1, teacher[0] // factor)
        self.projector = nn.Sequential(
            *_block(student[0], mid, 1),
            *_block(mid, mid, 3),
            *_block(mid, teacher[0], 1),
        )
        if classifier is not None and classifier.in_features != teacher[0]:
            found = f"{classifier.in_features} features for a teacher map of {teacher[0]} channels"
            raise UserError(f"loss 'simkd': classifier reads {found}")
        for name in ("weight", "bias"):
            values = getattr(classifier, name, None)
            self.register_buffer(f"classifier_{name}", None if values is None else values.detach().clone())

    def forward(
        self, student: Tensors, teacher: Tensors, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        features = single(teacher, self.what).detach()
        source, features = same_size(single(student, self.what), full(features))
        return F.mse_loss(full(self.projector(source)), features)

    def predict(self, student: Tensor) -> Tensor:
        """Logits (N, K) of the deployed student from its last map (N, C_s, H_s, W_s), by the teacher's classifier.

        Raises UserError if the loss was built without it.
        """
        if self.classifier_weight is None:
            raise UserError("loss 'simkd' predicts with the teacher's classifier, and was built without one")
        size = [min(a, b) for a, b in zip(student.shape[2:], self.teacher_shapes[0][1:], strict=True)]
        embedding = self.projector(pooled(student, size)).mean((2, 3))
        return F.linear(embedding, self.classifier_weight, self.classifier_bias)


def _block(in_channels: int, out_channels: int, kernel: int) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    return [conv, BatchNorm2d(out_channels), nn.ReLU()]
