"""Whether forward mode, or a sweep, can do with what is trained: tried on two samples, before the first step."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from distpro.batch import Batch
from distpro.objective import Objective, entries_of
from distpro.search.estimators.formulas import Formulas
from distpro.search.estimators.forward_mode import StudentFeatures, shares_parameters
from distpro.search.estimators.tangents import NoRule, forward_mode
from distpro.train.state import no_trace, random_state, set_random_state
from pathways.call import Call

AGREEMENT = 0.005
"""Relative difference of the two derivatives that may be rounding. In float32 it is below 1e-6 for this package's and
torchvision's models; TF32 has ten bits. A part of the model that has no tangent is far above it."""


def obstacle(objective: Objective, batch: Batch, clipped: bool = False) -> str:
    """Why the search cannot use forward mode, in words; "" where it can. Leaves no trace in the student. ``clipped``: whether
    gradients are.

    An operator without a rule says so or, where it is not PyTorch's own (torchvision's, custom ones), loses its tangent
    without a word. So for every tensor f that a term may read, g its gradient of ⟨c, f⟩ for a random c, scaled to ‖g‖ = 1, the
    tangent ḟ along the sum G of all g is compared with it: ⟨c, ḟ⟩ = ⟨g, G⟩. What is behind the last tap does not matter: the
    regions of a detector come after its pyramid.
    """
    for term in objective.terms:
        if len(entries_of(term)) > 1:
            return f"term '{term.key}' has several weights"
    if shared := shares_parameters(objective, clipped):
        return shared
    student, call = StudentFeatures(objective), Call((batch,))
    with no_trace(student), sdpa_kernel(SDPBackend.MATH):
        state = random_state(student)
        parameters, found = dict(student.named_parameters()), None
        try:
            found = _gradients(student, call)
            direction = _sum([g for _, g in found.values()])
        except Exception:  # two samples may be too few for it; what else is wrong shows in the first training step
            direction = {name: torch.randn_like(p) for name, p in parameters.items()}
        set_random_state(state)
        try:
            tangents = forward_mode(student, parameters, direction, call)
        except NoRule as error:
            return f"{error.operator} has no forward-mode rule"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if found is None:
                return ""
            return f"a forward-mode pass fails where a plain one does not ({str(error).splitlines()[0][:160]})"
    for name, (cotangent, gradient) in (found or {}).items():
        expected = sum(_dot(g, direction[n]) for n, g in gradient.items())
        if abs(_dot(cotangent, tangents[name]) - expected) > AGREEMENT * max(1.0, abs(expected)):
            return (
                f"its tangents are not its derivative at {name} (does an operator of a library or of your own have no "
                "forward-mode rule?)"
            )
    return ""


def second_obstacle(objective: Objective, batch: Batch) -> str:
    """Which operator of the student or of a loss has no second derivative, by its name; "" where none is known. Leaves no
    trace."""
    quiet = no_trace(objective.student, objective.terms)
    with quiet, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), Formulas():
        try:
            loss = objective.training_pass(batch, [1.0] * len(objective.entries)).loss
            if once := _once(loss):
                return once
            parameters = objective.trainable_parameters()
            found = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
            gradients = [g for g in found if g is not None and g.requires_grad]
            torch.autograd.grad(torch.stack([g.sum() for g in gradients]).sum(), parameters, allow_unused=True)
        except (NotImplementedError, RuntimeError) as error:
            named = re.search(r"derivative for '?([\w:]+?)(_backward)?'? is not implemented", str(error))
            named = named or re.search(r"double backwards on ([\w:]+) not supported", str(error))  # torchvision's
            return named[1].removeprefix("aten::") if named else ""
    return ""


def _once(loss: Tensor) -> str:
    """Name of an autograd.Function under a loss that is marked with ``once_differentiable``: autograd leaves its part of a second
    derivative out, and says so only on some ways to it."""
    pending, seen = [loss.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        pending += [before for before, _ in node.next_functions]
        backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
        code = getattr(backward, "__code__", None) if hasattr(backward, "__wrapped__") else None
        if code is not None and code.co_filename == once_differentiable.__code__.co_filename:
            return str(node._forward_cls.__name__)  # type: ignore[attr-defined]
    return ""


def _gradients(student: StudentFeatures, call: Call) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """For every tensor f of the student that may be read and has a gradient: c, and the gradient of ⟨c, f⟩ by each parameter that
    has one, of norm 1 together."""
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    found = {}
    with torch.enable_grad():
        for name, feature in call.run(student).items():
            if not (feature.is_floating_point() and feature.requires_grad):
                continue
            cotangent = torch.randn_like(feature) / max(feature.numel(), 1) ** 0.5
            own = torch.autograd.grad(
                feature, list(parameters.values()), cotangent, retain_graph=True, allow_unused=True
            )
            gradient = {n: g for n, g in zip(parameters, own, strict=True) if g is not None}
            norm = sum(_dot(g, g) for g in gradient.values()) ** 0.5
            if norm > 0:
                found[name] = cotangent / norm, {n: g / norm for n, g in gradient.items()}
    return found


def _sum(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Sums by name."""
    total: dict[str, Tensor] = {}
    for part in parts:
        total |= {name: total[name] + g if name in total else g for name, g in part.items()}
    return total


def _dot(a: Tensor, b: Tensor) -> float:
    return (a.double() * b.double()).sum().item()
