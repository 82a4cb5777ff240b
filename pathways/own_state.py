"""What modules hold besides parameters and buffers: kept, and put back."""

from __future__ import annotations

import copy
import random
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import FunctionType, MemberDescriptorType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset

from pathways.trust import OF_ANY_MODULE, hooks_on, known_class, known_code

DEPTH = 4  # containers and objects in each other, from a module's attribute on
LARGEST = 10_000  # items of a container that are looked into; of longer ones it is known which they are
_CONSTANT = frozenset((type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device))
_NOT_LOOKED_INTO = (nn.Module, Dataset, DataLoader, type)
_MADE_WITH_MODULES = OF_ANY_MODULE - {"training"}  # and never exchanged
_ABSENT = object()


@contextmanager
def own_state_kept(*models: nn.Module) -> Iterator[None]:
    """What the modules hold besides parameters and buffers is afterwards what it was.

    Attributes are what they were, and so is what they lead to: the content of tensors and NumPy arrays, which is put back
    in place; of lists, dicts, sets, deques, and objects of anybody's own classes; the state of random generators; and what
    hooks and functions hold, as an object, an argument that is bound, or a variable around them. Iterators of Python, such
    as `itertools.count`, are replaced by copies from before. Parameters that are not trained are put back where a module of
    somebody's own class has them, or where such a module is in a model that is trained otherwise: its forward pass may
    update them through `.data`, as a momentum encoder's. So are the weights of embeddings with a ``max_norm``, which their
    passes rescale; and all of a module that is not among the submodules but in a tuple, list, dict or object, where it is
    hidden from the optimiser.

    What a pass has built stays: a module that has got a module or parameter, by ``if self.fc is None: self.fc = nn.Linear(...)``,
    is another one now, as a lazy module is after its first pass, and so are those that it is a part of. Their attributes are
    left as the pass has left them, for these say that the parts are there.

    Left alone: other trained parameters, modules that the models are a part of, data sets and loaders, objects of libraries,
    and what cannot be copied.
    """
    put_back = own_state(*models)
    try:
        yield
    finally:
        put_back()


def own_state(*models: nn.Module, parameters: bool = True) -> Callable[[], None]:
    """A function that puts back what the modules hold now, as `own_state_kept` says; without ``parameters`` not those that they
    may write to."""
    return _OwnState(models, parameters).put_back


def parts(module: nn.Module) -> tuple[nn.Module | str, ...]:
    """The modules that a module has, and the names of its parameters."""
    inner = [m for m in module._modules.values() if m is not None]
    return (*inner, *[name for name, p in module._parameters.items() if p is not None])


def having_built(before: Mapping[nn.Module, tuple[nn.Module | str, ...]]) -> set[nn.Module]:
    """The modules that have got parts since `parts` was taken of them, and those that they are in."""
    changed = [(m, now, then) for m, then in before.items() if (now := parts(m)) != then]
    built = {m for m, now, then in changed if not set(now) <= set(then)}
    return {m for m in before if not built.isdisjoint(m.modules())} if built else built


