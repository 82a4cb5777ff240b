"""DIST+ (Huang et al., TPAMI 2025): DIST on the logits and correlations of one feature map, as torchdistill has them.

    loss = DIST(logits) + iota * channel + kappa * spatial
    channel = 1 - mean over samples and positions of rho over the channels
    spatial = 1 - mean over positions of rho over the samples, of maps summed over channels

``rho`` is the Pearson correlation of student and teacher. Reads [logits (N, K), map (N, C, H, W)] of each model; equal
channel counts; of different sizes the larger map is average-pooled. All positions count, of dense logits too. ``beta``,
``gamma``, ``tau`` and ``eps`` as in `dist`; all weights 1 (torchdistill's example has ``beta`` = ``gamma`` = 2). The
paper's adaptive teacher is another matter than this loss.

Departures: torchdistill 1.1.5 *adds* the channels' correlation where a distance is meant, which drives the maps apart;
``form="torchdistill"`` reproduces that, without the ``1 -``. eps is added to the product of norms, as in `dist`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from distpro.losses._maps import full, same_shapes, same_size
from distpro.losses._options import NOT_NEGATIVE, POSITIVE
from distpro.losses._rows import logit_rows, two
from distpro.losses.base import LOSSES, DistillationLoss, Shape, Tensors, one_of, option_of
from distpro.losses.dist import DIST, pearson
from pathways.registry import UserError


@LOSSES.register("dist_plus")
class DISTPlus(DistillationLoss):
    """Correlation of predictions and of one feature map, over channels and over samples."""

    title = "DIST+"
    paper = "Huang et al., DIST+: Knowledge Distillation From a Stronger Adaptive Teacher, TPAMI 2025"
    year = 2025
    family = "response"
    reads = "logits and the last features before pooling"
    taps = ("logits", "last")
    compares_classes = True
    scalars = ("beta", "gamma", "iota", "kappa", "tau")
    formula = "DIST(logits) + iota (1 - rho over channels) + kappa (1 - rho over samples of the map)"
    ranges = {"tau": POSITIVE, "eps": NOT_NEGATIVE}

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        beta: float = 1.0,
        gamma: float = 1.0,
        iota: float = 1.0,
        kappa: float = 1.0,
        tau: float = 1.0,
        eps: float = 1e-8,
        form: str = "distance",
    ):
        super().__init__(student_shapes, teacher_shapes)
        for shape in (*self.student_shapes[1:], *self.teacher_shapes[1:]):
            if len(shape) != 3:
                raise UserError(f"{self.what} reads a feature map (C, H, W), got {tuple(shape)}")
        same_shapes(self.what, [s[:1] for s in self.student_shapes], [t[:1] for t in self.teacher_shapes])
        self.form = one_of(f"{self.what}: form", form, ("distance", "torchdistill"))
        self.dist = DIST(beta=beta, gamma=gamma, tau=tau, eps=eps)
        self.iota, self.kappa, self.eps = iota, kappa, eps

    beta, gamma, tau = (option_of("dist", name) for name in ("beta", "gamma", "tau"))

    def forward(
        self, student: Tensors, teacher: Tensors, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        (logits_s, f_s), (logits_t, f_t) = (two(self.what, x, "logits, map") for x in (student, teacher))
        same_shapes(self.what, [f_s.shape[:2]], [f_t.shape[:2]])
        f_s, f_t = same_size(full(f_s), full(f_t.detach()))
        rho = pearson(logit_rows(f_s), logit_rows(f_t), self.eps).mean()
        channel = rho if self.form == "torchdistill" else 1 - rho
        summed_s, summed_t = (f.sum(1).flatten(1).T for f in (f_s, f_t))
        spatial = 1 - pearson(summed_s, summed_t, self.eps).mean()
        return self.dist(logits_s, logits_t) + self.iota * channel + self.kappa * spatial
