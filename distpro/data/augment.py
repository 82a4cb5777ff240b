"""Augmentations of whole batches on the device, by name.

A geometric augmentation does not move pixels: it says, for each output pixel, which input pixel it shows. These maps
are composed from last to first over a list of augmentations, and images, and label maps with them, are read once at
the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor

from distpro.data.counter import BITS, below, chance, draw, fraction, make_key
from pathways.registry import Registry, UserError

AUGMENTATIONS = Registry("augmentation")

VOID = 255  # in a label map: a pixel that has no class

AugmentSpec = Sequence[str | Mapping[str, Mapping[str, Any] | None]]
"""Names, or {name: parameters}, in the order of application: ``[{"crop": {"padding": 4}}, "flip"]``."""


@dataclass
class Grid:
    """The input pixel that each output pixel shows. ``row`` and ``col`` are int64, masks are bool, all broadcastable
    to (B, H, W) of the output. Pixels that are not ``inside`` are black, and void in a label map; those that are not
    ``kept`` are 0 after normalisation. ``height`` and ``width``: of the images that the augmentation at hand reads.
    ``enlarged``: how many times larger things are in the output, (B, 1, 1) float32; None: as large."""

    height: int
    width: int
    row: Tensor
    col: Tensor
    inside: Tensor | None = None
    kept: Tensor | None = None
    enlarged: Tensor | None = None

    @classmethod
    def identity(cls, height: int, width: int, device: torch.device) -> Grid:
        row = torch.arange(height, device=device).view(1, height, 1)
        col = torch.arange(width, device=device).view(1, 1, width)
        return cls(height, width, row, col)


class Augmentation:
    """Base. ``draws``: how many random numbers a sample needs."""

    draws: ClassVar[int]

    def __call__(self, grid: Grid, *drawn: Tensor) -> None:
        """Compose this augmentation's map into ``grid``. ``drawn``: ``draws`` tensors of shape (B, 1, 1)."""
        raise NotImplementedError

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of its images where it reads images of ``height`` x ``width``."""
        return height, width


@AUGMENTATIONS.register("crop")
class Crop(Augmentation):
    """Pad with ``padding`` black pixels on each side, then crop at random to ``size`` [height, width], or to the
    original size. ``padding`` is 4 by default, and 0 where ``size`` is given."""

    draws = 2

    def __init__(self, padding: int | None = None, size: Sequence[int] | None = None):
        padding = (4 if size is None else 0) if padding is None else padding
        check_value("crop", "padding", padding, whole_number(padding, 0), "a whole number of at least 0")
        holds = size is None or (
            isinstance(size, Sequence) and len(size) == 2 and all(whole_number(n, 1) for n in size)
        )
        check_value("crop", "size", size, holds, "[height, width], whole numbers of at least 1")
        self.padding, self.size = padding, None if size is None else (size[0], size[1])

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        size, most = self.size or (height, width), (height + 2 * self.padding, width + 2 * self.padding)
        if size[0] > most[0] or size[1] > most[1]:
            raise UserError(
                f"augmentation 'crop': size {size[0]}x{size[1]} is larger than the images, "
                f"{most[0]}x{most[1]} with padding {self.padding}"
            )
        return size

    def __call__(self, grid: Grid, *drawn: Tensor) -> None:
        sizes = self.output_size(grid.height, grid.width)
        top, left = (
            below(d, whole + 2 * self.padding - part + 1) - self.padding
            for d, whole, part in zip(drawn, (grid.height, grid.width), sizes, strict=True)
        )
        grid.row, grid.col = grid.row + top, grid.col + left
        _leave_out(grid)


@AUGMENTATIONS.register("scale")
class Scale(Augmentation):
    """Enlarge or shrink by a factor drawn evenly from ``range`` [low, high] about a random pixel, to the nearest
    neighbour; the frame stays. So a larger factor than 1 shows a random part of the image, and a smaller one the whole
    image at a random place of a black frame. For segmentation, as in DeepLab (Chen et al., 2018), with a ``crop``. Depth is
    divided by the factor: what looks larger is nearer (Eigen et al., NIPS 2014)."""

    draws = 3
    unit = 1 << 16  # of the factor: whole numbers, so that every device finds the same pixels

    def __init__(self, range: Sequence[float] = (0.5, 2.0)):
        holds = len(range) == 2 and 0.01 <= range[0] <= range[1] <= 100
        check_value("scale", "range", range, holds, "[low, high] with 0.01 <= low <= high <= 100")
        self.low, self.high = (round(factor * self.unit) for factor in range)

    def __call__(self, grid: Grid, *drawn: Tensor) -> None:
        factor = self.low + below(drawn[0], self.high - self.low + 1)
        enlarged = factor.float() / self.unit
        grid.enlarged = enlarged if grid.enlarged is None else grid.enlarged * enlarged
        row, col = below(drawn[1], grid.height), below(drawn[2], grid.width)
        grid.row, grid.col = self._source(grid.row, row, factor), self._source(grid.col, col, factor)
        _leave_out(grid)

    def _source(self, place: Tensor, about: Tensor, factor: Tensor) -> Tensor:
        """about + (place - about) / factor, to the nearest whole number, in whole numbers."""
        away = 2 * self.unit * (place - about) + factor
        return about + torch.div(away, 2 * factor, rounding_mode="floor")


@AUGMENTATIONS.register("flip")
class Flip(Augmentation):
    """Mirror left to right with probability ``p``."""

    draws = 1

    def __init__(self, p: float = 0.5):
        check_value("flip", "p", p, 0 <= p <= 1, "a probability between 0 and 1")
        self.p = p

    def __call__(self, grid: Grid, *drawn: Tensor) -> None:
        grid.col = torch.where(chance(drawn[0], self.p), grid.width - 1 - grid.col, grid.col)


@AUGMENTATIONS.register("rotate90")
class Rotate90(Augmentation):
    """Turn counter-clockwise by 0, 90, 180 or 270 degrees, each as likely. Square images only."""

    draws = 1

    def __call__(self, grid: Grid, *drawn: Tensor) -> None:
        if grid.height != grid.width:
            raise UserError(f"augmentation 'rotate90' needs square images, got {grid.height}x{grid.width}")
        turns, last = below(drawn[0], 4), grid.height - 1
        odd = turns % 2 == 1
        row, col = torch.where(odd, grid.col, grid.row), torch.where(odd, grid.row, grid.col)
        grid.row = torch.where(turns >= 2, last - row, row)
        grid.col = torch.where((turns == 1) | (turns == 2), last - col, col)


@AUGMENTATIONS.register("cutout")
class Cutout(Augmentation):
    """Blank a square of side ``size`` (pixels) around a random pixel; the part beyond the border is lost. The square
    is 0 after normalisation, that is the mean colour (DeVries, Taylor: "Improved Regularization of Convolutional
    Neural Networks with Cutout", 2017)."""

    draws = 2

    def __init__(self, size: int = 16):
        check_value("cutout", "size", size, whole_number(size, 1), "a whole number of at least 1")
        self.size = size

    def __call__(self, grid: Grid, *drawn: Tensor) -> None:
        top, left = (below(d, n) - self.size // 2 for d, n in zip(drawn, (grid.height, grid.width), strict=True))
        _blank(grid, _within(grid.row - top, self.size) & _within(grid.col - left, self.size))


@AUGMENTATIONS.register("random_erasing")
class RandomErasing(Augmentation):
    """Blank a rectangle with probability ``p``: ``scale`` is the range of its share of the area, ``ratio`` of height / width, drawn
    in logarithm; nothing where ten tries do not fit into the image. The rectangle is 0 after normalisation, that is the mean
    colour (Zhong et al., "Random Erasing Data Augmentation", AAAI 2020; ranges and tries as torchvision's RandomErasing)."""

    tries = 10
    draws = 1 + 2 * tries + 2

    def __init__(self, p: float = 0.5, scale: Sequence[float] = (0.02, 0.33), ratio: Sequence[float] = (0.3, 3.3)):
        check_value("random_erasing", "p", p, 0 <= p <= 1, "a probability between 0 and 1")
        check_range("random_erasing", "scale", scale, 1)
        check_range("random_erasing", "ratio", ratio, math.inf)
        self.p, self.scale, self.ratio = p, scale, ratio

    def __call__(self, grid: Grid, *drawn: Tensor) -> None:
        erased, *sizes, x, y = drawn
        height = width = torch.zeros_like(erased)
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for area, ratio in zip(sizes[-2::-2], sizes[-1::-2], strict=True):  # the first that fits, last
            part = grid.height * grid.width * _between(area, *self.scale)
            aspect = _between(ratio, low, high).exp()
            h, w = (part * aspect).sqrt().round().long(), (part / aspect).sqrt().round().long()
            fits = (h < grid.height) & (w < grid.width)
            height, width = torch.where(fits, h, height), torch.where(fits, w, width)
        top, left = (
            (d * (whole - part + 1)) >> BITS for d, whole, part in ((y, grid.height, height), (x, grid.width, width))
        )
        inside = _within(grid.row - top, height) & _within(grid.col - left, width)
        _blank(grid, inside & chance(erased, self.p))


@AUGMENTATIONS.register("resized_crop")
class ResizedCrop(Augmentation):
    """Crop a random part of the image and scale it to the image size; for streamed sets, where it works on the image
    in full resolution. ``scale``: range of the part's area; ``ratio``: range of width / height, drawn in logarithm
    (Szegedy et al., "Going Deeper with Convolutions", CVPR 2015; ranges as torchvision's RandomResizedCrop)."""

    tries = 10
    draws = 2 * tries + 2

    def __init__(self, scale: Sequence[float] = (0.08, 1.0), ratio: Sequence[float] = (3 / 4, 4 / 3)):
        check_range("resized_crop", "scale", scale, 1)
        check_range("resized_crop", "ratio", ratio, math.inf)
        self.scale, self.ratio = scale, ratio

    def box(self, width: int, height: int, drawn: Sequence[int]) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the part, from ``draws`` numbers; the largest central part of an allowed
        ratio where no try fits into the image."""
        *sizes, x, y = drawn
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for area, ratio in zip(sizes[::2], sizes[1::2], strict=True):
            part, aspect = width * height * fraction(area, *self.scale), math.exp(fraction(ratio, low, high))
            w, h = round(math.sqrt(part * aspect)), round(math.sqrt(part / aspect))
            if 0 < w <= width and 0 < h <= height:
                left, top = int(fraction(x, 0, width - w + 1)), int(fraction(y, 0, height - h + 1))
                return left, top, left + w, top + h
        w = min(width, round(height * self.ratio[1]))
        h = min(height, round(width / self.ratio[0]))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


def _within(value: Tensor, size: int | Tensor) -> Tensor:
    return (value >= 0) & (value < size)


def _between(drawn: Tensor, low: float, high: float) -> Tensor:
    """Drawn numbers as float64 in [low, high)."""
    return low + (high - low) * (drawn.double() / (1 << BITS))


def _blank(grid: Grid, pixels: Tensor) -> None:
    """Let pixels be 0 after normalisation."""
    kept = ~pixels
    if grid.inside is not None:
        kept = kept | ~grid.inside  # a crop after it has made these pixels black
    grid.kept = kept if grid.kept is None else grid.kept & kept


def _leave_out(grid: Grid) -> None:
    """Mark the pixels that show nothing of the image."""
    inside = _within(grid.row, grid.height) & _within(grid.col, grid.width)
    grid.inside = inside if grid.inside is None else grid.inside & inside


def whole_number(value: Any, least: int) -> bool:
    """Whether a parameter is a whole number of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_value(augmentation: str, name: str, value: Any, holds: bool, rule: str) -> None:
    """Raise UserError unless a parameter ``holds`` to its rule."""
    if not holds:
        raise UserError(f"augmentation '{augmentation}': {name} must be {rule}, got {value!r}")


def check_range(augmentation: str, name: str, value: Any, most: float) -> None:
    """Raise UserError unless a parameter is [low, high] above 0 and at most ``most``."""
    holds = isinstance(value, Sequence) and len(value) == 2 and 0 < value[0] <= value[1] <= most
    check_value(augmentation, name, value, holds, f"[low, high] with 0 < low <= high <= {most}")


def build_augment(spec: AugmentSpec) -> dict[str, Augmentation]:
    """The augmentations of a config, by name, in the order of application. Raises UserError for an unknown name or
    parameter, a value out of range, or a name that occurs twice."""
    if isinstance(spec, str | Mapping):
        raise UserError(f"augment must be a list such as ['crop', 'flip'], got {spec!r}")
    built: dict[str, Augmentation] = {}
    for entry in spec:
        name, params = _name_and_parameters(entry)
        if name in built:
            raise UserError(f"augmentation '{name}' is given twice")
        built[name] = AUGMENTATIONS.build(name, **params)
        blanks = next((other for other in built if other in ("cutout", "random_erasing")), None)
        if blanks is not None and hasattr(built[name], "change"):
            raise UserError(
                f"augmentation '{name}' must come before '{blanks}', which blanks what is left of the image"
            )
    return built


def _name_and_parameters(entry: str | Mapping[str, Mapping[str, Any] | None]) -> tuple[str, Mapping[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, Mapping) and len(entry) == 1:
        [(name, params)] = entry.items()
        if params is None or isinstance(params, Mapping):
            return name, params or {}
    raise UserError(f"an augmentation must be a name or {{name: {{parameter: value}}}}, got {entry!r}")


def draw_for(name: str, augmentation: Augmentation, index: Tensor, seed: int, epoch: int) -> Tensor:
    """The random numbers of samples ``index`` (N,) in one epoch, shape (N, draws) int64: a pure function of
    (seed, epoch, sample number, augmentation name), the same on every device."""
    keys = [make_key(seed, epoch, name, i) for i in range(augmentation.draws)]
    return torch.stack([draw(key, index) for key in keys], dim=1)


def output_size(augmentations: Sequence[Augmentation], height: int, width: int) -> tuple[int, int]:
    """(height, width) of what ``augmentations`` make of images of ``height`` x ``width``."""
    for augmentation in augmentations:
        height, width = augmentation.output_size(height, width)
    return height, width


def apply(
    augmentations: Sequence[Augmentation],
    images: Tensor,
    drawn: Sequence[Tensor],
    maps: Tensor | None = None,
    depth: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Augment uint8 ``images`` (B, C, H, W), and label ``maps`` (B, H, W) by the same movements. ``drawn``: per
    augmentation (B, draws). ``depth``: the maps are distances, int32.

    Returns the images, the mask of their pixels to be kept (bool, broadcastable to (B, H, W), None if all are), and
    the maps, `VOID` where a pixel shows nothing of the image, of distances 0. A pixel that is not kept still has its label.
    Distances become float32 where an augmentation has enlarged or shrunk what they are of.
    """
    kept = None
    for changes, run in groupby(zip(augmentations, drawn, strict=True), lambda pair: hasattr(pair[0], "change")):
        if not changes:
            moving, numbers_of = zip(*run, strict=True)
            images, kept, maps = _moved(moving, numbers_of, images, maps, depth)
            continue
        for augmentation, numbers in run:
            images = augmentation.change(images, numbers)  # type: ignore[attr-defined]
    return images, kept, maps


def _moved(
    augmentations: Sequence[Augmentation], drawn: Sequence[Tensor], images: Tensor, maps: Tensor | None, depth: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`apply` of augmentations that move pixels, in one reading."""
    sizes = [(images.shape[-2], images.shape[-1])]
    for augmentation in augmentations:
        sizes.append(augmentation.output_size(*sizes[-1]))
    grid = Grid.identity(*sizes[-1], images.device)
    for augmentation, numbers, size in zip(reversed(augmentations), reversed(drawn), sizes[-2::-1], strict=True):
        grid.height, grid.width = size
        augmentation(grid, *numbers[:, :, None, None].unbind(1))
    read = _read(images, grid, sizes[-1], outside=0)
    if maps is not None:
        maps = _read(maps.unsqueeze(1), grid, sizes[-1], 0 if depth else VOID).squeeze(1)
        maps = maps / grid.enlarged if depth and grid.enlarged is not None else maps
    return read, grid.kept, maps


def _read(images: Tensor, grid: Grid, size: tuple[int, int], outside: int) -> Tensor:
    """The pixels of (B, C, H, W) that the grid says, (B, C, *size)."""
    batch, channels, height, width = images.shape
    pixel = grid.row.clamp(0, height - 1) * width + grid.col.clamp(0, width - 1)
    pixel = pixel.expand(batch, *size).reshape(batch, 1, -1).expand(-1, channels, -1)
    out = images.flatten(2).gather(2, pixel).view(batch, channels, *size)
    if grid.inside is None:
        return out
    inside = grid.inside.unsqueeze(1)
    return out.mul_(inside) if outside == 0 else out.masked_fill_(~inside, outside)
