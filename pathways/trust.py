"""Which models a trace can stand for, and whether one still is what was traced.

A trace freezes what the code of a forward pass reads: attributes, the list of submodules, the functions that it calls.
So traced code runs only for models made of modules whose code is known to read nothing else, and only as long as all
that is what it was.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from torch import nn

# Their modules read their own attributes, children and tensors, and nothing that changes elsewhere. `distpro.models` is
# of this repository.
TRUSTED = ("torch.nn", "torchvision.models", "torchvision.ops", "timm.models", "timm.layers", "distpro.models")
_COMPUTED = ("torch.nn.utils",)  # parametrisations: an attribute is whatever their modules compute
_RUNS_AGAIN = ("torch.utils.checkpoint",)  # a trace keeps what checkpointing would not
_NO_CODE = ("builtins", "abc", "typing")  # object and what marks a class
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ADDED = (
    "smart_apply",
)  # by transformers to nn.Module itself, with the first model that it makes; no forward pass calls it
_REPLACED = ("forward", "_compiled_call_impl")  # which a module has of its class
OF_ANY_MODULE = frozenset(vars(nn.Module()))


def _inside(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def known_code(name: str) -> bool:
    """Whether code of this Python module may make a part of a trace."""
    return _inside(name, (*TRUSTED, "torch", "pathways")) and not _inside(name, _RUNS_AGAIN)


def only_known_code_runs(since: Any) -> bool:
    """Whether all callers, up to the one with the code ``since``, are functions of PyTorch or of trusted packages."""
    frame = sys._getframe(1)
    while frame.f_code is not since:
        if not known_code(frame.f_globals.get("__name__", "")):
            return False
        assert frame.f_back is not None
        frame = frame.f_back
    return True


def _foreign(value: Any) -> bool:
    """Whether calling a value runs code that is not known."""
    while isinstance(value, (partial, MethodType)):
        value = value.func if isinstance(value, partial) else value.__func__
    if isinstance(value, FunctionType):
        return not known_code(value.__globals__.get("__name__", ""))
    if isinstance(value, BuiltinFunctionType):
        return not known_code(value.__module__ or "")
    return callable(value) and not isinstance(value, (type, nn.Module))


def known_class(kind: type) -> bool:
    """Whether a class, with all that it inherits, is of trusted packages and as they made it."""
    return all(
        _inside(base.__module__, TRUSTED)
        and not _inside(base.__module__, _COMPUTED)
        and not any(isinstance(v, FunctionType) and _foreign(v) for name, v in vars(base).items() if name not in _ADDED)
        for base in kind.__mro__
        if base.__module__ not in _NO_CODE
    )


def trusted(model: nn.Module) -> bool:
    """Whether a model consists of modules of trusted packages alone, as they are: no method is replaced, no hook or
    code of torch.compile is on them."""
    modules = list(model.modules())
    return all(map(known_class, {type(m) for m in modules})) and all(map(_as_made, modules))


def _as_made(module: nn.Module) -> bool:
    return (
        not hooks_on(module)
        and vars(module).keys().isdisjoint(_REPLACED)
        and not any(map(_foreign, vars(module).values()))
    )


def hooks_on(module: nn.Module) -> list[Any]:
    """What is called around a module's passes."""
    return [hook for kind in _HOOKS if (hooks := getattr(module, kind)) for hook in hooks.values()]


def _global_hooks() -> bool:
    return any(getattr(nn.modules.module, f"_global{kind}") for kind in _HOOKS)


def hooks_of(model: nn.Module) -> list[tuple[Any, ...]]:
    """Every hook that a pass of the model meets now, those of all modules last."""
    own = [tuple(getattr(m, kind).items()) for m in model.modules() for kind in _HOOKS]
    return own + [tuple(getattr(nn.modules.module, f"_global{kind}").items()) for kind in _HOOKS]


def own_containers(module: nn.Module) -> list[Any]:
    """The lists, dicts and sets that a module has as attributes, and those in them."""
    return list(_containers([value for name, value in vars(module).items() if name not in OF_ANY_MODULE]))[1:]


def _containers(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, dict, set)):
        yield value
    if isinstance(value, (list, tuple, dict, set)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _containers(inner)


def _present(tensors: dict[str, Any]) -> list[str]:
    return [name for name, tensor in tensors.items() if tensor is not None]


def _code_of(kind: type) -> dict[str, Any]:
    """What forward passes use of a class. The compiler, when it is first used, changes how modules are made."""
    used = ("__call__", "__getattr__")
    own = {name: value for name, value in vars(kind).items() if name not in _ADDED}
    return {name: value for name, value in own.items() if name in used or not name.startswith("__")}


class Unchanged:
    """Whether a `trusted` model is still made of the same modules, classes and attributes: ``unchanged() → bool``.

    Parameters and buffers may change, for traced code reads them by name; that they are there may not. Nor does it
    matter which mode the modules are in: what is traced is the same in both.
    """

    def __init__(self, model: nn.Module):
        self._modules = list(model.modules())
        self._attributes = [{mode: {**vars(m), "training": mode} for mode in (False, True)} for m in self._modules]
        self._children = [(m._modules, tuple(m._modules.items())) for m in self._modules]
        hooks = [getattr(m, kind) for m in self._modules for kind in _HOOKS]
        tensors = [t for m in self._modules for t in (m._parameters, m._buffers)]
        self._empty = hooks + [t for t in tensors if not t]
        self._tensors = [(t, _present(t)) for t in tensors if t]
        self._containers = [(c, c.copy()) for m in self._modules for c in own_containers(m)]
        self._classes = [(m, type(m)) for m in self._modules]
        bases = {base for kind in {type(m) for m in self._modules} for base in kind.__mro__}
        self._code = [(base, _code_of(base)) for base in bases]

    def __call__(self) -> bool:
        if any(self._empty) or _global_hooks() or not all(type(m) is kind for m, kind in self._classes):
            return False
        try:  # dicts compare by identity first, so that this takes no time where nothing is new
            return (
                all(vars(m) == kept[m.training] for m, kept in zip(self._modules, self._attributes, strict=True))
                and all(tuple(now.items()) == kept for now, kept in self._children)
                and all(_present(now) == kept for now, kept in self._tensors)
                and all(now == kept for now, kept in self._containers)
                and all(_code_of(base) == kept for base, kept in self._code)
            )
        except Exception:  # values that compare to something else than a truth value, such as another tensor
            return False
