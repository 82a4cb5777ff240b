"""Activation boundaries of one layer or an unweighted sum of layers (Heo et al., AAAI 2019), Eq. 4.

    loss_i = 1/N * sum of relu(margin - sign(t_i) s_i)^2

The criterion, shapes, connectors and default margin of `ab`, without its layer weights; this is torchdistill's form.
Departure: torchdistill configures the connectors by hand; here they are made as in `ab`, where shapes differ.
"""

from __future__ import annotations

from distpro.losses.ab import ActivationBoundary
from distpro.losses.base import LOSSES


@LOSSES.register("dab")
class UnweightedActivationBoundary(ActivationBoundary):
    """Squared hinge on the sign of the teacher's pre-activations, layers unweighted."""

    formula = "sum_i 1/N sum relu(margin - sign(t_i) s_i)^2"

    def weight(self, i: int) -> float:
        """Weight of level ``i``: 1 for all."""
        return 1.0
