"""Knowledge translation and adaptation with affinity distillation (He et al., CVPR 2019), Eq. 1-5.

Two stages. First an autoencoder of the teacher's map learns to reconstruct it, with a penalty on its code: ``pretrain``
is MSE + 1e-7 * ||code||_1. Then it is frozen and gives the target c = encoder(t) of C_f = rate * C_t channels:

    adapt    = |n(A(s)) - n(c)|, A = ReLU(BN(conv3x3)), n(f) = f / ||f||_2 per sample
               (p = 1: mean absolute difference over elements; p = 2: mean over batch of the 2-norm)
    affinity = mean over batch of sum over channels of ||a a^T - b b^T||_F / HW,  a, b = unit vectors over positions of
               conv3x3(s) and of c
    loss     = 50 adapt + 1 affinity

``s`` (N, C_s, H_s, W_s), ``t`` (N, C_t, H_t, W_t): the features in front of the classifier, or the class scores of a
dense task before they are resized, as in torchdistill's recipe (taps ``classifier.4`` of torchvision's DeepLabV3 as
teacher, ``classifier.high_classifier`` of its LRASPP as student: 21 channels, a code of 10). Of different sizes the
larger one is average-pooled. Defaults (``rate`` 0.5, ``p`` 1, the weights, encoder and decoder of three 3x3
convolutions with BatchNorm and LeakyReLU) are that recipe's: one epoch of the first stage, then cross-entropy plus this
loss. With a mask all of this is of the positions that count; to the layers the others are zero. Departures: the HW x HW
affinity matrices are never formed, their distance has a closed form in a and b; the paper's autoencoder shrinks the map
to the student's size by strides, here its code is pooled.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, linalg, nn

from distpro.losses._maps import BatchNorm2d, full, one_pair
from distpro.losses._masks import counted, fitted, masks_of, mean_square, same_size_counted
from distpro.losses._options import POSITIVE
from distpro.losses.base import LOSSES, DistillationLoss, Mask, Shape, Tensors, single
from distpro.losses.ft import Paraphraser, order, unit_distance


@LOSSES.register("ktaad")
class KnowledgeAdaptation(DistillationLoss):
    """Adapted student features and their affinities against the code of a teacher autoencoder."""

    title = "Knowledge Adaptation for Efficient Semantic Segmentation"
    paper = "He et al., Knowledge Adaptation for Efficient Semantic Segmentation, CVPR 2019"
    year = 2019
    family = "dense"
    reads = "features in front of the classifier"
    taps = ("last",)
    pretrain_reads = "teacher"
    formula = "50 |n(A(s)) - n(enc(t))| + sum_c ||a_c a_c^T - b_c b_c^T||_F / HW"
    stages = 2
    masked = True
    scalars = ("adaptation_weight", "affinity_weight")
    ranges = {"rate": POSITIVE}

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        rate: float = 0.5,
        p: int = 1,
        adaptation_weight: float = 50.0,
        affinity_weight: float = 1.0,
        code_weight: float = 1e-7,
    ):
        super().__init__(student_shapes, teacher_shapes)
        student, teacher = one_pair(self.what, self.student_shapes, self.teacher_shapes)
        self.p = order(self.what, p)
        codes = max(1, int(teacher[0] * rate))
        self.adaptation_weight, self.affinity_weight, self.code_weight = adaptation_weight, affinity_weight, code_weight
        self.translator = Paraphraser(teacher[0], codes, batch_norm=True).eval()
        self.feature_adapter = nn.Sequential(nn.Conv2d(student[0], codes, 3, padding=1), BatchNorm2d(codes), nn.ReLU())
        self.affinity_adapter = nn.Conv2d(student[0], codes, 3, padding=1)

    def pretrain(
        self,
        student: Tensors,
        teacher: Tensors,
        target: Tensor | None = None,
        index: Tensor | None = None,
        mask: Mask = None,
    ) -> Tensor:
        """Loss of the first stage: reconstruction error of the teacher's map plus the penalty on its code.

        ``student`` is not read; ``mask`` is one of the teacher's size, or of the student's in the second stage.
        """
        features = full(single(teacher, self.what).detach())
        (mask,) = masks_of(self.what, mask, [features])
        present = fitted(mask, features)
        features = counted(features, present)
        self.translator.train(self.training)
        code = self.translator.encoder(features)
        reconstruction = self.translator.decoder(code)
        self.translator.eval()
        penalty = counted(full(code), present).abs().sum()
        return mean_square(full(reconstruction), features, present) + self.code_weight * penalty

    def forward(
        self,
        student: Tensors,
        teacher: Tensors,
        target: Tensor | None = None,
        index: Tensor | None = None,
        mask: Mask = None,
    ) -> Tensor:
        source, features = single(student, self.what), single(teacher, self.what).detach()
        (mask,) = masks_of(self.what, mask, [source])
        source, features = (counted(f, fitted(mask, f)) for f in (source, features))
        with torch.no_grad():
            code = self.translator.encoder(features)
        adaptation = unit_distance(self.feature_adapter(source), code, self.p, mask)
        affinity = self.affinity(self.affinity_adapter(source), code, mask)
        return self.adaptation_weight * adaptation + self.affinity_weight * affinity

    def train(self, mode: bool = True) -> KnowledgeAdaptation:
        """As of any module, except that the frozen autoencoder keeps the batch statistics of the first stage."""
        super().train(mode)
        self.translator.eval()
        return self

    def affinity(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """Scalar distance of the affinity matrices, channel by channel, of two maps (N, C, H, W); with ``mask``
        (N, H, W) the matrices are those of the positions that count."""
        student, teacher, mask = same_size_counted(full(student), full(teacher.detach()), mask)
        a, b = F.normalize(student.flatten(2), dim=2), F.normalize(teacher.flatten(2), dim=2)
        # aa' - bb' = (uv' + vu')/2 with u = a - b and v = a + b, and so 2 ||.||_F^2 = |u|^2 |v|^2 + (u.v)^2.
        u, v = a - b, a + b
        lengths = linalg.vector_norm(u, dim=2) * linalg.vector_norm(v, dim=2)
        frobenius = linalg.vector_norm(torch.stack([lengths, (u * v).sum(2)]), dim=0) / 2**0.5
        if mask is None:
            return frobenius.sum(1).mean() / a.shape[2]
        return (frobenius.sum(1) / mask.flatten(1).sum(1).clamp(min=1)).mean()
