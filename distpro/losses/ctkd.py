"""Curriculum temperature (Li et al., AAAI 2023) with the global temperature.

    T    = start + span * sigmoid(theta),   theta a learned scalar, 1 at the start
    loss = T^2 * mean over the batch of KL(softmax(t/T) || softmax(s/T))

The student minimises the loss and theta maximises it: the gradient by theta is multiplied by -lambda, which grows over
``warmup_steps`` training calls as (1 - cos(pi * n / warmup_steps)) / 2 from 0 to 1 and stays there. Logits (N, K) or
(N, K, H, W). ``start`` = 1, ``span`` = 20, so 1 < T < 21 (authors' scripts); ``warmup_steps`` = 7820 is their 10
epochs of CIFAR-100 in batches of 64. theta is a parameter of the loss and goes to the same optimiser as the student.

Departures: lambda grows per step instead of per epoch; the instance-wise temperature (a small network on both logits)
is not included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distpro.losses._options import NOT_NEGATIVE, POSITIVE
from distpro.losses._rows import ResponseLoss, softened_kl
from distpro.losses.base import LOSSES, Shape
from pathways.registry import UserError


@LOSSES.register("ctkd")
class CurriculumTemperature(ResponseLoss):
    """Knowledge distillation at a temperature that is learned against the student."""

    title = "Curriculum Temperature for Knowledge Distillation"
    paper = "Li et al., Curriculum Temperature for Knowledge Distillation, AAAI 2023"
    year = 2023
    formula = "T^2 KL(softmax(t/T) || softmax(s/T)), T = start + span sigmoid(theta) with reversed gradient"
    once_only = "theta's gradient is reversed, and its derivative would be reversed once more"

    scalars = ("start", "span")
    ranges = {"start": POSITIVE, "span": NOT_NEGATIVE}

    step: Tensor

    def __init__(
        self,
        student_shapes: Sequence[Shape] = (),
        teacher_shapes: Sequence[Shape] = (),
        start: float = 1.0,
        span: float = 20.0,
        warmup_steps: int = 7820,
    ):
        super().__init__(student_shapes, teacher_shapes)
        if warmup_steps < 1:
            raise UserError(f"loss 'ctkd': warmup_steps must be at least 1, got {warmup_steps}")
        self.start, self.span, self.warmup_steps = start, span, warmup_steps
        self.theta = nn.Parameter(torch.ones(()))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @property
    def reversal(self) -> Tensor:
        """lambda at the current step, a scalar in 0..1."""
        return (1 - torch.cos(math.pi * (self.step / self.warmup_steps).clamp(max=1))) / 2

    @property
    def temperature(self) -> Tensor:
        """T, a scalar through which theta gets the reversed gradient."""
        strength = self.reversal.to(self.theta.dtype)
        theta = (1 + strength) * self.theta.detach() - strength * self.theta  # theta, but its derivative is -strength
        return self.start + self.span * theta.sigmoid()

    def compare(self, student: Tensor, teacher: Tensor, target: Tensor | None) -> Tensor:
        loss = softened_kl(student, teacher, self.temperature)
        if self.training and torch.is_grad_enabled():
            self.step += 1
        return loss