class _OwnState:
    def __init__(self, models: tuple[nn.Module, ...], parameters: bool = True):
        self._parameters = parameters
        self._back: list[Callable[[], Any]] = []
        self._back_of: dict[nn.Module, list[Callable[[], Any]]] = {}
        self._parts: dict[nn.Module, tuple[nn.Module | str, ...]] = {}
        self._wholes = {whole for model in models for whole in _wholes(model)}
        modules = dict.fromkeys(m for model in models for m in model.modules())
        known = (x for m in modules for x in (m, *m._parameters.values(), *m._buffers.values()))
        # By id: the object, which holds the id, and what takes its place. Buffers are kept elsewhere.
        self._seen: dict[int, tuple[Any, Any]] = {id(x): (x, x) for x in known}
        for module in modules:
            self._keep_module(module, DEPTH)
        for p in dict.fromkeys(p for model in models if parameters for p in _that_passes_may_write(model)):
            self._keep_tensor(p)

    def put_back(self) -> None:
        built = having_built(self._parts)
        for module, backs in self._back_of.items():
            for back in backs if module not in built else ():
                back()
        for back in self._back:
            back()

    def _keep_module(self, module: nn.Module, depth: int, tensors: Sequence[Tensor] = ()) -> None:
        """Note how a module's attributes, and these tensors, are put back."""
        if isinstance(module, LazyModuleMixin):  # its first pass makes it another module
            return
        self._parts[module] = parts(module)
        outer, self._back = self._back, []
        self._back_of[module] = self._back
        now = vars(module)
        values = {name: self._keep(now[name], depth) for name in now.keys() - _MADE_WITH_MODULES}
        self._back.append(partial(_put_attributes_back, module, values, _MADE_WITH_MODULES))
        for hook in hooks_on(module):
            self._keep(hook, depth)
        for tensor in tensors:
            self._keep_tensor(tensor)
        self._back = outer

    def _keep_hidden(self, module: nn.Module, depth: int) -> None:
        """Note how all of a module is put back that a model has besides its submodules."""
        inside = list(module.modules())
        if not self._wholes.isdisjoint(inside):  # the model is a part of it, and knows where
            return
        for m in inside:
            if m is not module and id(m) in self._seen:
                continue
            own = m._parameters.values() if self._parameters else ()
            tensors = [t for t in (*own, *m._buffers.values()) if t is not None]
            tensors = [t for t in tensors if id(t) not in self._seen]
            self._seen |= {id(x): (x, x) for x in (m, *tensors)}
            self._keep_module(m, depth, tensors)
            if isinstance(m._buffers, dict):  # not in a scripted module
                self._back.append(partial(_put_content_back, m._buffers, dict(m._buffers)))

    def _keep(self, value: Any, depth: int) -> Any:
        """Note how a value is put back; gives what is to be in its place then, mostly itself."""
        if type(value) in _CONSTANT or depth == 0:
            return value
        if id(value) not in self._seen:
            self._seen[id(value)] = value, value  # it may contain itself
            self._seen[id(value)] = value, self._look_into(value, depth - 1)
        return self._seen[id(value)][1]

    def _look_into(self, value: Any, depth: int) -> Any:
        kind, numpy = type(value), sys.modules.get("numpy")
        if isinstance(value, (tuple, frozenset)):
            for inner in value if len(value) <= LARGEST else ():
                self._keep(inner, depth)
        elif isinstance(value, dict):
            small = len(value) <= LARGEST
            content = {k: self._keep(v, depth) if small else v for k, v in value.items()}
            self._back.append(partial(_put_content_back, value, content))
        elif isinstance(value, (list, deque, set)):
            items = [self._keep(v, depth) for v in value] if len(value) <= LARGEST else list(value)
            self._back.append(partial(_put_content_back, value, items))
        elif isinstance(value, Tensor):
            self._keep_tensor(value)
        elif isinstance(value, nn.Module):
            self._keep_hidden(value, depth)
        elif isinstance(value, torch.Generator):
            self._back.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self._back.append(partial(value.setstate, value.getstate()))
        elif numpy is not None and kind.__module__.partition(".")[0] == "numpy":
            if kind is numpy.ndarray and value.flags.writeable:
                self._back.append(partial(numpy.copyto, value, value.copy()))
            elif isinstance(value, numpy.random.RandomState):
                self._back.append(partial(value.set_state, value.get_state()))
            elif isinstance(value, numpy.random.Generator):
                bits = value.bit_generator
                self._back.append(partial(setattr, bits, "state", copy.deepcopy(bits.state)))
        elif is_iterator(value):
            return _copied(value)
        elif isinstance(value, (MethodType, partial, FunctionType)):
            self._look_into_function(value, depth)
        elif of_own_class(value):
            if hasattr(value, "__dict__"):
                values = {name: self._keep(v, depth) for name, v in vars(value).items()}
                self._back.append(partial(_put_attributes_back, value, values))
            for slot in _slots(kind):
                content = _in_slot(slot, value)
                self._back.append(partial(_put_in_slot, slot, value, self._keep(content, depth)))
        return value

    def _look_into_function(self, value: MethodType | partial[Any] | FunctionType, depth: int) -> None:
        """What a call finds there: a method's object, arguments that are bound, defaults, and variables of the functions around."""
        if isinstance(value, MethodType):
            self._keep(value.__self__, depth)
        elif isinstance(value, partial):
            for inner in (value.func, *value.args, *value.keywords.values()):
                self._keep(inner, depth)
        elif not _keeps_nothing(value.__globals__.get("__name__", "")):
            for inner in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()):
                self._keep(inner, depth)
            for cell in value.__closure__ or ():
                content = getattr(cell, "cell_contents", _ABSENT)  # none yet where the variable has no value
                if content is not _ABSENT:
                    self._back.append(partial(setattr, cell, "cell_contents", self._keep(content, depth)))

    def _keep_tensor(self, tensor: Tensor) -> None:
        if tensor.is_inference() or is_lazy(tensor):  # the one does not change, the other has no content yet
            return
        try:
            data = tensor.data
            self._back.append(partial(_put_data_back, tensor, data, data.clone()))
        except (RuntimeError, NotImplementedError):  # a kind of tensor that has no copy
            pass


