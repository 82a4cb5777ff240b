"""SRD, a simple recipe for distillation (Miles and Mikolajczyk, AAAI 2024), as torchdistill has it.

    z_s = BN(linear(mean of f_s over positions)),   z_t = BN(mean of f_t over positions)
    loss = 2 log(sum over batch and dimensions of |z_s - z_t|^exponent) + mean KL(softmax(t/T) || softmax(s/T))

Reads [logits (N, K), map (N, C, H, W) or embedding (N, D)] of each model. BN is without scale and shift, eps 1e-4, and
takes batch statistics of the teacher too while training. ``exponent`` = 4 and ``temperature`` T = 1 are the authors'
(the KL part has no factor T^2). The weight is 1, beside a cross-entropy of weight 1. Departure: none.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from distpro.losses._maps import BatchNorm1d, full, same_shapes
from distpro.losses._options import POSITIVE
from distpro.losses._rows import pooled_embedding, softened_kl, two
from distpro.losses.base import LOSSES, DistillationLoss, Shape, Tensors
from pathways.registry import UserError


@LOSSES.register("srd")
class SimpleRecipe(DistillationLoss):
    """Log of the summed powers of normalised feature differences, and the KL divergence of the predictions."""

    title = "Simple Recipe for Distillation"
    paper = "Miles and Mikolajczyk, Understanding the Role of the Projector in Knowledge Distillation, AAAI 2024"
    year = 2024
    family = "feature"
    reads = "logits and the last features before pooling, or the embedding"
    taps = ("logits", "last")
    compares_classes = True
    scalars = ("exponent", "temperature")
    signed = True
    formula = "2 log sum |BN(W f_s) - BN(f_t)|^a + KL(softmax(t/T) || softmax(s/T))"
    ranges = {"exponent": POSITIVE, "temperature": POSITIVE}

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        exponent: float = 4.0,
        temperature: float = 1.0,
    ):
        super().__init__(student_shapes, teacher_shapes)
        for shapes in (self.student_shapes, self.teacher_shapes):
            if len(shapes) != 2:
                raise UserError(f"loss 'srd' reads logits and a feature of each model, got {len(shapes)} shapes")
            if len(shapes[1]) not in (1, 3):
                raise UserError(f"{self.what} reads an embedding (D,) or a map (C, H, W), got {tuple(shapes[1])}")
        same_shapes(self.what, self.student_shapes[:1], self.teacher_shapes[:1])
        self.exponent, self.temperature = exponent, temperature
        width_s, width_t = self.student_shapes[1][0], self.teacher_shapes[1][0]
        self.projector = nn.Linear(width_s, width_t)
        self.norm_s = BatchNorm1d(width_t, eps=1e-4, affine=False)
        self.norm_t = BatchNorm1d(width_t, eps=1e-4, affine=False)

    def forward(
        self, student: Tensors, teacher: Tensors, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        (logits_s, f_s), (logits_t, f_t) = (two(self.what, x, "logits, feature") for x in (student, teacher))
        z_s = self.norm_s(full(self.projector(pooled_embedding(f_s))))
        z_t = self.norm_t(full(pooled_embedding(f_t.detach())))
        feature = (z_s - z_t).abs().pow(self.exponent).sum().log()
        response = softened_kl(full(logits_s), full(logits_t.detach()), self.temperature) / self.temperature**2
        return 2 * feature + response
