"""Plain attributes of modules that a training changes, such as a temperature that a forward pass anneals: kept in checkpoints,
beside the parameters and buffers that ``state_dict`` gives."""

from __future__ import annotations

import pickle
import random
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from distpro.console import note
from distpro.train import distributed
from pathways.call import map_tensors, tensors_in
from pathways.own_state import DEPTH, is_iterator, of_own_class, slots_of
from pathways.trust import OF_ANY_MODULE, known_class

LARGEST_NEW = 2**20
"""Elements of a tensor that was not there before: a larger one is most likely a map that the last pass has left, not a state."""

_NUMBERS = (type(None), bool, int, float, str, torch.Size, torch.dtype, torch.device)  # as torch.load reads them
_ABSENT = object()


class Attributes:
    """What has changed, since this was made, in the attributes of modules.

    Kept is what ``torch.load(weights_only=True)`` reads: numbers, strings, None, tensors, and lists, tuples and dicts of them.
    Of other objects (a generator, one of somebody's own class) it is only noticed that they have changed. Of modules of known
    libraries it is numbers and strings alone, which others may set (the rate of a dropout).
    """

    def __init__(self, models: Mapping[str, nn.Module]):
        self._modules = {
            (kind, path): module
            for kind, model in models.items()
            for path, module in model.named_modules()
            if type(module).__module__.partition(".")[0] not in ("distpro", "pathways")
        }
        inside = [m for model in models.values() for m in model.modules()]
        self._elsewhere = {id(x) for m in inside for x in (m, *m._parameters.values(), *m._buffers.values())}
        # With the values themselves: whether one is still the same object says whether it was changed in place.
        self._before = {
            place: {name: (value, self._picture(value, DEPTH)) for name, value in _attributes(module)}
            for place, module in self._modules.items()
        }
        self._said = False

    def state_dict(self) -> list[dict[str, Any]]:
        """The attributes that have changed: of which module, their value, and whether it was changed in place."""
        found = []
        for place, name, value in self._changed():
            entry = {"model": place[0], "module": place[1], "name": name}
            if value is _ABSENT:
                found.append({**entry, "removed": True})
            elif self._fits(place, name, value):
                on_device = any(t.device.type != "cpu" for t in tensors_in(value))
                in_place = value is self._value_before(place, name)
                value = map_tensors(lambda t: t.detach().clone(), value)  # memory of their own, and no graph
                found.append({**entry, "value": value, "in_place": in_place, "on_device": on_device})
        return found

    @torch.no_grad()
    def load_state_dict(self, state: list[dict[str, Any]], device: torch.device) -> None:
        """Back to a state from `state_dict`; ``device``: where tensors go that were not on the CPU."""
        for entry in state:
            attributes, name = vars(self._modules[entry["model"], entry["module"]]), entry["name"]
            if "removed" in entry:
                attributes.pop(name, None)
                continue
            now, value = attributes.get(name), entry["value"]
            value = map_tensors(lambda t: t.to(device), value) if entry["on_device"] else value
            if not entry["in_place"] or not _put_into(now, value):
                attributes[name] = value

    def say_what_is_lost(self) -> None:
        """Once, which attribute has changed and cannot be kept."""
        if self._said or not distributed.is_main():
            return
        lost = [
            (place, name, value)
            for place, name, value in self._changed()
            if value is not _ABSENT and not self._fits(place, name, value) and not _keeps_its_own(self._modules[place])
        ]
        if lost:
            self._said = True
            (model, path), name, value = lost[0]
            kind = f"a tensor of {value.numel():,} numbers" if type(value) is Tensor else type(value).__name__
            more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
            note(
                f"{model}: '{f'{path}.' if path else ''}{name}' ({kind}) has changed in training and cannot be kept in a "
                f"checkpoint{more}; if passes go on from it, a resumed run comes to other numbers: keep it in a buffer, or by "
                "get_extra_state and set_extra_state"
            )

    def _changed(self) -> Iterator[tuple[tuple[str, str], str, Any]]:
        """(model and module, attribute, value); of one that was removed, `_ABSENT` is the value."""
        for place, module in self._modules.items():
            now, before = dict(_attributes(module)), self._before[place]
            if _known(type(module)):  # type: ignore[arg-type]
                now = {name: now.get(name, value) for name, (value, _) in before.items()}
            yield from ((place, name, _ABSENT) for name in before.keys() - now.keys())
            for name, value in now.items():
                if name not in before or not _same(before[name][1], self._picture(value, DEPTH)):
                    yield place, name, value

    def _value_before(self, place: tuple[str, str], name: str) -> Any:
        return self._before[place].get(name, (_ABSENT, _ABSENT))[0]

    def _fits(self, place: tuple[str, str], name: str, value: Any) -> bool:
        """Whether a value can be in a checkpoint."""
        before, now = (sum(t.numel() for t in tensors_in(v)) for v in (self._value_before(place, name), value))
        return _is_plain(value) and now <= max(LARGEST_NEW, before)

    def _picture(self, value: Any, depth: int) -> Any:
        """What is compared later: a copy of what the value holds; the value itself where it is not looked into."""
        kind, numpy = type(value), sys.modules.get("numpy")
        if kind in _NUMBERS or depth == 0 or id(value) in self._elsewhere:
            return value
        if isinstance(value, Tensor):
            if not _is_dense(value):
                return value
            return value.detach().clone() if value.numel() <= LARGEST_NEW else _sum(value)  # a copy may be dear
        if isinstance(value, (list, tuple, deque)):
            return kind, [self._picture(v, depth - 1) for v in value]
        if isinstance(value, (set, frozenset)):
            return frozenset(value)
        if isinstance(value, dict):
            return kind, {k: self._picture(v, depth - 1) for k, v in value.items()}
        if isinstance(value, torch.Generator):
            return value.get_state()
        if isinstance(value, random.Random):
            return value.getstate()
        if is_iterator(value):
            return repr(value)  # which tells where a count is
        if isinstance(value, nn.Module) and self._elsewhere.isdisjoint([id(m) for m in value.modules()]):
            return [_sum(t) for t in (*value.parameters(), *value.buffers()) if _is_dense(t)]
        if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
            return kind, value.shape, value.tobytes()
        if numpy is not None and isinstance(value, (numpy.random.Generator, numpy.random.RandomState)):
            return pickle.dumps(value)
        if of_own_class(value):
            return kind, {
                k: self._picture(v, depth - 1) for k, v in {**getattr(value, "__dict__", {}), **slots_of(value)}.items()
            }
        return value


