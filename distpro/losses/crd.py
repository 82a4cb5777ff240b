"""Contrastive representation distillation (Tian et al., ICLR 2020) with the authors' memory bank.

    e = linear(f) / ||linear(f)||                                 (N, feat_dim), one linear layer per model
    P = exp(<memory of the other model[j], e> / nce_t) / Z        j = the sample itself, then K negatives
    loss = sum over both sides of -mean over the batch of
           (log P_0 / (P_0 + K/n + eps) + sum_{j=1..K} log (K/n) / (P_j + K/n + eps))

The student's embedding is contrasted with the bank of teacher embeddings and the reverse. Z is fixed by the first
training call (n times the mean of the exponentials). After each training call the batch's rows of both banks move:
memory <- normalise(nce_m memory + (1 - nce_m) e).

Embeddings (N, D) before the classifier (maps are flattened). ``index`` (N,): numbers of the samples in the data set of
``n_data`` = n samples; the K = ``nce_k`` negatives are then drawn here with replacement: from the other classes if
``labels`` (n,) of the whole set are given (RepDistiller's "exact" mode), else from the whole set. ``index`` (N, 1 + K)
states the negatives, after the sample itself. ``feat_dim`` = 128, ``nce_k`` = 16384, ``nce_t`` = 0.07, ``nce_m`` =
0.5, eps = 1e-7 are RepDistiller's, whose weight is 0.8. The embeddings are parameters, the banks buffers (2 n feat_dim
numbers).

Departures: RepDistiller draws negatives without replacement in its data set; banks rest in evaluation mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distpro.losses._maps import full, matmul
from distpro.losses._options import COUNT, POSITIVE, SHARE
from distpro.losses._rows import linear_embeds
from distpro.losses.base import LOSSES, DistillationLoss, Shape, Tensors, single
from pathways.registry import UserError

_EPS = 1e-7


@LOSSES.register("crd")
class Contrastive(DistillationLoss):
    """Noise-contrastive estimation of the mutual information between both models' embeddings."""

    title = "Contrastive Representation Distillation"
    paper = "Tian et al., Contrastive Representation Distillation, ICLR 2020"
    year = 2020
    family = "relation"
    reads = "embedding"
    taps = ("embedding",)
    needs = ("n_data", "labels")
    formula = "-log h(e_s, m_t+) - sum_neg log(1 - h(e_s, m_t-)) + the same with s, t exchanged"
    needs_index = True
    scalars = ("nce_t", "nce_m")
    ranges = {"feat_dim": COUNT, "nce_k": COUNT, "nce_t": POSITIVE, "nce_m": SHARE}

    memory_s: Tensor
    memory_t: Tensor
    normalizer: Tensor
    labels: Tensor
    by_class: Tensor
    class_sizes: Tensor

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        n_data: int = 0,
        feat_dim: int = 128,
        nce_k: int = 16384,
        nce_t: float = 0.07,
        nce_m: float = 0.5,
        labels: Sequence[int] | Tensor | None = None,
    ):
        super().__init__(student_shapes, teacher_shapes)
        if n_data < 1:
            raise UserError("loss 'crd' needs n_data, the number of training samples")
        self.n_data, self.nce_k, self.nce_t, self.nce_m = n_data, nce_k, nce_t, nce_m
        self.embed_s, self.embed_t = linear_embeds(self.what, self.student_shapes, self.teacher_shapes, feat_dim)
        bound = math.sqrt(3 / feat_dim)  # rows of about unit length
        self.register_buffer("memory_s", torch.empty(n_data, feat_dim).uniform_(-bound, bound))
        self.register_buffer("memory_t", torch.empty(n_data, feat_dim).uniform_(-bound, bound))
        self.register_buffer("normalizer", torch.full((2,), -1.0))  # Z of the student's and the teacher's side
        self._index_classes(labels)

    def _index_classes(self, labels: Sequence[int] | Tensor | None) -> None:
        known, sizes = torch.zeros(self.n_data, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)  # one empty class
        if labels is not None:
            known = torch.as_tensor(labels, dtype=torch.int64)
            if known.shape != (self.n_data,):
                raise UserError(f"loss 'crd': labels must be n_data = {self.n_data} numbers, got {known.numel()}")
            sizes = torch.bincount(known)
            if sizes.max() == self.n_data:
                raise UserError("loss 'crd': all labels are one class, there are no negatives")
        self.register_buffer("labels", known, persistent=False)
        self.register_buffer("by_class", known.argsort(stable=True), persistent=False)
        self.register_buffer("class_sizes", sizes, persistent=False)

    def forward(
        self, student: Tensors, teacher: Tensors, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tensor:
        if index is None:
            raise UserError("loss 'crd' needs the samples' numbers in the data set: pass index")
        samples = index if index.dim() == 2 else torch.cat([index[:, None], self.draw_negatives(index)], dim=1)
        e_s = F.normalize(full(self.embed_s(single(student, self.what).flatten(1))), dim=1)
        e_t = F.normalize(full(self.embed_t(single(teacher, self.what).detach().flatten(1))), dim=1)
        scores = [self._scores(self.memory_t, samples, e_s), self._scores(self.memory_s, samples, e_t)]
        normalizer = self._normalizers(scores)
        loss = sum((self._contrast(s / z) for s, z in zip(scores, normalizer, strict=True)), start=e_s.new_zeros(()))
        if self.training:
            self.normalizer.copy_(normalizer)
            self._remember(self.memory_s, samples[:, 0], e_s.detach())
            self._remember(self.memory_t, samples[:, 0], e_t.detach())
        return loss

    def draw_negatives(self, index: Tensor) -> Tensor:
        """Numbers (N, nce_k) of random samples, of other classes than the sample's if labels are known."""
        own = self.labels[index]
        size = self.class_sizes[own][:, None]
        begin = (self.class_sizes.cumsum(0) - self.class_sizes)[own][:, None]
        uniform = torch.rand(len(index), self.nce_k, dtype=torch.float64, device=index.device)
        position = (uniform * (self.n_data - size)).long()
        return self.by_class[
            position + size * (position >= begin)
        ]  # samples sorted by class, the own class jumped over

    def _scores(self, memory: Tensor, samples: Tensor, embedding: Tensor) -> Tensor:
        return (matmul(memory[samples], embedding[:, :, None]).squeeze(2) / self.nce_t).exp()

    def _normalizers(self, scores: list[Tensor]) -> Tensor:
        first = torch.stack([s.detach().mean() for s in scores]) * self.n_data
        return torch.where(self.normalizer < 0, first.to(self.normalizer.dtype), self.normalizer)

    def _contrast(self, p: Tensor) -> Tensor:
        """NCE loss of probabilities (N, 1 + K), the positive first."""
        noise = (p.shape[1] - 1) / self.n_data
        positive = (p[:, 0] / (p[:, 0] + noise + _EPS)).log()
        negatives = (noise / (p[:, 1:] + noise + _EPS)).log()
        return -(positive.sum() + negatives.sum()) / len(p)

    def _remember(self, memory: Tensor, index: Tensor, embedding: Tensor) -> None:
        moved = self.nce_m * memory[index] + (1 - self.nce_m) * embedding
        memory.index_copy_(0, index, F.normalize(moved, dim=1))
