"""A copy of a model that has nothing of the original in it.

``copy.deepcopy`` copies modules, containers, bound methods and partials, but leaves functions as they are: a lambda that holds a
module goes on with the original's after the copy, which then trains without it.
"""

from __future__ import annotations

import copy
import dis
import weakref
from collections.abc import Iterator
from functools import partial
from itertools import chain
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from distpro.search.estimators.base import refuse_gradient_hooks
from pathways.registry import UserError


def copied_apart(model: nn.Module) -> nn.Module:
    """A copy. Raises UserError for a model that cannot be copied, whose copy would still use the original's layers, or which has
    hooks on gradients."""
    kind = type(model).__name__
    refuse_gradient_hooks(model)
    try:
        made = copy.deepcopy(model)
    except Exception as error:
        said = str(error).partition("\n")[0][:160]
        raise UserError(f"student: {kind} cannot be copied, which a search does ({said})") from None
    if place := _tied(made, model):
        raise UserError(
            f"student: {kind} cannot be copied, which a search does: {place} is a function that holds a layer of the student, or the "
            "student itself, and in a copy would go on with the original's; make it a method or a module, or name what builds the "
            "student (student.model=package.module:name)"
        )
    return made


def _tied(made: nn.Module, model: nn.Module) -> str:
    """Where the copy holds a function that leads to the original, in words; "" where it does not."""
    own = {id(part) for part in _parts(made)}
    original = {id(part) for part in _parts(model)} - own  # a model may say that copies share a part
    for path, module in made.named_modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules") and _leads_to(value, original, own):
                if name.endswith("_hooks"):
                    hook = name.strip("_").removesuffix("s").replace("_", " ")
                    return f"a {hook} of '{path}'" if path else f"a {hook} of the whole model"
                return f"'{path}.{name}'" if path else f"'{name}'"
    return ""


def _parts(model: nn.Module) -> Iterator[Any]:
    return chain(model.modules(), model.parameters(), model.buffers())


def _leads_to(value: Any, wanted: set[int], known: set[int]) -> bool:
    """Whether an object leads to one of ``wanted``, not through those that are looked at apart."""
    waiting, seen = [value], set(known)
    while waiting:
        value = waiting.pop()
        if id(value) in wanted:
            return True
        if id(value) not in seen:
            seen.add(id(value))
            waiting += _held(value)
    return False


def _held(value: Any) -> list[Any]:
    """What is reached from an object in one step, as far as deepcopy and a call would go."""
    if isinstance(value, (Tensor, ModuleType, type, str, bytes, int, float)):
        return []
    if isinstance(value, FunctionType):
        return [*_held_by(value), *vars(value).values()]
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, weakref.ref):  # which deepcopy leaves as it is, too
        return [value()]
    inside: list[Any] = []
    if isinstance(value, partial):
        inside += [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, dict):
        inside += value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        inside += value
    own = getattr(value, "__dict__", None)
    return [*inside, *own.values()] if isinstance(own, dict) else inside


def _held_by(function: FunctionType) -> Iterator[Any]:
    """A function's enclosed variables and defaults, and of the globals that it names the modules, tensors and functions beside it."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable that has no value yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    space = function.__globals__
    for name in _globals_of(function.__code__):
        value = space.get(name)
        beside = isinstance(value, FunctionType) and value.__globals__ is space  # not into other libraries
        if beside or isinstance(value, (nn.Module, Tensor)):
            yield value


def _globals_of(code: CodeType) -> Iterator[str]:
    yield from (i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL")
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _globals_of(inner)
