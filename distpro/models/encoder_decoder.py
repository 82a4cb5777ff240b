"""Encoder-decoders for dense prediction: Ma, Karaman, "Sparse-to-Dense: Depth Prediction from Sparse Depth Samples and a
Single Image", ICRA 2018, and, of the `upproj` decoder, Laina et al., "Deeper Depth Prediction with Fully Convolutional
Residual Networks", 3DV 2016."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distpro.models.base import MODELS, StageTaps, build_model
from pathways.registry import UserError, nearest

STEPS = 4  # of the decoder, each of which doubles the size and halves the channels
LEVELS = tuple(f"decoder.layer{n}" for n in range(1, STEPS + 1))
HEADS = ("avgpool", "fc", "classifier", "head")  # what a classifier of torchvision has behind its last map


class EncoderDecoder(nn.Module):
    """Image (N, 3, H, W) → maps (N, num_classes, H, W).

    The encoder's last map goes through a 1×1 convolution, BatchNorm and four steps that double its size, without skip
    connections; a 3×3 convolution gives the output, which is scaled to the image (bilinear). `stage_taps` are the maps
    after each step, from small to large.

    Args:
        encoder: image → its last map (N, C, h, w).
        channels: C.
        width: channels that enter the decoder, a multiple of 16.
        step: channels → one step of the decoder, which ends in a ReLU.
    """

    stage_taps = StageTaps(
        post=LEVELS, pre=tuple(f"{level}:pre_relu" for level in LEVELS), stem="bottleneck", embedding=None
    )

    def __init__(self, encoder: nn.Module, channels: int, width: int, step: Any, num_classes: int = 1):
        super().__init__()
        self.encoder = encoder
        self.bottleneck = nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
        self.decoder = nn.Sequential(OrderedDict((f"layer{n + 1}", step(width >> n)) for n in range(STEPS)))
        self.head = nn.Conv2d(width >> STEPS, num_classes, 3, padding=1, bias=False)
        for part in (self.bottleneck, self.decoder, self.head):
            _initialise(part)

    def forward(self, x: Tensor) -> Tensor:
        out = self.head(self.decoder(self.bottleneck(self.encoder(x))))
        return F.interpolate(out, size=x.shape[2:], mode="bilinear", align_corners=True)


def _initialise(part: nn.Module) -> None:
    """Convolutions by He et al. for what they read; BatchNorm is at 1 and 0. S2D draws them with σ 1e-3."""
    for module in part.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _transposed(kernel: int) -> Any:
    def step(channels: int) -> nn.Module:
        grow = nn.ConvTranspose2d(channels, channels // 2, kernel, 2, (kernel - 1) // 2, kernel % 2, bias=False)
        return nn.Sequential(grow, nn.BatchNorm2d(channels // 2), nn.ReLU(inplace=True))

    return step


class UpProjection(nn.Module):
    """Zeros between the pixels, then two branches of convolutions that are added: (N, C, h, w) → (N, C / 2, 2 h, 2 w)."""

    corner: Tensor

    def __init__(self, channels: int):
        super().__init__()
        half, self.channels = channels // 2, channels  # a size of x is no number while PyTorch 2.8 traces
        self.upper = nn.Sequential(
            nn.Conv2d(channels, half, 5, padding=2, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            nn.Conv2d(half, half, 3, padding=1, bias=False),
            nn.BatchNorm2d(half),
        )
        self.lower = nn.Sequential(nn.Conv2d(channels, half, 5, padding=2, bias=False), nn.BatchNorm2d(half))
        self.relu = nn.ReLU(inplace=True)
        self.register_buffer("corner", torch.tensor([[1.0, 0.0], [0.0, 0.0]]).expand(channels, 1, 2, 2).clone(), False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv_transpose2d(x, self.corner, stride=2, groups=self.channels)
        return self.relu(self.upper(x) + self.lower(x))


DECODERS: Mapping[str, Any] = {"deconv2": _transposed(2), "deconv3": _transposed(3), "upproj": UpProjection}


@MODELS.register("encoder_decoder")
def encoder_decoder(
    encoder: str = "torchvision:resnet18",
    decoder: str = "deconv3",
    width: int | None = None,
    num_classes: int = 1,
    encoder_params: Mapping[str, Any] | None = None,
) -> nn.Module:
    """S2D's network on any encoder of torchvision or timm. (N, 3, H, W) → (N, num_classes, H, W): depth, or logits.

    Args:
        encoder: ``torchvision:NAME`` or ``timm:NAME``, a convolutional classifier of which the head is left out.
        decoder: ``deconv2``, ``deconv3`` (transposed convolutions with kernels of 2 or 3) or ``upproj``.
        width: channels that enter the decoder, a multiple of 16; by default half of the encoder's.
        encoder_params: of the encoder, for instance ``{weights: DEFAULT}`` of torchvision's, which fetches them.

    Departures from S2D: the decoder is initialised by He et al., not with σ 1e-3, and the image has no sparse depth beside
    its colours. Raises UserError for an encoder without maps, and for what is no decoder.
    """
    what = "model 'encoder_decoder'"
    if decoder not in DECODERS:
        raise UserError(
            f"{what}: unknown decoder '{decoder}'{nearest(decoder, DECODERS)} (allowed: {', '.join(DECODERS)})"
        )
    trunk = _encoder(what, encoder, dict(encoder_params or {}))
    channels = _channels(what, encoder, trunk)
    width = width or max(channels // 2 // 16, 1) * 16
    if width < 16 or width % 16:
        raise UserError(f"{what}: width must be a multiple of 16, got {width}")
    return EncoderDecoder(trunk, channels, width, DECODERS[decoder], num_classes)


def _encoder(what: str, name: str, params: dict[str, Any]) -> nn.Module:
    source = name.partition(":")[0]
    if source not in ("torchvision", "timm"):
        raise UserError(f"{what}: encoder must be torchvision:NAME or timm:NAME, got '{name}'")
    if source == "timm":
        return build_model(name, **{"num_classes": 0, "global_pool": "", **params})
    model = build_model(name, **params)
    features = getattr(model, "features", None)
    if isinstance(features, nn.Module):
        return features
    layers = OrderedDict(model.named_children())
    heads = [layer for layer in layers if layer in HEADS]
    kinds = ("ResNet", "ShuffleNetV2", "RegNet", "MNASNet")  # whose forward pass is one layer after the other
    if type(model).__name__ not in kinds or not heads:
        raise UserError(
            f"{what}: {name} has no part that gives maps alone (allowed: models with 'features', {', '.join(kinds)}, or timm:NAME)"
        )
    return nn.Sequential(OrderedDict((layer, module) for layer, module in layers.items() if layer not in heads))


@torch.no_grad()
def _channels(what: str, name: str, trunk: nn.Module) -> int:
    """Channels of the encoder's last map, found by a small image."""
    device = next(trunk.parameters()).device
    mode = trunk.training
    try:
        found = trunk.eval()(torch.zeros(1, 3, 64, 64, device=device))
    except Exception as error:  # whatever a model does with an image that is not of its size
        raise UserError(f"{what}: {name} takes no image of 64x64 ({type(error).__name__}: {error})") from error
    finally:
        trunk.train(mode)
    if not isinstance(found, Tensor) or found.dim() != 4:
        raise UserError(f"{what}: {name} gives no maps (N, C, H, W)")
    if found.shape[2] != found.shape[3]:  # of a square image
        raise UserError(f"{what}: {name} gives maps with their channels last, {tuple(found.shape)}, not (N, C, H, W)")
    return found.shape[1]
