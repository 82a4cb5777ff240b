"""Factor transfer (Kim et al., NeurIPS 2018), Eq. 3 and 4.

Two stages. First the paraphraser, an autoencoder of the teacher's map, learns to reconstruct it: ``pretrain``. Then it
is frozen and the student's translator follows its factors, fs = translator(s), ft = encoder(t):

    form "attention" (default, RepDistiller):  mean of |a(fs) - a(ft)|^p,  a(f) = normalise(mean over channels of f^2)
    form "flat" (paper, Eq. 4):                each factor flattened and normalised; p = 1: mean absolute difference,
                                               p = 2: mean over batch of the 2-norm of the difference

``s`` (N, C_s, H_s, W_s), ``t`` (N, C_t, H_t, W_t), the last maps before pooling; factors have rate * C_t channels. Of
different sizes the larger factor is average-pooled first. Encoder and translator are three 3x3 convolutions with bias
and LeakyReLU(0.1); the translator has BatchNorm, the paraphraser has none. ``rate`` 0.5, ``p`` 1, as in RepDistiller,
whose weight is 200. Departure: none in the values; the frozen paraphraser gets no gradient here by construction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, linalg, nn

from distpro.losses._maps import BatchNorm2d, full, one_pair, same_size
from distpro.losses._masks import mean_counted, same_size_counted
from distpro.losses._options import POSITIVE
from distpro.losses.at import attention_map
from distpro.losses.base import LOSSES, DistillationLoss, Shape, Tensors, one_of, single
from pathways.registry import UserError


def encoder(in_channels: int, out_channels: int, batch_norm: bool) -> nn.Sequential:
    """Three 3x3 convolutions: in -> in -> out -> out channels, each with LeakyReLU(0.1)."""
    return _stack(nn.Conv2d, (in_channels, in_channels, out_channels, out_channels), batch_norm)


def _stack(convolution: type[nn.Module], channels: Sequence[int], batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip(channels[:-1], channels[1:], strict=True):
        norm = BatchNorm2d(after) if batch_norm else nn.Identity()
        layers += [convolution(before, after, 3, padding=1), norm, nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


class Paraphraser(nn.Module):
    """Autoencoder of teacher maps (N, C, H, W): ``encoder`` gives the factors (N, C_f, H, W), ``forward`` the maps."""

    def __init__(self, channels: int, factors: int, batch_norm: bool = False):
        super().__init__()
        self.encoder = encoder(channels, factors, batch_norm)
        self.decoder = _stack(nn.ConvTranspose2d, (factors, factors, channels, channels), batch_norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def order(what: str, p: int) -> int:
    """The order of a norm if it is 1 or 2, else UserError."""
    if p not in (1, 2):
        raise UserError(f"{what}: p must be 1 or 2, got {p}")
    return p


def unit_distance(student: Tensor, teacher: Tensor, p: int, mask: Tensor | None = None) -> Tensor:
    """Scalar distance of two maps (N, C, H, W), each normalised per sample: mean absolute difference (p = 1) or mean
    over the batch of the 2-norm of the difference (p = 2). Of different sizes the larger map is average-pooled. With
    ``mask`` (N, H, W) the maps are those of the positions that count."""
    student, teacher, mask = same_size_counted(full(student), full(teacher.detach()), mask)
    difference = F.normalize(student.flatten(1), dim=1) - F.normalize(teacher.flatten(1), dim=1)
    if p == 2:
        return linalg.vector_norm(difference, dim=1).mean()
    return mean_counted(difference.abs().view_as(student), mask)


@LOSSES.register("ft")
class FactorTransfer(DistillationLoss):
    """Distance between the translated student map and the paraphrased teacher map."""

    title = "Paraphrasing Complex Network: Network Compression via Factor Transfer"
    paper = "Kim et al., Paraphrasing Complex Network: Network Compression via Factor Transfer, NeurIPS 2018"
    year = 2018
    family = "feature"
    reads = "last features before pooling"
    taps = ("last",)
    pretrain_reads = "teacher"
    formula = "mean |a(translator(s)) - a(encoder(t))|, a(f) = normalise(mean_c f^2)"
    stages = 2
    ranges = {"rate": POSITIVE}

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        rate: float = 0.5,
        p: int = 1,
        form: str = "attention",
    ):
        super().__init__(student_shapes, teacher_shapes)
        student, teacher = one_pair(self.what, self.student_shapes, self.teacher_shapes)
        self.form = one_of(f"{self.what}: form", form, ("attention", "flat"))
        self.p = order(self.what, p)
        factors = max(1, int(teacher[0] * rate))
        self.translator = encoder(student[0], factors, batch_norm=True)
        self.paraphraser = Paraphraser(teacher[0], factors)

    def pretrain(
        self, student: Tensors, teacher: Tensors, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        """Loss of the first stage: mean squared reconstruction error of the teacher's map."""
        features = full(single(teacher, self.what).detach())
        return F.mse_loss(self.paraphraser(features), features)

    def forward(
        self, student: Tensors, teacher: Tensors, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        with torch.no_grad():
            factor_t = self.paraphraser.encoder(single(teacher, self.what))
        return self.distance(self.translator(single(student, self.what)), factor_t)

    def distance(self, factor_s: Tensor, factor_t: Tensor) -> Tensor:
        """Scalar loss of two factors (N, C_f, H, W)."""
        if self.form == "flat":
            return unit_distance(factor_s, factor_t, self.p)
        factor_s, factor_t = same_size(full(factor_s), full(factor_t.detach()))
        difference = attention_map(factor_s) - attention_map(factor_t)
        return difference.abs().mean() if self.p == 1 else difference.square().mean()
