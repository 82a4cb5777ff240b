"""What the libraries say of their pretrained weights, without fetching them."""

from __future__ import annotations

from typing import Any, NamedTuple

from pathways.registry import UserError


class Pretrained(NamedTuple):
    """How to ask for pretrained weights, and how they want their images.

    Attributes:
        params: of the model, which fetch the weights when it is built.
        mean, std: per channel, for images in 0-1; None where the library does not say.
        size, resize: side of the square images, and the length to which their short side is scaled before the centre crop.
        classes: of their answers; None where the library does not say.
    """

    params: dict[str, Any]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: int | None = None
    resize: int | None = None
    classes: int | None = None


def pretrained(name: str) -> Pretrained:
    """The pretrained weights of ``timm:NAME``, ``torchvision:NAME`` or ``hf:NAME``. Nothing is fetched.

    >>> pretrained("torchvision:resnet18").mean
    (0.485, 0.456, 0.406)

    Raises UserError for a model that has none.
    """
    library, _, rest = name.partition(":")
    if library == "torchvision":
        return _of_torchvision(name, rest)
    if library == "timm":
        return _of_timm(name, rest)
    if library == "hf":
        return Pretrained({"pretrained": True})
    raise UserError(f"model '{name}' has no pretrained weights (those with: timm:NAME, torchvision:NAME, hf:NAME)")


def _of_torchvision(name: str, rest: str) -> Pretrained:
    from torchvision import models

    if rest not in models.list_models():
        raise UserError(f"torchvision has no model '{rest}'")
    kinds = models.get_model_weights(rest)
    if not kinds.__members__:
        raise UserError(f"model '{name}' has no pretrained weights")
    made = kinds.DEFAULT.transforms()  # type: ignore[attr-defined]
    size, resize = (next(iter(getattr(made, key, ())), None) for key in ("crop_size", "resize_size"))
    stated = [tuple(found) if (found := getattr(made, key, None)) else None for key in ("mean", "std")]
    classes = len(kinds.DEFAULT.meta.get("categories", ())) or None  # type: ignore[attr-defined]
    return Pretrained({"weights": "DEFAULT"}, stated[0], stated[1], size, resize, classes)


def _of_timm(name: str, rest: str) -> Pretrained:
    from distpro.models.base import LIBRARIES

    LIBRARIES["timm"](f"model '{name}'", rest)  # raises where there is no timm, or no such model
    from timm.models import get_pretrained_cfg

    found = get_pretrained_cfg(rest)
    if found is None or not (found.url or found.hf_hub_id or found.file):
        raise UserError(f"model '{name}' has no pretrained weights")
    size = found.input_size[-1]
    return Pretrained(
        {"pretrained": True}, found.mean, found.std, size, round(size / found.crop_pct), found.num_classes
    )
