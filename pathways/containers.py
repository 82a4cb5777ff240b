"""The tensors inside a model's arguments and outputs by name, and two such containers compared.

A tensor's name is its way through the containers: positions of tuples and lists, keys of mappings, fields of named
tuples and dataclasses, joined by dots: ``logits``, ``0``, ``past.1.0``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from pathways.call import map_tensors
from pathways.registry import UserError, nearest

_SHOWN = 20


def items_of(value: Any) -> list[tuple[str, Any]] | None:
    """The named parts of a container, in order; None for what is none."""
    if isinstance(value, Mapping):
        return [(str(key), inner) for key, inner in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (tuple, list)):
        return [(str(position), inner) for position, inner in enumerate(value)]
    if is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    return None


def entries(value: Any, leaf: type | tuple[type, ...] = Tensor) -> dict[str, Any]:
    """Every tensor (every ``leaf``) inside nested containers by its dotted name; a bare one has the name ``""``.

    >>> x = Tensor([1.0])
    >>> list(entries({"logits": x, "past": [(x, x)], "loss": None}))
    ['logits', 'past.0.0', 'past.0.1']
    """

    def walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, leaf):
            yield path, value
            return
        for name, inner in items_of(value) or ():
            yield from walk(inner, f"{path}.{name}" if path else name)

    return dict(walk(value, ""))


def entry(value: Any, key: str | None, what: str, leaf: type | tuple[type, ...] = Tensor) -> Any:
    """The tensor (the ``leaf``) called ``key`` inside a container; without a key the only one there is. A key may stop
    at a container of a sole tensor. One tensor under several names counts as one.

    Raises UserError, beginning with ``what``, if there is no such tensor, or several without a key to choose by.
    """
    found = entries(value, leaf)
    chosen = found if key is None else named(found, key)
    if len({id(tensor) for tensor in chosen.values()}) == 1:
        return next(iter(chosen.values()))
    if not found:
        raise UserError(f"{what} gives {type(value).__name__}, not a tensor")
    if not chosen:
        if list(found) == [""]:
            raise UserError(f"{what}: there is no '{key}' in a tensor")
        raise UserError(f"{what}: no tensor '{key}'{nearest(str(key), found)} (there are: {shown(found)})")
    raise UserError(f"{what} gives several tensors; add the key of one in brackets: {shown(chosen)}")


def named(found: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Those of ``entries`` that are called ``key`` or lie in a container of that name."""
    return {name: tensor for name, tensor in found.items() if name == key or name.startswith(f"{key}.")}


def shown(names: Any) -> str:
    """Names for a message, the first ones of many."""
    names = list(names)
    return ", ".join(names[:_SHOWN]) + (f", ... ({len(names)} in all)" if len(names) > _SHOWN else "")


def copied(value: Any) -> Any:
    """The same containers with copies of the tensors. What is one tensor in two places stays one."""
    if isinstance(value, Tensor):
        return value.clone()
    if not entries(value):
        return value
    known: list[tuple[Tensor, Tensor]] = []

    def copy(tensor: Tensor) -> Tensor:
        for original, its_copy in known:
            if original is tensor:
                return its_copy
        known.append((tensor, tensor.clone()))
        return known[-1][1]

    return map_tensors(copy, value)


def alike(expected: Any, found: Any, tolerance: float | None = 0) -> bool:
    """Whether two values have the same containers with the same names, tensors of one shape and dtype that differ by no
    more than ``tolerance`` × the largest element of each, and else equal values. With None, tensors need the same shape
    only. NaN is like NaN."""
    if isinstance(expected, Tensor) and isinstance(found, Tensor):
        return _alike_tensors(expected, found, tolerance)
    if type(expected) is not type(found):
        return False
    ours, theirs = items_of(expected), items_of(found)
    if ours is None or theirs is None:
        try:
            return expected is found or bool(expected == found)
        except Exception:  # objects that compare to something else than a truth value
            return False
    return [name for name, _ in ours] == [name for name, _ in theirs] and all(
        alike(a, b, tolerance) for (_, a), (_, b) in zip(ours, theirs, strict=True)
    )


def _alike_tensors(expected: Tensor, found: Tensor, tolerance: float | None) -> bool:
    if expected.shape != found.shape:
        return False
    if tolerance is None:
        return True
    if expected.dtype != found.dtype or expected.device != found.device:
        return False
    if bool(((expected == found) | ((expected != expected) & (found != found))).all()):
        return True
    if tolerance == 0 or not (expected.is_floating_point() or expected.is_complex()):
        return False
    return bool((expected - found).abs().max() <= tolerance * expected.abs().max())
