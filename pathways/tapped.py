"""Models that return their taps as values: traced with torch.fx where the model allows it, with hooks otherwise."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from pathways.call import Call
from pathways.containers import alike
from pathways.fusing import foldable, fused
from pathways.probing import restored, untouched
from pathways.registry import UserError
from pathways.taps import Taps, check_taps, locate, tap
from pathways.tracing import CannotTrace, as_function, trace

_WAIT_FOR_THE_END = ("torch.nn.parallel", "torch.distributed")  # modules that prepare the exchange of gradients then


class _AllRead(Exception):
    """Every tap has been read; what is left of the forward pass is not wanted."""


class _Reads:
    """Counts how often each tap is read, and can end a forward pass once all of them have been."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        self.counts: Counter[str] = Counter()
        self._model, self._names = model, names
        self._ending = False
        modules = dict(model.named_modules())
        self._handles = []
        for name in names:
            place = locate(name, modules)
            module = modules[place.module]
            register: Any = module.register_forward_pre_hook if place.point == "input" else module.register_forward_hook
            self._handles.append(register(partial(self._count, name)))

    def _count(self, name: str, *_: Any) -> None:
        self.counts[name] += 1
        if self._ending and len(self.counts) == len(self._names):
            raise _AllRead

    def run(self, *args: Any, **kwargs: Any) -> None:
        """A forward pass that ends with the last tap."""
        self.counts.clear()
        self._ending = True  # only here: activation checkpointing runs hooks in the backward pass too
        try:
            self._model(*args, **kwargs)
        except _AllRead:
            pass
        finally:
            self._ending = False

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _may_end(model: nn.Module, names: Sequence[str], example: Call, modes: Sequence[bool]) -> bool:
    """Whether a forward pass can be left as soon as every tap has been read: the model runs in each of the modes
    (``training`` or not), each tap is read once, and no module has work to do when its submodules have run."""
    for module in model.modules():
        hooks = module._forward_hooks.keys() - module._forward_hooks_always_called.keys()
        if hooks or "forward" in vars(module) or type(module).__module__.startswith(_WAIT_FOR_THE_END):
            return False
    reads = _Reads(model, names)
    try:
        with restored(model), untouched(model):
            for training in modes:
                reads.counts.clear()
                example.run(model.train(training))
                if reads.counts != dict.fromkeys(names, 1):
                    return False
    except Exception:  # a model that the example does not fit, in one of the modes
        return False
    finally:
        reads.remove()
    return True


def _has_hooks(module: nn.Module) -> bool:
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def _global_hooks() -> bool:
    of = nn.modules.module
    forward = of._global_forward_hooks or of._global_forward_pre_hooks
    return bool(forward or of._global_backward_hooks or of._global_backward_pre_hooks)


def _outcome(run: Any, model: nn.Module, training: bool) -> Any:
    """What a pass in one mode gives, or the words of its error; the same random numbers each time, and no trace."""
    try:
        with restored(model), untouched(model):
            model.train(training)
            return run()
    except UserError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"


