"""PSPNet: Zhao et al., "Pyramid scene parsing network", CVPR 2017, as the distillation papers of segmentation use it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distpro.console import pip_install
from distpro.models.base import MODELS, StageTaps
from pathways.registry import UserError


class _Pooled(nn.Sequential):
    """A map's means over ``bins`` × ``bins`` parts, convolved, at the map's size again."""

    def __init__(self, width: int, out: int, bins: int):
        # no BatchNorm over one value a channel: of a single image it could not train
        norm = nn.Identity() if bins == 1 else nn.BatchNorm2d(out)
        super().__init__(nn.AdaptiveAvgPool2d(bins), nn.Conv2d(width, out, 1, bias=bins == 1), norm, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(super().forward(x), x.shape[2:], mode="bilinear", align_corners=False)


class PyramidPooling(nn.Module):
    """(N, C, H, W) → (N, out, H, W): the map beside its means over 1, 4, 9 and 36 parts, through a 3×3 convolution."""

    def __init__(self, width: int, out: int, bins: Sequence[int] = (1, 2, 3, 6), dropout: float = 0.1):
        super().__init__()
        each = width // len(bins)
        self.pooled = nn.ModuleList(_Pooled(width, each, n) for n in bins)
        self.join = _conv3x3(width + each * len(bins), out)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.join(torch.cat([x, *(pool(x) for pool in self.pooled)], 1)))


class PSPNet(nn.Module):
    """(N, 3, H, W) → ``{"out": (N, K, H, W), "aux": (N, K, H, W)}``, see `pspnet`."""

    def __init__(self, num_classes: int, encoder: str, width: int, auxiliary: bool, dropout: float):
        super().__init__()
        self.encoder = _encoder(encoder)
        *_, last, deep = self.encoder.feature_info.channels()  # type: ignore[union-attr,operator]
        self.pooling = PyramidPooling(deep, width, dropout=dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        self.auxiliary = None
        if auxiliary:
            self.auxiliary = nn.Sequential(
                _conv3x3(last, last // 4), nn.Dropout2d(dropout), nn.Conv2d(last // 4, num_classes, 1)
            )
        stages = tuple(f"encoder.{name}" for name in self.encoder.feature_info.module_name()[1:])  # type: ignore[union-attr,operator]
        self.stage_taps = StageTaps(
            post=(*stages, "pooling"),
            pre=(*(f"{stage}:pre_relu" for stage in stages), "pooling"),
            stem="encoder.maxpool",
            embedding="pooling",
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        *_, last, deep = self.encoder(x)
        found = {"out": self.classifier(self.pooling(deep))}
        if self.auxiliary is not None:
            found["aux"] = self.auxiliary(last)
        return {name: F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=False) for name, y in found.items()}


@MODELS.register("pspnet")
def pspnet(
    num_classes: int = 21, encoder: str = "resnet18", width: int = 512, auxiliary: bool = True, dropout: float = 0.1
) -> PSPNet:
    """PSPNet on a ResNet of timm, whose last two stages are dilated in place of their strides (1/8 of the image's size).

    Taps: ``encoder.layer1`` to ``encoder.layer4``, and ``pooling``, the features in front of the classifier. Random weights.

    Args:
        encoder: a ResNet of timm: resnet18, resnet101, ...
        width: channels in front of the classifier, 512 in the paper.
        auxiliary: a second head on the last stage but one, for the loss in training.

    Raises UserError without timm, and for an encoder that timm does not have or cannot dilate.
    """
    return PSPNet(num_classes, encoder, width, auxiliary, dropout)


def _conv3x3(width: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


def _encoder(name: str) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise UserError(f"model 'pspnet' needs timm: {pip_install('timm')}") from None
    try:
        return timm.create_model(name, features_only=True, output_stride=8)
    except (TypeError, ValueError, KeyError, NotImplementedError, RuntimeError, AssertionError) as error:
        reason = str(error) or "it cannot be dilated"
        raise UserError(f"model 'pspnet': encoder '{name}': {reason} (allowed: a ResNet of timm)") from None
