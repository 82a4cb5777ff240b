"""How the tensors inside a model are laid out: feature maps in either layout, token grids, neither.

A tensor (N, a, b, c) alone does not say whether it is (N, C, H, W) or (N, H, W, C). The modules do: a convolution gives
and takes the former, a Linear or LayerNorm the latter. What such a module gives or takes is known by that; an
activation's output by its input, a block by what has its shape inside it, or else by the blocks like it. Only then the
input's proportions are asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from pathways.call import Call
from pathways.containers import entries
from pathways.probing import probe_shapes, probing
from pathways.taps import TapName, check_taps, locate, parse_tap, read_input, read_output

Shape = tuple[int, ...]

FIRST, LAST = "first", "last"  # where a tensor has its channels, behind the samples

_CHANNELS_FIRST = (
    nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.GroupNorm,
    nn.InstanceNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.LPPool2d,
    nn.PixelShuffle, nn.PixelUnshuffle, nn.Upsample, nn.ZeroPad2d,
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """What one sample's part of a tensor is.

    Attributes:
        shape: (C, H, W) of a map in either layout, (L, D) of tokens, anything else as it is.
        channels_last: whether the tensor itself is (N, H, W, C).
        grid: height and width of the grid that tokens stand for, where it is known.
        prefix: tokens in front of the grid (class, distillation, registers).
        known: whether it follows from what the model's modules are; else a tensor (a, b, c) is read as (C, H, W).
    """

    shape: Shape
    channels_last: bool = False
    grid: tuple[int, int] | None = None
    prefix: int = 0
    known: bool = True

    @property
    def size(self) -> Shape:
        """Height and width of a map or of the grid; (L,) of tokens without one; () of what is neither."""
        if len(self.shape) == 3:
            return self.shape[1:]
        return (self.grid or self.shape[:1]) if len(self.shape) == 2 else ()

    def __str__(self) -> str:
        """In words: ``map``, ``map, channels last``, ``tokens (2 + 4×4)``."""
        if len(self.shape) == 3:
            return "map" + ", channels last" * self.channels_last + ", as nothing says otherwise" * (not self.known)
        if len(self.shape) != 2:
            return "vector" if len(self.shape) == 1 else "neither map nor tokens"
        prefix = f"{self.prefix} + " if self.prefix else ""
        return "tokens" if self.grid is None else f"tokens ({prefix}{self.grid[0]}×{self.grid[1]})"


def channels_first(x: Tensor, last: bool) -> Tensor:
    """A map as (N, C, H, W); what has its channels ``last`` is (N, H, W, C). A view."""
    return x.movedim(-1, 1) if last and x.dim() == 4 else x


@dataclass(eq=False)
class Seen:
    """A tensor that a module gave (or that a tap reads), without the samples' axis, and what the modules that gave or
    took it say of it. ``layout`` is None for what is no feature, or not clear."""

    name: str
    module: nn.Module
    path: str
    shape: Shape
    says: set[str]
    layout: Layout | None = None


class Record:
    """One forward pass in evaluation mode, watched: ``outputs`` of the modules that give one tensor, in the order of
    their ends, and ``taps`` by name."""

    def __init__(self, model: nn.Module, call: Call, names: Sequence[str] = ()):
        check_taps(model, names, type(model).__name__)
        self.outputs: list[Seen] = []
        self.taps: dict[str, Seen] = {}
        self._said: Any = WeakIdKeyDictionary()  # tensor → what modules say of it
        self._same: dict[Shape, Tensor | None] = {}  # of the first tokens of a shape, see `_same`
        self._samples = _samples(call)
        modules = dict(model.named_modules())
        places = [(name, locate(name, modules)) for name in names]
        handles = []
        for path, module in modules.items():
            mine = [(name, tap) for name, tap in places if tap.module == path]
            handles.append(module.register_forward_pre_hook(self._enter(path, mine), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave(path, mine)))
        try:
            with probing(model):
                call.run(model.eval())
        finally:
            for handle in handles:
                handle.remove()
        self.outputs = _of_one_shape(self.outputs)
        sizes = {tuple(t.shape[-2:]) for t in call.tensors() if t.dim() >= 3}
        _lay_out([*self.outputs, *self.taps.values()], sizes, self._same)

    def _enter(self, path: str, taps: Iterable[tuple[str, TapName]]) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            for tensor in (*args, *kwargs.values()):
                if isinstance(tensor, Tensor):
                    self._told(module, tensor)
            for name, tap in taps:
                if tap.point == "input":
                    self.taps[name] = self._note(name, path, module, read_input(name, tap, module, args, kwargs))

        return hook

    def _leave(self, path: str, taps: Iterable[tuple[str, TapName]]) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensors = {id(t): t for t in entries(output).values()}
            if len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor) and _keeps(module):
                self._said.setdefault(output, self._said.setdefault(args[0], set()))
            for tensor in tensors.values():
                self._told(module, tensor)
            if len(tensors) == 1 and path:
                (tensor,) = tensors.values()
                if tensor.dim() > 0 and len(tensor) == self._samples:
                    self.outputs.append(self._note(path, path, module, tensor))
            for name, tap in taps:
                if tap.point != "input":
                    self.taps[name] = self._note(name, path, module, read_output(name, tap, output))

        return hook

    def _note(self, name: str, path: str, module: nn.Module, tensor: Tensor) -> Seen:
        shape = tuple(tensor.shape[1:])
        if len(shape) == 2 and shape not in self._same:
            self._same[shape] = _same(tensor)
        return Seen(name, module, path, shape, self._said.setdefault(tensor, set()))

    def _told(self, module: nn.Module, tensor: Tensor) -> None:
        """Let a module say how a tensor that it has given or taken is laid out."""
        says = _says(module, tuple(tensor.shape[1:]))
        if says is not None:
            self._said.setdefault(tensor, set()).add(says)


def probe_layouts(model: nn.Module, names: Sequence[str], example_input: Any) -> dict[str, Layout]:
    """Layout of each tap, found by passes that leave no trace. Raises UserError as `tap` does."""
    taps = Record(model, Call.of(example_input).copied(), names).taps
    if set(names) - taps.keys() or any(parse_tap(name).point == "pre_relu" for name in names):
        probe_shapes(model, names, example_input)  # says what cannot be read
    found = {name: taps[name] for name in names}
    return {name: s.layout or Layout(s.shape, known=len(s.shape) != 3) for name, s in found.items()}


def _samples(call: Call) -> int:
    if call.args and isinstance(call.args[0], list):
        return len(call.args[0])
    first = next(call.tensors(), None)
    return 0 if first is None or first.dim() == 0 else len(first)


def _same(tokens: Tensor) -> Tensor | None:
    """Which tokens (N, L, D) are the same in all samples, (L,): those that no image has gone into yet. None where that says
    nothing, as of one sample."""
    same = (tokens == tokens[:1]).all(-1).all(0)
    return None if same.all() or not same.any() else same


def _of_one_shape(seen: Sequence[Seen]) -> list[Seen]:
    """The last output of each module, without the modules that give another shape each time."""
    shapes = Counter(name for name, _ in {(s.name, s.shape) for s in seen})
    return [s for s in {s.name: s for s in seen}.values() if shapes[s.name] == 1]


def _says(module: nn.Module, shape: Shape) -> str | None:
    """Where a tensor has its channels, by the class of a module that gives or takes it."""
    if len(shape) not in (2, 3):
        return None
    if isinstance(module, _CHANNELS_FIRST):
        return FIRST
    if isinstance(module, nn.Linear):
        return LAST
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) == 1:
        (channels,) = module.normalized_shape
        if type(module) in (nn.LayerNorm, nn.RMSNorm):
            return LAST
        if (shape[0] == channels) != (shape[-1] == channels):  # a subclass may move the axes inside
            return FIRST if shape[0] == channels else LAST
    return None


def _keeps(module: nn.Module) -> bool:
    """Whether what a module gives is laid out as what it takes: activations, dropout."""
    kind = type(module)
    return kind.__module__ in ("torch.nn.modules.activation", "torch.nn.modules.dropout") or kind is nn.Identity


def _lay_out(seen: Sequence[Seen], inputs: set[Shape], same: Mapping[Shape, Tensor | None]) -> None:
    """Say of each tensor what it is, as far as that is clear."""
    maps = [s for s in seen if len(s.shape) == 3]
    where: dict[int, str] = {id(s): next(iter(s.says)) for s in maps if len(s.says) == 1}
    for s in maps:
        inner = {
            where[id(o)] for o in maps if o.shape == s.shape and o.path.startswith(f"{s.path}.") and len(o.says) == 1
        }
        if not s.says and len(inner) == 1:
            where[id(s)] = inner.pop()
    like: dict[Any, set[str]] = {}
    for s in maps:
        if id(s) in where:
            like.setdefault((type(s.module), s.shape), set()).add(where[id(s)])
    for s in maps:
        if id(s) not in where and not s.says:
            alike = like.get((type(s.module), s.shape), set()) or {
                place for place, size in ((FIRST, s.shape[1:]), (LAST, s.shape[:2])) if _fits(size, inputs)
            }
            if len(alike) == 1:
                where[id(s)] = next(iter(alike))
    for s in maps:
        place = where.get(id(s))
        if place == FIRST:
            s.layout = Layout(s.shape)
        elif place == LAST and (not inputs or _fits(s.shape[:2], inputs)):  # else the vectors of each head
            s.layout = Layout((s.shape[2], *s.shape[:2]), channels_last=True)
    _lay_out_tokens(seen, same)


def _lay_out_tokens(seen: Sequence[Seen], same: Mapping[Shape, Tensor | None]) -> None:
    """Tokens (L, D) stand for the grid of a map with D channels that they were made of.

    Tokens that are as many as its positions are those. With more of them, the others are in front; the map was then
    there before any tokens of this shape, which a map inside of a block, made of fewer of them, was not. Where samples
    show that the others are elsewhere (detection tokens, behind the grid), nothing is said of a grid."""
    sizes: dict[int, set[tuple[int, int]]] = {}  # of the maps seen so far, by their channels
    embedded: dict[Shape, set[tuple[int, int]]] = {}
    for s in seen:
        if len(s.shape) == 3 and s.layout is not None:
            sizes.setdefault(s.layout.shape[0], set()).add(s.layout.shape[1:])  # type: ignore[arg-type]
        elif len(s.shape) == 2 and s.says != {FIRST} and (s.says or any(s.module.children()) or s.name != s.path):
            length, width = s.shape
            before = embedded.setdefault(s.shape, set(sizes.get(width, ())))
            exact = [size for size in sizes.get(width, ()) if size[0] * size[1] == length]
            fewer = [size for size in before if size[0] * size[1] < length]
            grid = next(iter(exact), None) or max(fewer, key=lambda size: size[0] * size[1], default=None)
            prefix = length - grid[0] * grid[1] if grid else 0
            alike = same.get(s.shape)
            if prefix and alike is not None and alike[prefix:].any() and not alike[:prefix].all():
                grid, prefix = None, 0
            s.layout = Layout(s.shape, grid=grid, prefix=prefix)
        elif len(s.shape) == 1:
            s.layout = Layout(s.shape)


def _fits(size: Shape, inputs: set[Shape]) -> bool:
    """Whether a spatial size is that of an input made smaller: neither side longer, about the same ratio of sides."""
    (h, w) = size
    return any(h <= h0 and w <= w0 and abs(h * w0 - w * h0) <= 2 * max(h0, w0) for h0, w0 in inputs)
