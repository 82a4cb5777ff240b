"""The files that a training goes on from."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distpro.files import load_safely
from distpro.objective import Objective
from distpro.train.attributes import Attributes
from pathways.registry import UserError

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
"""The last one, and the one before."""

VERSION = 1


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint. Raises UserError if it is damaged or of a newer version, with the one before where that is
    whole."""
    try:
        state = load_safely(path)
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise UserError(f"{path}: is no checkpoint of a run")
    except UserError as error:
        before = path.with_name(PREVIOUS)
        if path.name != PREVIOUS and before.is_file():
            step = read_checkpoint(before)["step"]
            raise UserError(f"{error}; the one before is whole, of step {step}: mv {before} {path}") from None
        raise
    version = state.get("version", VERSION)  # which the first ones do not say
    if version != VERSION:
        raise UserError(f"{path}: a checkpoint of version {version!r}; this distpro reads {VERSION}")
    return state


def load_checkpoint_into(load: Callable[[dict[str, Any]], None], path: Path) -> None:
    """Let ``load`` take the state in a checkpoint. Raises UserError as `read_checkpoint` does, and where it does not fit."""
    state = read_checkpoint(path)
    try:
        load(state)
    except (LookupError, RuntimeError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
        raise UserError(f"{path}: does not fit this run ({reason})") from None


class ModuleState:
    """What a checkpoint holds of the student and the terms."""

    def __init__(self, objective: Objective):
        self._objective = objective
        self._attributes = Attributes(self._models)

    @property
    def _models(self) -> dict[str, nn.Module]:
        return {"student": self._objective.student.model, "terms": self._objective.terms}

    def state_dict(self) -> dict[str, Any]:
        """Parameters, buffers, and attributes that have changed."""
        states = {kind: model.state_dict() for kind, model in self._models.items()}
        return {**states, "attributes": self._attributes.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Back to a state from `state_dict`."""
        for kind, model in self._models.items():
            model.load_state_dict(state[kind])
        self._attributes.load_state_dict(state.get("attributes", []), self._objective.device)  # which older ones lack

    def check(self) -> None:
        """Raise UserError where a module's ``get_extra_state`` gives what no checkpoint can be read back with: the work of a run
        that is stopped would be lost. Say which attribute is lost."""
        for kind, model in self._models.items():
            for path, module in model.named_modules():
                if type(module).get_extra_state is not nn.Module.get_extra_state:
                    place = f"'{path}'" if path else "the whole model"
                    _check_extra_state(module, f"{kind}: get_extra_state of {place} ({type(module).__name__})")
        self._attributes.say_what_is_lost()


def _check_extra_state(module: nn.Module, what: str) -> None:
    state = module.get_extra_state()
    if not _is_read_back(state):
        kind = type(_not_read_back(state))
        raise UserError(
            f"{what} gives {kind.__module__}.{kind.__qualname__}, which no checkpoint is read back with (allowed: None, numbers, "
            "strings, tensors, and lists, tuples and dicts of them)"
        )


def _is_read_back(value: Any) -> bool:
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # whatever an object raises when it is pickled, or the unpickler says of it
        return False
    return True


def _not_read_back(value: Any) -> Any:
    """The innermost object that is not."""
    inner: Any = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    wrong = [x for x in inner if not _is_read_back(x)]
    return _not_read_back(wrong[0]) if wrong else value
