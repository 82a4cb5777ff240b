"""How a dense model is asked about images at evaluation: at several sizes, mirrored, and window by window."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pathways.registry import UserError

Ask = Callable[[Tensor], Tensor]
"""Images (N, C, h, w) → logits (N, K, h', w') of them."""


@dataclass(frozen=True)
class Views:
    """The views of an image whose predictions make one.

    Attributes:
        scales: factors on height and width, bilinear.
        flip: each view mirrored from left to right too.
        window: (height, width) of the windows that are asked one by one, or None: whole images. Where an image is smaller, it
            is padded with 0, the data's mean, to the right and below.
        stride: (vertical, horizontal) steps of the windows; the last ones end with the image.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None

    @classmethod
    def of(cls, what: str, scales: Any, flip: Any, window: Any, stride: Any) -> Views:
        """Views as a config says them; ``stride`` is two thirds of the window by default, as of mmsegmentation. Raises UserError,
        which begins with ``what``, for what is none."""
        numbers = (
            isinstance(scales, Sequence)
            and not isinstance(scales, str)
            and all(_is_number(s) and s > 0 for s in scales)
        )
        if not numbers or not scales:
            raise UserError(f"{what}: scales must be a list of numbers above 0, got {scales!r}")
        if not isinstance(flip, bool):
            raise UserError(f"{what}: flip must be true or false, got {flip!r}")
        size = None if window is None else _pair(f"{what}: window", window)
        if size is None:
            if stride is not None:
                raise UserError(f"{what}: stride is of windows: give window too")
            return cls(tuple(map(float, scales)), flip)
        step = tuple(max(1, side * 2 // 3) for side in size) if stride is None else _pair(f"{what}: stride", stride)
        if step[0] > size[0] or step[1] > size[1]:
            raise UserError(f"{what}: stride {list(step)} leaves gaps between windows of {list(size)}")
        return cls(tuple(map(float, scales)), flip, size, (step[0], step[1]))

    @property
    def plain(self) -> bool:
        """Whether it is the whole image alone, as it is."""
        return self == Views()

    def predict(self, ask: Ask, images: Tensor) -> Tensor:
        """Logits (N, K, H, W) of images (N, C, H, W): of windows the mean where they overlap; of several scales and of mirror
        images the logarithm of the mean probabilities."""
        if images.dim() != 4:
            raise UserError(
                f"segmentation: scales, flip and windows are of images (N, C, H, W), got {tuple(images.shape)}"
            )
        size = tuple(images.shape[2:])
        found = []
        for scale, mirrored in product(self.scales, (False, True) if self.flip else (False,)):
            sides = tuple(max(1, round(side * scale)) for side in size)
            view = images if sides == size else F.interpolate(images, sides, mode="bilinear", align_corners=False)
            logits = self._by_windows(ask, view.flip(3) if mirrored else view)
            found.append(_at(logits.flip(3) if mirrored else logits, size))
        if len(found) == 1:
            return found[0]
        return torch.stack([F.log_softmax(logits, 1) for logits in found]).logsumexp(0) - torch.tensor(len(found)).log()

    def _by_windows(self, ask: Ask, images: Tensor) -> Tensor:
        """Logits (N, K, H, W) in full precision."""
        size = tuple(images.shape[2:])
        if self.window is None:
            return _at(ask(images).float(), size)
        assert self.stride is not None
        lacking = [max(0, side - own) for side, own in zip(self.window, size, strict=True)]
        images = F.pad(images, (0, lacking[1], 0, lacking[0]))
        total, count = None, images.new_zeros(images.shape[2:], dtype=torch.float32)
        axes = zip(images.shape[2:], self.window, self.stride, strict=True)
        for top, left in product(*(list(_starts(*axis)) for axis in axes)):
            rows, columns = slice(top, top + self.window[0]), slice(left, left + self.window[1])
            logits = _at(ask(images[:, :, rows, columns]).float(), self.window)
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], *images.shape[2:])
            total[:, :, rows, columns] += logits
            count[rows, columns] += 1
        assert total is not None
        return (total / count)[:, :, : size[0], : size[1]]


def _starts(length: int, window: int, stride: int) -> Iterator[int]:
    yield from range(0, length - window, stride)
    yield length - window


def _at(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(logits.shape[2:]) == size:
        return logits
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _pair(what: str, value: Any) -> tuple[int, int]:
    sides = [value] * 2 if isinstance(value, int) else value
    if not isinstance(sides, Sequence) or len(sides) != 2 or not all(type(s) is int and s > 0 for s in sides):
        raise UserError(f"{what} must be a side or [height, width] of at least 1, got {value!r}")
    return sides[0], sides[1]