def _wholes(model: nn.Module) -> Iterator[nn.Module]:
    """A model, and what it is but a wrapper of."""
    yield model
    while len(model._modules) == 1:
        (inner,) = model._modules.values()
        if inner is None:
            return
        model = inner
        yield model


def _that_passes_may_write(model: nn.Module) -> list[Tensor]:
    """Weights of embeddings that their passes rescale, and frozen parameters that code of no trusted package can reach: in
    a model that is frozen as a whole, such as a teacher, only its own modules', for a second copy of a large model is dear."""
    modules, parameters = list(model.modules()), list(model.parameters())
    rescaled: list[Tensor] = [
        m.weight for m in modules if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.max_norm is not None
    ]
    frozen = [p for p in parameters if not p.requires_grad]
    known = {kind: known_class(kind) for kind in {type(m) for m in modules}} if frozen else {}
    if all(known.values()):
        return rescaled
    if len(frozen) < len(parameters):
        return rescaled + frozen
    return rescaled + [p for m in modules if not known[type(m)] for p in m.parameters(recurse=False)]


def _keeps_nothing(code: str) -> bool:
    """Whether functions of a Python module are known to hold nothing for a pass; our own hooks hold what is asked of it."""
    return known_code(code) or code.partition(".")[0] == "distpro"


def is_iterator(value: Any) -> bool:
    """Of Python's own."""
    return type(value).__module__ in ("itertools", "builtins") and hasattr(type(value), "__next__")


def _copied(iterator: Any) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return copy.copy(iterator)
    except TypeError:  # a generator
        return iterator


def of_own_class(value: Any) -> bool:
    """Whether a value is an object with attributes, of a class that is neither Python's nor PyTorch's."""
    if isinstance(value, _NOT_LOOKED_INTO):
        return False
    if not (isinstance(getattr(value, "__dict__", None), dict) or _slots(type(value))):
        return False
    package = type(value).__module__.partition(".")[0]
    return isinstance(value, SimpleNamespace) or (package != "torch" and package not in sys.stdlib_module_names)


def _slots(kind: type) -> list[MemberDescriptorType]:
    """Where objects of a class with ``__slots__`` have their attributes."""
    bases = (base for base in kind.__mro__ if "__slots__" in vars(base))
    return [v for base in bases for v in vars(base).values() if isinstance(v, MemberDescriptorType)]


def slots_of(value: Any) -> dict[str, Any]:
    """What an object of a class with ``__slots__`` has in them."""
    found = {slot.__name__: _in_slot(slot, value) for slot in _slots(type(value))}
    return {name: content for name, content in found.items() if content is not _ABSENT}


def _in_slot(slot: MemberDescriptorType, holder: Any) -> Any:
    try:
        return slot.__get__(holder, type(holder))
    except AttributeError:
        return _ABSENT


def _put_in_slot(slot: MemberDescriptorType, holder: Any, value: Any) -> None:
    """By the slot, for the class may refuse it (a frozen dataclass)."""
    if _in_slot(slot, holder) is value:
        return
    if value is _ABSENT:
        slot.__delete__(holder)
    else:
        slot.__set__(holder, value)


def _put_attributes_back(holder: Any, values: dict[str, Any], but: frozenset[str] = frozenset()) -> None:
    now = vars(holder)
    for name in now.keys() - values.keys() - but:
        del now[name]
    for name, value in values.items():
        if now.get(name, _ABSENT) is not value:  # compiled code looks whether a dict has been written to
            now[name] = _copied(value) if is_iterator(value) else value  # it may be put back once more


def _put_content_back(container: Any, content: Any) -> None:
    """``content``: a dict for a dict, a list otherwise."""
    if isinstance(container, dict):
        same = list(container) == list(content) and all(container[k] is v for k, v in content.items())
    else:
        same = len(container) == len(content) and all(a is b for a, b in zip(container, content, strict=True))
    if not same:
        if isinstance(container, dict):
            content = {k: _copied(v) if is_iterator(v) else v for k, v in content.items()}
        else:
            content = [_copied(v) if is_iterator(v) else v for v in content]
        container.clear()
        (container.extend if isinstance(container, (list, deque)) else container.update)(content)


def _put_data_back(tensor: Tensor, data: Tensor, content: Tensor) -> None:
    """Through ``data``: what autograd has saved of the tensor is right again, so that no version may be counted."""
    try:
        if tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape:
            tensor.data = data
        data.copy_(content)
    except RuntimeError:  # memory that nothing can be written to, such as an expanded tensor's
        pass
