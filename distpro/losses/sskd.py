"""Self-supervised knowledge distillation (Xu et al., ECCV 2020).

The batch holds every image followed by its three rotations: 4B rows, of which 4k is plain. With cos (3B, B) the cosine
similarities of the rotated with the plain representations, KL the divergence from the teacher averaged over kept rows:

    loss = ce_weight CE(s plain, y)
         + kd_weight kd_t^2 KL(softmax(logits plain / kd_t))
         + tf_weight tf_t^2 KL(softmax(logits rotated / tf_t))    kept by the rank of the label in the teacher's row
         + ss_weight ss_t^2 KL(softmax(cos / ss_t))               kept by the rank of the own image in the teacher's row

Kept are all rows where the teacher ranks the truth first, and the share ``tf_ratio`` or ``ss_ratio`` of the others,
best ranks first. *The task part is included*: the objective should not add another cross-entropy.

Reads [logits (4B, K), embedding (4B, D)] of each model; ``target`` (B,): the labels of the plain images. A head
(linear, ReLU, linear, of the embedding's width) makes the representation; ``head=False`` takes it as given. Two
stages: ``pretrain`` trains the teacher's head to recognise rotated images, then the student learns from the fixed
head. Defaults are the authors': temperatures ``kd_t`` = ``tf_t`` = 4, ``ss_t`` = 0.5; ratios 1 and 0.75; weights 0.1,
0.9, 2.7, 10. Departure: none; the data pipeline makes the rotated batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distpro.losses._maps import full, matmul, same_shapes
from distpro.losses._options import POSITIVE, SHARE
from distpro.losses._rows import checked_labels, kl_rows, softened_kl, two
from distpro.losses.base import LOSSES, DistillationLoss, Shape, Tensors
from pathways.registry import UserError


@LOSSES.register("sskd")
class SelfSupervised(DistillationLoss):
    """Distillation of predictions on plain and rotated images and of the similarities between them."""

    title = "Knowledge Distillation Meets Self-Supervision"
    paper = "Xu et al., Knowledge Distillation Meets Self-Supervision, ECCV 2020"
    year = 2020
    family = "relation"
    reads = "logits and embedding of each image and its three rotations"
    taps = ("logits", "embedding")
    pretrain_reads = "teacher"
    rows = "all"
    expand = "rotations"
    formula = "w1 CE + w2 KL(plain) + w3 KL(rotated) + w4 KL(similarities)"
    stages = 2
    scalars = ("kd_t", "tf_t", "ss_t", "tf_ratio", "ss_ratio", "ce_weight", "kd_weight", "tf_weight", "ss_weight")
    needs_target = True
    ranges = {"kd_t": POSITIVE, "tf_t": POSITIVE, "ss_t": POSITIVE, "tf_ratio": SHARE, "ss_ratio": SHARE}

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        kd_t: float = 4.0,
        tf_t: float = 4.0,
        ss_t: float = 0.5,
        tf_ratio: float = 1.0,
        ss_ratio: float = 0.75,
        ce_weight: float = 0.1,
        kd_weight: float = 0.9,
        tf_weight: float = 2.7,
        ss_weight: float = 10.0,
        head: bool = True,
    ):
        super().__init__(student_shapes, teacher_shapes)
        self.kd_t, self.tf_t, self.ss_t = kd_t, tf_t, ss_t
        self.tf_ratio, self.ss_ratio = tf_ratio, ss_ratio
        self.ce_weight, self.kd_weight, self.tf_weight, self.ss_weight = ce_weight, kd_weight, tf_weight, ss_weight
        self.head_s, self.head_t = _head(self.student_shapes, head), _head(self.teacher_shapes, head)

    def forward(
        self, student: Tensors, teacher: Tensors, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        ce, kd, tf, ss = self.parts(student, teacher, target)
        return self.ce_weight * ce + self.kd_weight * kd + self.tf_weight * tf + self.ss_weight * ss

    def parts(self, student: Tensors, teacher: Tensors, target: Tensor | None) -> list[Tensor]:
        """The four scalars before their weights, in the order of the formula."""
        (logits_s, rep_s), (logits_t, rep_t) = (two(self.what, x, "logits, embedding") for x in (student, teacher))
        target = self._checked(logits_s, logits_t, target)
        logits_s, logits_t = full(logits_s), full(logits_t.detach())
        with torch.no_grad():
            cos_t = _similarities(full(self.head_t(rep_t)))
        cos_s = _similarities(full(self.head_s(rep_s)))
        (plain_s, rotated_s), (plain_t, rotated_t) = _split(logits_s), _split(logits_t)
        keep_tf = _kept(rotated_t, target.repeat_interleave(3), self.tf_ratio)
        keep_ss = _kept(cos_t, torch.arange(len(target), device=target.device).repeat_interleave(3), self.ss_ratio)
        return [
            F.cross_entropy(plain_s, target),
            softened_kl(plain_s, plain_t, self.kd_t),
            _kept_kl(rotated_s, rotated_t, self.tf_t, keep_tf),
            _kept_kl(cos_s, cos_t, self.ss_t, keep_ss),
        ]

    def pretrain(
        self, student: Tensors, teacher: Tensors, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Loss of the first stage: the teacher's head tells from which image a rotated one comes."""
        cos = _similarities(full(self.head_t(two(self.what, teacher, "logits, embedding")[1].detach())))
        return F.cross_entropy(cos, torch.arange(cos.shape[1], device=cos.device).repeat_interleave(3))

    def _checked(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        """The labels (B,), if they and the tensors are what the loss reads."""
        same_shapes(self.what, [student.shape], [teacher.shape])
        if target is not None and len(student) != 4 * len(target):
            raise UserError(
                f"loss 'sskd' reads images, each with three rotations: got {len(student)} rows for {len(target)} labels"
            )
        return checked_labels(self.what, target, student[::4])


def _head(shapes: Sequence[Shape], head: bool) -> nn.Module:
    if not head:
        return nn.Identity()
    if len(shapes) != 2:
        raise UserError(f"loss 'sskd' reads logits and embedding of each model, got {len(shapes)} shapes")
    width = shapes[1][0]
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Plain (B, ...) and rotated (3B, ...) rows of (4B, ...)."""
    groups = x.unflatten(0, (-1, 4))
    return groups[:, 0], groups[:, 1:].flatten(0, 1)


def _similarities(representation: Tensor) -> Tensor:
    """Cosine similarities (3B, B) of rotated with plain images."""
    plain, rotated = (F.normalize(x, dim=1) for x in _split(representation))
    return matmul(rotated, plain.T)


def _kept(scores: Tensor, truth: Tensor, ratio: float) -> Tensor:
    """Rows (M,) that are kept, as zeros and ones: those whose truth scores highest, and the ``ratio`` of the others
    with the best ranks of the truth."""
    rank = (scores > scores.gather(1, truth[:, None])).sum(1)
    wrong = (rank > 0).sum()
    count = len(rank) - wrong + (wrong.double() * ratio).floor()
    position = rank.argsort(stable=True).argsort()
    return (position < count).to(scores.dtype)


def _kept_kl(student: Tensor, teacher: Tensor, temperature: float, kept: Tensor) -> Tensor:
    """T^2 KL averaged over the kept rows; 0 if none is kept."""
    return (kl_rows(student, teacher, temperature) * kept).sum() / kept.sum().clamp(min=1)
