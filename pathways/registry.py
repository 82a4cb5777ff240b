"""How a name in a YAML file becomes an object, and how a wrong name is answered."""

from __future__ import annotations

import difflib
import importlib
import inspect
import operator
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any


class UserError(ValueError):
    """Bad input from a user: the message says what, where and what is allowed. The command line prints it
    without a traceback and exits with status 2."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest allowed name, or an empty string if none is close."""
    lowered = {str(a).lower(): str(a) for a in allowed}
    close = difflib.get_close_matches(str(name).lower(), list(lowered), n=1, cutoff=0.6)
    return f"; did you mean '{lowered[close[0]]}'?" if close else ""


class Registry(Mapping[str, Callable[..., Any]]):
    """Objects of one kind by name.

    >>> shapes = Registry("shape")
    >>> @shapes.register("square")
    ... def square(side=1): return side * side
    >>> shapes.build("square", side=3)
    9

    With ``takes_code`` a name may also be ``package.module:attribute``, which imports and runs that module: for code
    that the user trusts.
    """

    def __init__(self, kind: str, takes_code: bool = False):
        self.kind, self.takes_code = kind, takes_code
        self._entries: dict[str, Callable[..., Any]] = {}

    def register(self, name: str) -> Callable[[Callable[..., Any]], Any]:
        """Decorator that files a class or function under ``name``. A second entry of one name is an error."""

        def add(entry: Callable[..., Any]) -> Callable[..., Any]:
            if name in self._entries:
                raise ValueError(f"{self.kind} '{name}' is registered already")
            self._entries[name] = entry
            return entry

        return add

    def build(self, name: str, /, *args: Any, **params: Any) -> Any:
        """Look ``name`` up and call it. Raises UserError for an unknown name, and for parameters that are unknown,
        missing, or given already by ``args``."""
        entry = self[name]
        check_parameters(f"{self.kind} '{name}'", entry, params)
        try:
            _signature(f"{self.kind} '{name}'", entry).bind(*args, **params)
        except TypeError as error:
            raise UserError(f"{self.kind} '{name}': {error}") from None
        return entry(*args, **params)

    def __getitem__(self, name: str) -> Callable[..., Any]:
        if self.takes_code and is_code(name):
            return import_entry(f"{self.kind} '{name}'", name)
        try:
            return self._entries[name]
        except KeyError:
            near = (self.takes_code and module_of_file(name)) or nearest(name, self)
            raise UserError(f"unknown {self.kind} '{name}'{near} (allowed: {', '.join(self)})") from None

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        return len(self._entries)


def is_code(name: str) -> bool:
    """Whether a name is ``package.module:attribute`` rather than one of a registry."""
    return bool(re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name))


def module_of_file(name: str) -> str:
    """The ending of a message about ``package/module.py:attribute``: what was meant."""
    found = re.fullmatch(r"(?:\./)?([A-Za-z_][\w/]*)\.py:([A-Za-z_][\w.]*)", name)
    return f"; did you mean '{found[1].replace('/', '.')}:{found[2]}'?" if found else ""


def import_entry(what: str, name: str) -> Callable[..., Any]:
    """The class or function ``package.module:attribute``. The current directory can be imported from, after the
    installed packages. Raises UserError, beginning with ``what``, if there is none."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        imported = importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a module of the user's may fail in any way
        reason = f"({type(error).__name__}: {error})"
        raise UserError(f"{what}: cannot import '{module}' {reason}{module_of_file(name)}") from error
    try:
        entry = operator.attrgetter(attribute)(imported)
    except AttributeError:
        raise UserError(f"{what}: '{module}' has no '{attribute}'{nearest(attribute, dir(imported))}") from None
    if not callable(entry):
        raise UserError(f"{what}: '{attribute}' is {type(entry).__name__}, not a class or function")
    return entry


def _signature(what: str, entry: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(entry)
    except ValueError:  # a builtin that does not say
        raise UserError(f"{what}: {getattr(entry, '__name__', entry)} does not say which parameters it takes") from None


_SCALARS: dict[str, tuple[type, ...]] = {"float": (int, float), "int": (int,), "bool": (bool,), "str": (str,)}


def check_parameters(what: str, entry: Callable[..., Any], params: Mapping[str, Any]) -> None:
    """Raise UserError if ``entry`` takes no parameter of one of the names in ``params``, or takes a number, a truth
    value or a word where ``params`` has something else."""
    accepted = _signature(what, entry).parameters
    if any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        return
    for name, value in params.items():
        if name not in accepted:
            allowed = [n for n in accepted if n not in ("self", "student_shapes", "teacher_shapes")]
            raise UserError(
                f"{what} has no parameter '{name}'{nearest(name, allowed)} (allowed: {', '.join(allowed) or 'none'})"
            )
        annotation = accepted[name].annotation
        expected = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
        if expected in _SCALARS and (
            not isinstance(value, _SCALARS[expected]) or (isinstance(value, bool) and expected != "bool")
        ):
            raise UserError(f"{what}: parameter '{name}' is {value!r}, expected {expected}")
