"""Augmentations by torchvision's transforms, image by image: RandAugment, TrivialAugment and colour jitter."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from distpro.data.augment import AUGMENTATIONS, Augmentation, Grid, check_value, whole_number
from pathways.registry import UserError


class PerImage(Augmentation):
    """Base. Calls a transform of torchvision.transforms.v2 on each uint8 image (C, H, W), C 1 or 3, under a state of PyTorch's
    random numbers that the sample's number and epoch decide; the process's own is left as it was. The transforms draw on the
    CPU, so that every device draws the same."""

    draws = 1
    moves: ClassVar[bool] = True  # pixels, which label maps would have to follow

    def __init__(self, name: str, **params: Any):
        from torchvision.transforms import v2  # takes longer to import than the rest of distpro

        try:
            self.transform = getattr(v2, name)(**params)
        except (TypeError, ValueError) as error:
            raise UserError(f"augmentation '{self.name}': {error}") from None

    @property
    def name(self) -> str:
        return next(name for name, kind in AUGMENTATIONS.items() if kind is type(self))

    def __call__(self, grid: Grid, *drawn: Tensor) -> None:
        raise AssertionError("changes images, does not say where pixels come from")

    def change(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Changed uint8 images (B, C, H, W); ``drawn``: (B, 1) int64."""
        state = torch.get_rng_state()
        try:
            changed = []
            for image, seed in zip(images, drawn[:, 0].tolist(), strict=True):
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would move other devices' numbers too
                changed.append(self.transform(image))
        finally:
            torch.set_rng_state(state)
        return torch.stack(changed) if changed else images


@AUGMENTATIONS.register("rand_augment")
class RandAugment(PerImage):
    """``num_ops`` operations drawn from torchvision's fourteen, with ``magnitude`` of 0 to 30 (Cubuk et al., "RandAugment: Practical
    Automated Data Augmentation with a Reduced Search Space", 2020)."""

    def __init__(self, num_ops: int = 2, magnitude: int = 9):
        check_value("rand_augment", "num_ops", num_ops, whole_number(num_ops, 1), "a whole number of at least 1")
        holds = whole_number(magnitude, 0) and magnitude <= 30
        check_value("rand_augment", "magnitude", magnitude, holds, "a whole number from 0 to 30")
        super().__init__("RandAugment", num_ops=num_ops, magnitude=magnitude)


@AUGMENTATIONS.register("trivial_augment")
class TrivialAugment(PerImage):
    """One operation of a random magnitude (Müller, Hutter: "TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation",
    ICCV 2021; torchvision's TrivialAugmentWide)."""

    def __init__(self) -> None:
        super().__init__("TrivialAugmentWide")


@AUGMENTATIONS.register("colour_jitter")
class ColourJitter(PerImage):
    """``brightness``, ``contrast`` and ``saturation`` by a factor from max(0, 1 − x) to 1 + x, ``hue`` turned by −x to x (at most
    0.5), in random order. Moves no pixel, so that label maps stay."""

    moves = False

    def __init__(self, brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4, hue: float = 0.0):
        super().__init__("ColorJitter", brightness=brightness, contrast=contrast, saturation=saturation, hue=hue)