class Tapped(nn.Module):
    """A model that returns its taps as values: ``tapped(x) → (output, {tap: tensor})``, with any arguments and any
    output that the model has.

    The wrapped model stays `model`, shares its parameters and is not changed. Where torch.fx can trace it, the same
    way in training and evaluation mode, the traced code runs (`traced` is True) and reads the parameters of `model`;
    otherwise hooks registered here do the reading until `remove` is called.

    Without ``output``, ``tapped(x) → (None, {tap: tensor})`` and only what the taps depend on runs. Modules that do
    not run update no buffers, draw no random numbers (so that what is drawn later differs) and get no gradients (DDP
    around it needs ``find_unused_parameters``). A model that cannot be traced runs up to its last tap, or to its end
    where that could change a tap: without an example, where the example reads a tap more than once or does not run in
    training mode, and in models that wait for a pass to end (DDP, hooks).

    Args:
        model: any module.
        names: taps, see `pathways.taps`. May be empty.
        example_input: anything that `Call.of` takes. If given, traced and plain output are compared on it once, in
            evaluation and in training mode, and hooks take over if they differ.
        output: whether the model's output is wanted. `logits` among the taps is always given.
        frozen: the model is no longer trained: without gradients and in evaluation mode, its convolutions run as one
            operation with what follows them (`pathways.fusing`), if the example shows the same result. It is tried in
            evaluation mode alone.

    With an example, traced code overwrites what a ReLU reads where nothing else does. Hooks that are registered later,
    and modules that are replaced, are respected.

    Attributes:
        modules_run: modules of torch.nn that a forward pass runs, by name and in order; None where hooks read the taps.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        example_input: Any = None,
        output: bool = True,
        frozen: bool = False,
    ):
        super().__init__()
        check_taps(model, names, type(model).__name__)
        self.model = model
        self.names = list(dict.fromkeys(names))
        self.output = output
        self.modules_run: list[str] | None = None
        self._taps: Taps | None = None
        self._reads: _Reads | None = None
        self._function: Any = None
        self._fused: Any = None
        self._frozen = frozen
        if not (output or self.names):
            self.modules_run = []
            return
        example = None if example_input is None else Call.of(example_input)
        modes = (False,) if frozen else (False, True)
        try:
            graph = trace(model, self.names, True, output)
            code, function = as_function(model, graph)
            code_eval, _ = as_function(model, trace(model, self.names, False, output))
            self._arguments = [str(n.target) for n in graph.nodes if n.op == "placeholder"]
            expected = {} if example is None or code != code_eval else {t: self._plain(example, t) for t in modes}
            if code == code_eval and (example is None or self._agrees(function, example, expected)):
                self._function = function
                self.modules_run = list(dict.fromkeys(str(n.target) for n in graph.nodes if n.op == "call_module"))
                if example is not None:
                    self._fuse(graph, example, expected)
        except CannotTrace:
            pass
        if self._function is None:
            may_end = not output and example is not None and _may_end(model, self.names, example, modes)
            self._taps = Taps(model, self.names)
            self._reads = _Reads(model, self.names) if may_end else None  # its hooks run after those of the taps

    @property
    def traced(self) -> bool:
        """Whether taps are returned by traced code rather than read by hooks."""
        return self._function is not None

    def _fuse(self, graph: fx.Graph, example: Call, expected: dict[bool, Any]) -> None:
        self._seen = list(self.model.modules())
        self._frozen = self._frozen and foldable(self.model)
        _, function = as_function(self.model, fused(graph, dict(self.model.named_modules()), self._frozen))
        if not self._agrees(function, example, expected, 1e-4 if self._frozen else 0):
            return
        if self._frozen and example.device.type == "cpu":  # oneDNN has operations for some types only
            with torch.autocast("cpu", torch.bfloat16):
                if not self._agrees(function, example, expected, None):
                    return
        self._fused = function

    @property
    def runs_fused(self) -> bool:
        """Whether a forward pass now takes the faster code of `pathways.fusing`: there is some, the modules are those
        that were traced, and nobody looks at what that code leaves out."""
        if self._fused is None or torch.compiler.is_compiling():
            return False
        modules = list(self.model.modules())
        same = len(modules) == len(self._seen) and all(map(operator.is_, modules, self._seen))
        if not same or _global_hooks() or any(map(_has_hooks, modules)):
            return False
        return not self._frozen or not (torch.is_grad_enabled() or any(m.training for m in modules))

    def _plain(self, example: Call, training: bool) -> Any:
        """Output and taps of the model's own pass on the example, or the error that it ends with in training mode."""

        def run() -> Any:
            with tap(self.model, self.names) as taps:
                output = example.run(self.model)
            return output if self.output else None, {name: taps[name] for name in self.names}

        if training:
            return _outcome(run, self.model, training)
        with restored(self.model), untouched(self.model):
            self.model.eval()
            return run()

    def _agrees(self, function: Any, example: Call, expected: dict[bool, Any], tolerance: float | None = 0) -> bool:
        """Whether traced code gives what the model gives on the example, by mode."""
        return all(
            alike(plain, _outcome(lambda: self._run(function, *example), self.model, training), tolerance)
            for training, plain in expected.items()
        )

    def _run(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
        """Traced code with a call's arguments: it takes them by position, under names of its own."""
        if kwargs:
            missing = self._arguments[len(args) :]
            if set(missing) != set(kwargs):
                of = f"{type(self.model).__name__}.forward"
                raise TypeError(
                    f"{of} takes {', '.join(self._arguments)}; missing or unknown: {set(missing) ^ set(kwargs)}"
                )
            args = [*args, *(kwargs[name] for name in missing)]
        return function(self.model, *args)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        function = self._fused if self.runs_fused else self._function
        if function is not None:
            return self._run(function, args, kwargs)
        if self._taps is None:
            return None, {}
        try:
            output = (self._reads.run if self._reads else self.model)(*args, **kwargs)
            return output if self.output else None, {name: self._taps[name] for name in self.names}
        finally:
            self._taps.clear()  # the caller owns the tensors; the model must not keep a step's graph alive

    def remove(self) -> None:
        """Take the hooks off the model, if there are any."""
        for hooks in (self._taps, self._reads):
            if hooks is not None:
                hooks.remove()
