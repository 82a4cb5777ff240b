"""Models that return their taps as values: traced with torch.fx where the model allows it, with hooks otherwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from pathways.call import Call, tensors_in
from pathways.containers import alike
from pathways.fusing import computes_in_bfloat16, foldable, fused
from pathways.probing import untouched
from pathways.registry import UserError
from pathways.taps import Taps, check_taps, is_compiled, locate, tap, without_fast_path
from pathways.tracing import CannotTrace, as_function, trace
from pathways.trust import Unchanged, hooks_of, trusted

_WAIT_FOR_THE_END = ("torch.nn.parallel", "torch.distributed")  # modules that prepare the exchange of gradients then


class _AllRead(Exception):
    """Every tap has been read; what is left of the forward pass is not wanted."""


class _Reads:
    """Counts how often each tap is read, and can end a forward pass once all of them have been."""

    def __init__(self, model: nn.Module, names: Sequence[str], ending: bool):
        self.counts: Counter[str] = Counter()
        self._names, self._ending = names, ending
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

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _run_to_the_last_tap(model: nn.Module, names: Sequence[str], *args: Any, **kwargs: Any) -> None:
    """A forward pass that ends with the last tap."""
    reads = _Reads(model, names, ending=True)
    try:
        model(*args, **kwargs)
    except _AllRead:
        pass
    finally:
        reads.remove()


def _may_end(model: nn.Module, names: Sequence[str], example: Call, modes: Sequence[bool]) -> bool:
    """Whether a forward pass can be left as soon as every tap has been read: the model is known by its classes, runs in
    each of the modes (``training`` or not), each tap is read once, and no module has work to do when its submodules
    have run."""
    if not trusted(model) or any(type(m).__module__.startswith(_WAIT_FOR_THE_END) for m in model.modules()):
        return False
    reads = _Reads(model, names, ending=False)
    try:
        with untouched(model):
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


def _outcome(run: Any, model: nn.Module, training: bool) -> Any:
    """What a pass in one mode gives, or the words of its error; the same random numbers each time, and no trace."""
    try:
        with untouched(model):
            model.train(training)
            return run()
    except UserError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _not_finite(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call has a nan or an infinity: oneDNN's ReLU makes 0 of a nan, which a model by itself hands on."""
    tensors = [t for t in tensors_in((args, kwargs)) if t.is_floating_point()]
    return not all(bool(t.isfinite().all()) for t in tensors)


def keep_in_evaluation(modules: Sequence[nn.Module]) -> None:
    """Put modules back into evaluation mode where another one that holds them has put them into training mode."""
    for module in modules:
        if any(m.training for m in module.modules()):
            module.eval()


