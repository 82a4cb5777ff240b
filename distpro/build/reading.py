"""Where a model may be read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from distpro.config.schema import ModelConfig
from distpro.models import stage_taps
from pathways.call import Call
from pathways.probing import probe_shapes, readable, untouched
from pathways.registry import UserError
from pathways.stages import find_stages
from pathways.taps import LOGITS, check_taps, parse_tap, response_of

Response = Callable[[Any], Tensor | None]
"""A model's whole output → what logit losses read of it, see `distpro.task.Task.response`."""


@dataclass(frozen=True)
class Reading:
    """Where one model may be read.

    Attributes:
        stages: taps after its stages, shallow to deep.
        before_relu: the same before their last ReLU, where they end in one.
        embedding: tap of what enters the classifier, if it was found.
        classifier: the linear layer whose output is the model's response, if there is one.
        logits: tap of the model's own output.
        path: where the model is a child of another, its path there.
        problem: why no stages were found; raised where a config needs them.
    """

    stages: Sequence[str]
    before_relu: Sequence[str]
    embedding: str | None = None
    classifier: nn.Linear | None = None
    logits: str = LOGITS
    path: str = ""
    problem: str = ""

    def within(self, path: str) -> Reading:
        """The same places of a model that is the child ``path`` of another."""
        return replace(
            self,
            stages=[_below(path, tap) for tap in self.stages],
            before_relu=[_below(path, tap) for tap in self.before_relu],
            embedding=None if self.embedding is None else _below(path, self.embedding),
            logits=path if self.logits == LOGITS else f"{path}.{self.logits}",
            path=f"{path}.{self.path}" if self.path else path,
        )

    def own(self, taps: Sequence[str]) -> list[str]:
        """Taps that are named within this model."""
        return [self.logits if tap == LOGITS else _below(self.path, tap) for tap in taps]

    def taps(self, kinds: Sequence[str], before_relu: bool) -> list[str]:
        """Taps of the kinds that a loss reads: of ``stages``, ``last``, ``embedding``, ``logits``.
        Raises UserError where the model has no such place that is known."""
        if self.problem and {"stages", "last"} & set(kinds):
            raise UserError(self.problem)
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


def reading_of(config: ModelConfig, model: nn.Module, call: Call, response: Response = response_of) -> Reading:
    """The places that the config names; else those that the model states; else its stages as found by a probe.

    ``response``: what the task calls the model's response.
    """
    stated = stage_taps(model)
    found = _classifier(model, call, response)
    embedding = stated.embedding if stated is not None else f"{found}:input" if found else None
    classifier = model.get_submodule(found) if found else None
    assert classifier is None or isinstance(classifier, nn.Linear)
    if config.taps is not None:
        check_taps(model, config.taps, config.model)
        return Reading(config.taps, config.taps, embedding, classifier)
    if stated is not None:
        return Reading(stated.post, stated.pre, embedding, classifier)
    try:
        stages = find_stages(model, call)
    except UserError as error:  # terms that name their taps, or read the response, do not need any
        return Reading([], [], embedding, classifier, problem=str(error))
    return Reading(stages, before_relu(model, stages, call), embedding, classifier)


def _classifier(model: nn.Module, call: Call, response_in: Response) -> str | None:
    """Name of the linear layer whose output is the model's response: not just any last one, which in a detector is a
    box's head."""
    outputs: list[tuple[str, Tensor]] = []

    def note(name: str) -> Any:
        return lambda _module, _args, output: outputs.append((name, output))

    handles = [m.register_forward_hook(note(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    try:
        with untouched(model):
            model.eval()
            response = response_in(call.run(model))
    except UserError:  # a response that only the task can name
        return None
    finally:
        for handle in handles:
            handle.remove()
    if response is None:
        return None
    return next((n for n, out in reversed(outputs) if out is response or _same(out, response)), None)


def _same(output: Tensor, response: Tensor) -> bool:
    return output.shape == response.shape and output.data_ptr() == response.data_ptr()


def _below(path: str, tap: str) -> str:
    """A tap of a model that is the child ``path`` of another, as a tap of that other."""
    module, point, key = parse_tap(tap)
    module = ".".join(part for part in (path, "" if module == LOGITS else module) if part)
    return tap if not path else _named(module, point, key)


def _named(module: str, point: str, key: str | None) -> str:
    return module + ("" if point == "output" else f":{point}") + ("" if key is None else f"[{key}]")


def before_relu(model: nn.Module, taps: Sequence[str], call: Call) -> list[str]:
    """Each tap before its last ReLU, where it ends in one."""
    places = [parse_tap(tap) for tap in taps]
    wanted = [
        _named(module, "pre_relu", key) if point == "output" else tap
        for tap, (module, point, key) in zip(taps, places, strict=True)
    ]
    found = readable(model, wanted, call) if wanted else set()
    return [before if before in found else tap for tap, before in zip(taps, wanted, strict=True)]


def norms_before(model: nn.Module, taps: Sequence[str], call: Call) -> list[nn.BatchNorm2d | None]:
    """For each tap before a ReLU, the BatchNorm whose output it is, or is the sum of with a shortcut: the tapped module
    itself, or the last one of the tapped module that runs. None where there is none."""
    ran: list[nn.BatchNorm2d] = []

    def note(norm: nn.BatchNorm2d, *_: Any) -> None:
        ran.append(norm)

    handles = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    try:
        probe_shapes(model, taps, call)
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for tap in taps:
        inside = set(model.get_submodule(parse_tap(tap)[0]).modules())
        found.append(next((norm for norm in reversed(ran) if norm in inside), None))
    return found