@cache
def _known(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "torch" or known_class(kind)


def _attributes(module: nn.Module) -> list[tuple[str, Any]]:
    found = [(name, value) for name, value in vars(module).items() if name not in OF_ANY_MODULE]
    known = _known(type(module))  # type: ignore[arg-type]
    return [(name, v) for name, v in found if type(v) in _NUMBERS] if known else found


def _keeps_its_own(module: nn.Module) -> bool:
    """Whether a module says itself what a state dict holds of it."""
    kind = type(module)
    return any(
        getattr(kind, name) is not getattr(nn.Module, name) for name in ("get_extra_state", "_save_to_state_dict")
    )


def _is_dense(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return plain and not tensor.is_meta and not tensor.is_quantized


def _is_plain(value: Any, depth: int = DEPTH) -> bool:
    """Whether a checkpoint may hold a value."""
    kind = type(value)
    if kind is Tensor:
        return _is_dense(value) and not (value.is_leaf and value.requires_grad)
    if kind in (list, tuple, dict):
        items = (x for pair in value.items() for x in pair) if kind is dict else value
        return depth > 0 and all(_is_plain(x, depth - 1) for x in items)
    return kind in _NUMBERS


def _sum(tensor: Tensor) -> tuple[Any, ...]:
    """What shows, nearly always, that a large tensor has another content: its sum, and how often it was written to."""
    real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return tensor.shape, 0 if tensor.is_inference() else tensor._version, repr(real.float().sum().item())


def _put_into(now: Any, value: Any) -> bool:
    """Whether the object that is there could take the value, for others may hold it too."""
    if type(now) is not type(value):
        return False
    if isinstance(now, Tensor):
        fits = now.shape == value.shape and now.dtype == value.dtype and not now.is_inference()
        return fits and now.copy_(value) is now
    if isinstance(now, (list, dict)):
        now.clear()
        (now.extend if isinstance(now, list) else now.update)(value)
    return isinstance(now, (list, dict))


def _same(before: Any, now: Any) -> bool:
    """Whether two pictures are of one content."""
    if before is now:
        return True
    if type(before) is not type(now):
        return False
    if isinstance(before, Tensor):
        alike = _is_dense(before) and _is_dense(now) and before.shape == now.shape and before.dtype == now.dtype
        return alike and before.device == now.device and torch.allclose(before, now, rtol=0, atol=0, equal_nan=True)
    if isinstance(before, dict):
        return before.keys() == now.keys() and all(_same(before[k], now[k]) for k in before)
    if isinstance(before, (list, tuple)) and type(before) is not torch.Size:
        return len(before) == len(now) and all(map(_same, before, now))
    return isinstance(before, (*_NUMBERS, bytes, frozenset)) and bool(before == now)
