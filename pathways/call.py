"""How one batch meets a model: the arguments of a forward pass.

A `Call` is what stands between the parentheses of ``model(...)``. A tensor or a tuple of them becomes positional
arguments, a mapping keyword arguments; a list stays one argument, as detection models take a list of images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Call(NamedTuple):
    """Positional and keyword arguments of one forward pass.

    >>> Call.of(torch.zeros(2, 3)).run(nn.Linear(3, 1)).shape
    torch.Size([2, 1])
    >>> sorted(Call.of({"input_ids": torch.zeros(2, 3), "attention_mask": torch.ones(2, 3)}).kwargs)
    ['attention_mask', 'input_ids']
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}

    @classmethod
    def of(cls, inputs: Any) -> Call:
        """The call that a batch's inputs stand for: a `Call` is one already, a tuple gives positional and a mapping
        keyword arguments, and anything else (a tensor, a list) is the one positional argument."""
        if isinstance(inputs, Call):
            return inputs
        if isinstance(inputs, Mapping):
            return cls((), inputs)
        return cls(inputs if isinstance(inputs, tuple) else (inputs,))

    def run(self, model: Callable[..., Any]) -> Any:
        """``model(*args, **kwargs)``."""
        return model(*self.args, **self.kwargs)

    def copied(self) -> Call:
        """The same with copies of the tensors, for models that write to their input."""
        return Call(map_tensors(torch.clone, self.args), map_tensors(torch.clone, dict(self.kwargs)))

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor among the arguments, inside containers too."""
        return tensors_in((self.args, dict(self.kwargs)))

    @property
    def device(self) -> torch.device:
        """The device of the first tensor; the CPU if there is none."""
        return next((t.device for t in self.tensors()), torch.device("cpu"))

    @property
    def sole(self) -> Tensor | None:
        """The tensor of a call with that one argument, None for any other call."""
        one = len(self.args) == 1 and not self.kwargs and isinstance(self.args[0], Tensor)
        return self.args[0] if one else None


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists, mappings and dataclasses, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from tensors_in(inner)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """The same nested containers with ``function`` of every tensor; what is no tensor stays as it is.

    Tuples, lists, dataclasses and mappings of a type of their own (a Hugging Face ``ModelOutput``) keep that type.
    """
    if isinstance(value, Tensor):
        return function(value)
    if is_dataclass(value) and not isinstance(value, type):
        return _of_fields(value, function)
    if isinstance(value, Mapping):
        changed = {key: map_tensors(function, inner) for key, inner in value.items()}
        if type(value) is dict:
            return changed
        if not isinstance(value, MutableMapping):
            return type(value)(changed)  # type: ignore[call-arg]
        same_kind = copy(value)  # a defaultdict and the like cannot be made from a mapping
        for key, inner in changed.items():
            same_kind[key] = inner
        return same_kind
    if isinstance(value, (tuple, list)):
        return _of_kind(value, [map_tensors(function, inner) for inner in value])
    return value


def _of_fields(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """A dataclass of the same type with ``function`` of the tensors in its fields, and in what it keeps beside them. It is not made
    anew: an ``__init__`` of its own may take something else than the fields, and a ``__post_init__`` would change them twice."""
    same_kind: Any = copy(value) if isinstance(value, Mapping) else object.__new__(type(value))
    held = {**getattr(value, "__dict__", {}), **{f.name: getattr(value, f.name) for f in fields(value)}}
    changed = {name: map_tensors(function, inner) for name, inner in held.items()}
    if isinstance(value, MutableMapping):
        for key, inner in value.items():
            is_field = key in held and held[key] is inner
            same_kind[key] = changed[key] if is_field else map_tensors(function, inner)
    for name, inner in changed.items():
        object.__setattr__(same_kind, name, inner)  # a frozen one has no setattr
    return same_kind


def _of_kind(value: tuple[Any, ...] | list[Any], items: list[Any]) -> Any:
    """A tuple or list of the same type with other items. What a class asks for when it makes one is its own business."""
    if type(value) is list:
        return items
    if isinstance(value, list):
        same_kind = copy(value)
        same_kind[:] = items
        return same_kind
    try:
        made = tuple.__new__(type(value), items)
    except TypeError:  # those written in C: torch.Size, what torch.max returns
        return type(value)(items)
    if hasattr(value, "__dict__"):
        vars(made).update(vars(value))
    return made


def run(model: nn.Module, inputs: Any) -> Any:
    """The model's output for inputs of any kind, see `Call.of`."""
    return Call.of(inputs).run(model)
