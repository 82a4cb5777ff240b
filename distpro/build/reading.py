"""Where a model may be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from distpro.config.schema import ModelConfig
from distpro.models import stage_taps
from pathways import find_stages, probe_shapes
from pathways.registry import UserError
from pathways.taps import LOGITS, check_taps


@dataclass(frozen=True)
class Reading:
    """Where one model may be read.

    Attributes:
        stages: taps after its stages, shallow to deep.
        before_relu: the same before their last ReLU, where they end in one.
        embedding: tap of what enters the classifier, if it was found.
        classifier: the last linear layer, if there is one.
        logits: tap of the model's own output.
        path: where the model is a child of another, its path there.
    """

    stages: Sequence[str]
    before_relu: Sequence[str]
    embedding: str | None = None
    classifier: nn.Linear | None = None
    logits: str = LOGITS
    path: str = ""

    def within(self, path: str) -> Reading:
        """The same places of a model that is the child ``path`` of another."""
        return replace(
            self,
            stages=[f"{path}.{tap}" for tap in self.stages],
            before_relu=[f"{path}.{tap}" for tap in self.before_relu],
            embedding=None if self.embedding is None else f"{path}.{self.embedding}",
            logits=path if self.logits == LOGITS else f"{path}.{self.logits}",
            path=f"{path}.{self.path}" if self.path else path,
        )

    def own(self, taps: Sequence[str]) -> list[str]:
        """Taps that are named within this model."""
        return [self.logits if tap == LOGITS else f"{self.path}.{tap}" if self.path else tap for tap in taps]

    def taps(self, kinds: Sequence[str], before_relu: bool) -> list[str]:
        """Taps of the kinds that a loss reads: of ``stages``, ``last``, ``embedding``, ``logits``.
        Raises UserError where the model has no such place that is known."""
        stages = list(self.before_relu if before_relu else self.stages)
        found: list[str] = []
        for kind in kinds:
            if kind == "embedding" and self.embedding is None:
                raise UserError("reads an embedding: name student_taps and teacher_taps (for instance fc:input)")
            places: dict[str, list[str | None]] = {
                "stages": [*stages],
                "last": [*stages[-1:]],
                "embedding": [self.embedding],
                "logits": [self.logits],
            }
            found += [tap for tap in places[kind] if tap is not None]
        return found


def reading_of(config: ModelConfig, model: nn.Module, x: Tensor) -> Reading:
    """The places that the config names; else those that the model states; else its stages as found by a probe."""
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    stated = stage_taps(model)
    last, classifier = linear[-1] if linear else (None, None)
    embedding = stated.embedding if stated is not None else f"{last}:input" if last else None
    if config.taps is not None:
        check_taps(model, config.taps, config.model)
        return Reading(config.taps, config.taps, embedding, classifier)
    if stated is not None:
        return Reading(stated.post, stated.pre, embedding, classifier)
    stages = find_stages(model, x)
    return Reading(stages, [_before_relu(model, tap, x) for tap in stages], embedding, classifier)


def _before_relu(model: nn.Module, tap: str, x: Tensor) -> str:
    try:
        probe_shapes(model, [f"{tap}:pre_relu"], x)
        return f"{tap}:pre_relu"
    except UserError:
        return tap


def norm_before(model: nn.Module, tap: str, x: Tensor) -> nn.BatchNorm2d | None:
    """The BatchNorm whose output a tap before a ReLU is, or is the sum of with a shortcut: the tapped module itself, or
    the last one of the tapped module that runs."""
    path = tap.partition(":")[0]
    module = model.get_submodule(path)
    ran: list[nn.BatchNorm2d] = []
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]

    def note(norm: nn.BatchNorm2d, *_: Any) -> None:
        ran.append(norm)

    handles = [m.register_forward_hook(note) for m in norms]
    try:
        probe_shapes(model, [tap], x)
    finally:
        for handle in handles:
            handle.remove()
    return ran[-1] if ran else None
