"""Image classification: cross entropy, top-1 and top-5 accuracy."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


class Classification:
    """Task of predicting one of ``num_classes`` labels.

    Args:
        label_smoothing: of the training loss; evaluation uses the plain cross entropy.
    """

    headline = "accuracy"
    """The metric that tables report."""

    def __init__(self, label_smoothing: float = 0.0):
        self.label_smoothing = label_smoothing

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean cross entropy of logits (N, K) and labels (N,)."""
        return F.cross_entropy(output, target, label_smoothing=self.label_smoothing)

    def metrics(self, output: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Sums over a batch, on its device: of correct answers and of the cross entropy. `Trainer.test` divides by the
        number of samples, so that nothing is read from the device before the end."""
        ranked = output.topk(min(5, output.shape[1]), dim=1).indices == target[:, None]
        return {
            "accuracy": 100 * ranked[:, 0].sum(),
            "top5": 100 * ranked.any(1).sum(),
            "loss": F.cross_entropy(output.float(), target, reduction="sum"),
        }
