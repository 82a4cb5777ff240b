"""Boxes around the objects of an image: which of them cannot be right, and how they move with an augmentation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from distpro.data.augment import AugmentSpec
from pathways.registry import UserError, check_parameters, nearest

Invalid = Literal["refuse", "drop"]

AUGMENTATIONS = {
    "flip": "RandomHorizontalFlip",
    "crop": "RandomIoUCrop",  # of SSD (Liu et al., ECCV 2016): a part that some box keeps a share in
    "zoom_out": "RandomZoomOut",  # likewise: the image in a larger frame
    "colour": "RandomPhotometricDistort",
}
"""Of torchvision.transforms.v2, which moves boxes with their images."""

Target = dict[str, Tensor]
Transform = Callable[[Tensor, Target], tuple[Tensor, Target]]

BEYOND = 1.0
"""Pixels that a box may reach beyond its image, by the rounding of whoever drew it; it is cut there."""


class Boxes(NamedTuple):
    """Boxes of one image: ``boxes`` (n, 4) float32, (left, top, right, bottom) in pixels; ``labels`` and ``crowd`` (n,) int64."""

    boxes: Tensor
    labels: Tensor
    crowd: Tensor

    @classmethod
    def none(cls) -> Boxes:
        """Those of an image without objects."""
        return cls(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))

    def and_also(self, other: Boxes) -> Boxes:
        """These and then the others."""
        return Boxes(*(torch.cat(pair) for pair in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Described:
    """An image file, its size (width, height) as its annotations say, and its boxes."""

    file: str
    size: tuple[int, int]
    boxes: Boxes


def check_boxes(
    place: str,
    entries: Sequence[tuple[Sequence[float], int, int]],
    size: tuple[int, int],
    invalid: Invalid = "refuse",
) -> Boxes:
    """Boxes, given as corners, label and whether of a crowd, cut to their image (width, height). Raises UserError, beginning
    with ``place``, for one that has no area, in float32 as it is stored, or lies outside of it by more than `BEYOND`; with
    ``invalid: drop`` such boxes are left out."""
    if invalid not in ("refuse", "drop"):
        raise UserError(f"{place}: invalid must be refuse or drop, got {invalid!r}")
    width, height = size
    if min(size) < 1:
        raise UserError(f"{place}: an image of {width}x{height} has no pixel")
    kept = []
    stored = torch.tensor([box for box, _, _ in entries], dtype=torch.float32).tolist()
    for (box, label, of_crowd), single in zip(entries, stored, strict=True):
        wrong = _wrong(single, width, height)
        if wrong and invalid == "refuse":
            shown = ", ".join(f"{x:g}" for x in box)
            raise UserError(f"{place}: the box [{shown}] {wrong} ('invalid: drop' leaves such boxes out)")
        if not wrong:
            left, top, right, bottom = single
            kept.append(([max(left, 0), max(top, 0), min(right, width), min(bottom, height)], label, of_crowd))
    if not kept:
        return Boxes.none()
    found, numbers, crowds = zip(*kept, strict=True)
    return Boxes(torch.tensor(found, dtype=torch.float32), torch.tensor(numbers), torch.tensor(crowds))


def _wrong(box: Sequence[float], width: int, height: int) -> str:
    left, top, right, bottom = box
    if not (right > left and bottom > top):  # of a number that is none, too
        return "(left, top, right, bottom) has no area"
    if left < -BEYOND or top < -BEYOND or right > width + BEYOND or bottom > height + BEYOND:
        return f"lies outside of its image, {width}x{height} (width x height)"
    if min(right, width) <= max(left, 0) or min(bottom, height) <= max(top, 0):
        return "has no area inside of its image"
    return ""


def build_box_augment(spec: AugmentSpec) -> Transform | None:
    """The augmentations of a data set's ``augment``, names of `AUGMENTATIONS` or {name: parameters}, in the order of
    application; boxes are cut to the image then, and those without a pixel in it are dropped. None where there are none. Raises
    UserError for an unknown name or parameter."""
    if isinstance(spec, str | Mapping):
        raise UserError(f"augment must be a list such as [flip, crop], got {spec!r}")
    if not spec:
        return None
    from torchvision import tv_tensors  # takes longer to import than the rest of distpro
    from torchvision.transforms import v2

    steps: list[Any] = []
    for entry in spec:
        named = {entry: None} if isinstance(entry, str) else entry
        if not isinstance(named, Mapping) or len(named) != 1:
            raise UserError(f"an augmentation must be a name or {{name: {{parameter: value}}}}, got {entry!r}")
        ((name, params),) = named.items()
        if name not in AUGMENTATIONS:
            allowed = ", ".join(AUGMENTATIONS)
            raise UserError(
                f"unknown augmentation of boxes '{name}'{nearest(name, list(AUGMENTATIONS))} (allowed: {allowed})"
            )
        kind = getattr(v2, AUGMENTATIONS[name])
        check_parameters(f"augmentation '{name}'", kind, params or {})
        try:
            steps.append(kind(**(params or {})))
        except (TypeError, ValueError) as error:
            raise UserError(f"augmentation '{name}': {error}") from None
    steps += [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1, labels_getter=_beside)]
    move = v2.Compose(steps)

    def transform(image: Tensor, target: Target) -> tuple[Tensor, Target]:
        size = (image.shape[1], image.shape[2])
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)  # type: ignore[call-overload]
        moved, found = move(tv_tensors.Image(image), {**target, "boxes": boxes})
        return moved.as_subclass(Tensor), {name: value.as_subclass(Tensor) for name, value in found.items()}

    return transform


def _beside(sample: Any) -> tuple[Tensor, Tensor]:
    """What goes with a box when it is dropped."""
    return sample[1]["labels"], sample[1]["iscrowd"]
