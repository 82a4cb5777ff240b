"""Factors that make the terms of a pooled search space alike in size, so that none wins because its loss is written
in larger units.

A weight times a loss acts on the student through its gradient. With ``gradient``, term j gets the factor

    s_j = ‖∇_θ L_task‖ / ‖∇ ℓ_j‖        (norms averaged over the first batches)

so that one unit of weight pulls as hard as the task loss, whatever the term's units: c · ℓ_j has s_j / c. ∇ ℓ_j is by
the student's parameters and the term's own (transforms, regressors), because the factor multiplies the steps of both: a
term whose own parameters feel it a thousand times more than the student would tear them apart otherwise. ``loss`` does
the same with the losses' own values, s_j = L_task / |ℓ_j|: cheaper, and blind to a loss whose value says little of its
slope. The factors are constants: measured once before the first step, kept in the schedule, and applied again when it
is replayed, so that λ and w mean the same in search and retrain.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from distpro.batch import Batch
from distpro.objective import Objective
from distpro.train import distributed
from distpro.train.state import no_trace
from pathways.registry import UserError

WAYS = ("none", "loss", "gradient")


def measure_scales(objective: Objective, batches: Iterable[Batch], how: str = "gradient") -> Tensor:
    """The factor of each entry of the vector of term losses, (N,) float32. Leaves no trace in the models.

    Args:
        batches: what to measure on; a few training batches.
        how: ``gradient`` or ``loss``.

    A term without any effect (its loss or gradient is zero on all batches) keeps the factor 1.
    Raises UserError for another word, where the measure of a term is not finite, and where the task loss's is zero.
    """
    if how not in WAYS[1:]:
        raise UserError(f"cannot normalise by '{how}' (allowed: {', '.join(WAYS)})")
    with no_trace(objective.student, objective.terms), torch.enable_grad():
        rows = torch.stack([_sizes(objective, batch, how) for batch in batches]).double()
        distributed.average([rows])
    task, terms = rows[:, 0].mean(), rows[:, 1:].mean(0)
    if task == 0:
        raise UserError(f"normalise: the task loss has no {how} to compare with")
    if not torch.isfinite(rows).all():
        bad = [k for k, finite in zip(objective.keys, torch.isfinite(terms).tolist(), strict=True) if not finite]
        raise UserError(f"normalise: not finite before the first step: {', '.join(bad) or 'the task loss'}")
    return torch.where(terms > 0, task / terms.clamp(min=torch.finfo(terms.dtype).tiny), 1.0).float()


def _sizes(objective: Objective, batch: Batch, how: str) -> Tensor:
    """Size of the task loss and of each entry, (1 + N,)."""
    output, features = objective.run_student(batch)
    losses = objective.term_losses(features, objective.run_teacher(replace(batch, index=None)), batch)
    scalars = [objective.task_loss_of(output, batch), *(loss for loss in losses if loss is not None)]
    if how == "loss":
        return torch.stack([scalar.detach().abs().float() for scalar in scalars])
    params = objective.trainable_parameters()
    return torch.stack([_norm(scalar, params) for scalar in scalars])


def _norm(scalar: Tensor, params: list[torch.nn.Parameter]) -> Tensor:
    if not scalar.requires_grad:
        return torch.zeros((), device=scalar.device)
    gradients = torch.autograd.grad(scalar, params, retain_graph=True, allow_unused=True)
    found = [g for g in gradients if g is not None]
    distributed.average(found)
    return torch.nn.utils.get_total_norm(found).float()