class Tapped(nn.Module):
    """A model that returns its taps as values: ``tapped(x) → (output, {tap: tensor})``, with any arguments and any
    output that the model has.

    The wrapped model stays `model`, shares its parameters and is not changed. What it gives is what the model by itself
    gives at that moment. Traced code (torch.fx; it reads the parameters of `model`) runs only where it provably does
    the same: the model consists of modules of PyTorch, torchvision, timm and distpro's zoo, has one trace in training
    and evaluation mode, and modules, classes and attributes are those that were traced (`pathways.trust`; compared in
    every pass). Otherwise the model itself runs, with hooks that are gone after the pass.

    Without ``output``, ``tapped(x) → (None, {tap: tensor})`` and only what the taps depend on runs. Modules that do
    not run update no buffers, draw no random numbers (so that what is drawn later differs) and get no gradients (DDP
    around it needs ``find_unused_parameters``). A model of such modules that has no one trace runs up to its last tap,
    or to its end where that could change a tap: without an example, and where the example reads a tap more than once or
    does not run in training mode. Models with classes of anybody else, or with hooks, always run to their end.

    Args:
        model: any module.
        names: taps, see `pathways.taps`. May be empty.
        example_input: anything that `Call.of` takes. If given, traced and plain output are compared on it once, in
            evaluation and in training mode, and hooks take over if they differ; where hooks change what the model gives, it is
            refused. Without one nothing is compared: a model that keeps a tap's tensor under another name too, and writes to one
            of the two in place, then goes on with a copy.
        output: whether the model's output is wanted. `logits` among the taps is always given.
        frozen: the model is no longer trained: without gradients, in evaluation mode and on the CPU, its convolutions
            run as one operation with what follows them (`pathways.fusing`), if the example shows the same result. It is
            tried in evaluation mode alone.
        hold: keep the hooks of a model that is not traced on it, until `remove`: for compiled code (`guarded`), which
            knows the hooks that were there when it was compiled. They stay on a model that is compiled itself, too.

    With an example, traced code overwrites what a ReLU reads where nothing else does.

    Attributes:
        modules_run: modules of torch.nn that traced code runs, by name and in order; None where there is none.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        example_input: Any = None,
        output: bool = True,
        frozen: bool = False,
        hold: bool = False,
    ):
        super().__init__()
        check_taps(model, names, type(model).__name__)
        self.model = model
        self.names = list(dict.fromkeys(names))
        self.output = output
        self.modules_run: list[str] | None = None
        self._function: Any = None
        self._fused: Any = None
        self._frozen = frozen
        self._may_end = False
        self._held: Taps | None = None
        self._hooks: list[Any] = []
        if not (output or self.names):
            self.modules_run = []
            return
        example = None if example_input is None else Call.of(example_input).copied()
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
            self._may_end = not output and example is not None and _may_end(model, self.names, example, modes)
        if self._function is not None or self._may_end:
            self._unchanged = Unchanged(model)
        elif hold or any(map(is_compiled, model.modules())):
            self._held = Taps(model, self.names)
            self._hooks = hooks_of(model)
        elif example is not None and self.names:
            self._check_hooks(example, modes)

    def _check_hooks(self, example: Call, modes: Sequence[bool]) -> None:
        """Raise UserError where the model gives something else on the example when its taps are read: a tap is a copy where it
        may be overwritten, and so is no longer the tensor that the model goes on with under another name."""

        def read() -> Any:
            with tap(self.model, self.names):
                return example.run(self.model)

        for training in modes:
            alone = [_outcome(lambda: example.run(self.model), self.model, training) for _ in range(2)]
            if isinstance(alone[0], str) or not alike(
                alone[0], alone[1], 1e-4
            ):  # it does not run so, or never gives the same
                continue
            if not alike(alone[0], _outcome(read, self.model, training), 1e-4):
                raise UserError(
                    f"{type(self.model).__name__} gives another output when {', '.join(self.names)} are read: something is "
                    "written to in place there, or kept, under another name; tap the module before or behind"
                )

    @property
    def traced(self) -> bool:
        """Whether there is traced code that gives the taps, for as long as the model is `unchanged`."""
        return self._function is not None

    @property
    def unchanged(self) -> bool:
        """Whether the model is what was traced, or has the hooks that it had when its own were put on to stay."""
        if self.traced or self._may_end:
            return self._unchanged()
        return self._held is not None and self._hooks == hooks_of(self.model)

    def _fuse(self, graph: fx.Graph, example: Call, expected: dict[bool, Any]) -> None:
        self._frozen = self._frozen and foldable(self.model)
        _, function = as_function(self.model, fused(graph, dict(self.model.named_modules()), self._frozen))
        if not self._agrees(function, example, expected, 1e-4 if self._frozen else 0):
            return
        if self._frozen and computes_in_bfloat16():  # oneDNN has operations for some types only
            with torch.autocast("cpu", torch.bfloat16):
                if not self._agrees(function, example, expected, None):
                    return
        self._fused = function

    @property
    def runs_fused(self) -> bool:
        """Whether a forward pass now takes the faster code of `pathways.fusing`: there is some, the model is
        `unchanged`, and nothing that the code leaves out is asked for."""
        return self._fused is not None and self._may_fuse() and self.unchanged

    def _may_fuse(self) -> bool:
        if not self._frozen:
            return True
        if torch.is_autocast_enabled("cpu") and not computes_in_bfloat16():  # not tried, see `_fuse`
            return False
        on_cpu = all(p.device.type == "cpu" for p in self.model.parameters())
        return on_cpu and not (torch.is_grad_enabled() or any(m.training for m in self.model.modules()))

    def _plain(self, example: Call, training: bool) -> Any:
        """Output and taps of the model's own pass on the example, or the error that it ends with in training mode."""

        def run() -> Any:
            return self._by_hooks(*example)

        if training:
            return _outcome(run, self.model, training)
        with untouched(self.model):
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
        if not (self.output or self.names):
            return None, {}
        if torch.compiler.is_compiling():
            if self._function is not None:
                return self._run(self._function, args, kwargs)
            by_hooks = torch.compiler.disable(self._by_hooks) if self._held is None else self._read_held
            return by_hooks(args, kwargs)
        if self._function is not None and self.unchanged:
            fused = self._fused is not None and self._may_fuse() and not (self._frozen and _not_finite(args, kwargs))
            return self._run(self._fused if fused else self._function, args, kwargs)
        return (self._by_held_hooks if self._held is not None and self.unchanged else self._by_hooks)(args, kwargs)

    def _by_hooks(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
        """The model's own pass, under hooks that are gone afterwards: they come last, and on the modules of this moment."""
        may_end = self._may_end and self.unchanged
        with tap(self.model, self.names, taught=torch.is_grad_enabled()) as taps:
            run = partial(_run_to_the_last_tap, self.model, self.names) if may_end else self.model
            output = run(*args, **kwargs)
        return output if self.output else None, {name: taps[name] for name in self.names}

    def _by_held_hooks(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
        with without_fast_path(bool(self.names)):
            return self._read_held(args, kwargs)

    def _read_held(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Tensor]]:
        assert self._held is not None
        try:
            output = self.model(*args, **kwargs)
            return output if self.output else None, {name: self._held[name] for name in self.names}
        finally:
            self._held.clear()  # the caller owns the tensors; the model must not keep a step's graph alive

    def remove(self) -> None:
        """Take hooks that were to stay off the model, if there are any."""
        if self._held is not None:
            self._held.remove()
            self._held = None

    def __getstate__(self) -> Any:
        raise UserError(
            f"a tapped {type(self.model).__name__} holds code that was made for it, and cannot be pickled: save its state_dict()"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Tapped:
        """A copy that reads its own copy of the model."""
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        for name, value in vars(self).items():
            vars(copy)[name] = None if name in ("_unchanged", "_hooks") else deepcopy(value, memo)
        if self.traced or self._may_end:
            if self.unchanged:
                copy._unchanged = Unchanged(copy.model)
            else:
                copy._function = copy._fused = copy.modules_run = None
                copy._may_end = False
        copy.remove()  # copied hooks would write where the original's do
        return copy


def guarded(run: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    """``compiled(tapped, ...)`` as long as the tapped model is `unchanged`, which compiled code does not look at;
    otherwise ``run``, the same uncompiled."""
    if compiled is run:
        return run

    def either(model: Tapped, *args: Any) -> Any:
        with without_fast_path(bool(model.names)):
            return (compiled if model.unchanged else run)(model, *args)

    return either
