"""Detectors that are small enough for a few cores: torchvision's Faster R-CNN, RetinaNet and FCOS on a feature pyramid over any of
its ResNets and MobileNets; and the bottleneck of head network distillation.

Torchvision's own builders, ``torchvision:fasterrcnn_resnet50_fpn`` and the like, have pyramids of 256 channels and anchors for
images of 800 pixels. All of these take a list of images (3, H, W) in 0-1 and normalise and resize them themselves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn

from distpro.data.datasets import locate
from distpro.models.base import MODELS, build_model
from distpro.models.loading import load_checkpoint
from pathways.registry import UserError

STAGES = ("layer1", "layer2", "layer3", "layer4")  # of a ResNet
RATIOS = (0.5, 1.0, 2.0)  # height / width of anchors


def pyramid(backbone: str, channels: int, levels: int, checkpoint: str | None = None) -> nn.Module:
    """A feature pyramid (Lin et al., CVPR 2017) of so many ``channels`` over the ``levels`` deepest stages of a network, whose
    strides are 32, 16, 8 and 4: torchvision's `BackboneWithFPN` with BatchNorm behind its convolutions, without which maps of networks
    that were trained from random weights differ in size by orders of magnitude, and cannot be compared. Its maps are keyed ``0`` (the finest), ``1``, ...; the stages
    of a ResNet are ``body.layer1`` and so on, the blocks of a MobileNet ``body.0``, ``body.1``, ...

    backbone: the name of a ResNet or a MobileNet of torchvision. checkpoint: weights of that classifier, whose head is left out.
    """
    from torchvision.models.detection.backbone_utils import BackboneWithFPN

    network: Any = build_model(f"torchvision:{backbone}")
    if checkpoint is not None:
        load_checkpoint(network, locate("backbone_checkpoint", checkpoint))
    if all(hasattr(network, stage) for stage in STAGES):
        ends = list(STAGES)
        widths = [
            max(m.out_channels for m in network.get_submodule(end)[-1].modules() if isinstance(m, nn.Conv2d))
            for end in ends
        ]
    elif backbone.startswith("mobilenet"):
        network = network.features
        strided = [n for n, block in enumerate(network) if getattr(block, "_is_cn", False)]
        places = [n - 1 for n in strided[1:]] + [len(network) - 2]  # the last one is a convolution for the classifier
        ends, widths = [str(n) for n in places], [network[n].out_channels for n in places]
    else:
        raise UserError(f"a feature pyramid is over a ResNet or a MobileNet of torchvision, not '{backbone}'")
    if not 1 <= levels <= len(ends):
        raise UserError(f"a feature pyramid over {backbone} has 1 to {len(ends)} levels, got {levels}")
    returned = {end: str(n) for n, end in enumerate(ends[-levels:])}
    found = BackboneWithFPN(network, returned, widths[-levels:], channels, norm_layer=nn.BatchNorm2d)
    found.fpn.extra_blocks = None  # a coarser map than of stride 32 has nothing to say of small images
    return found


def _sizes(sizes: Sequence[float] | None, levels: int, factor: float) -> list[float]:
    """Sides of the anchors per level; by default ``factor`` times its stride."""
    if sizes is None:
        return [factor * 32 / 2 ** (levels - 1 - n) for n in range(levels)]
    if len(sizes) != levels or min(sizes) <= 0:
        raise UserError(f"anchor_sizes must be {levels} numbers above 0, one a level, got {list(sizes)}")
    return list(sizes)


@MODELS.register("fasterrcnn_fpn")
def fasterrcnn_fpn(
    num_classes: int = 91,
    backbone: str = "resnet18",
    channels: int = 128,
    levels: int = 3,
    hidden: int = 256,
    min_size: int = 160,
    max_size: int = 192,
    anchor_sizes: Sequence[float] | None = None,
    backbone_checkpoint: str | None = None,
    **params: Any,
) -> nn.Module:
    """Faster R-CNN (Ren et al., NeurIPS 2015) on `pyramid`.

    num_classes: with the background. hidden: features of the two layers of the head of boxes. min_size, max_size: to which
    an image's shorter side is scaled, unless its longer side would be larger. anchor_sizes: one a level, by default 4 strides.
    params: of torchvision's `FasterRCNN`.
    """
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.ops import MultiScaleRoIAlign

    anchors = AnchorGenerator(tuple((size,) for size in _sizes(anchor_sizes, levels, 4)), (RATIOS,) * levels)
    return FasterRCNN(
        pyramid(backbone, channels, levels, backbone_checkpoint),
        None,
        min_size,
        max_size,
        rpn_anchor_generator=anchors,
        box_roi_pool=MultiScaleRoIAlign([str(n) for n in range(levels)], 7, 2),
        box_head=TwoMLPHead(channels * 7**2, hidden),
        box_predictor=FastRCNNPredictor(hidden, num_classes),
        **params,
    )


@MODELS.register("retinanet_fpn")
def retinanet_fpn(
    num_classes: int = 91,
    backbone: str = "resnet18",
    channels: int = 128,
    levels: int = 3,
    min_size: int = 160,
    max_size: int = 192,
    anchor_sizes: Sequence[float] | None = None,
    backbone_checkpoint: str | None = None,
    **params: Any,
) -> nn.Module:
    """RetinaNet (Lin et al., ICCV 2017) on `pyramid`, with anchors of three scales and three shapes; arguments as of
    `fasterrcnn_fpn`. ``channels``: a multiple of 32."""
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    scales = tuple(tuple(size * 2 ** (n / 3) for n in range(3)) for size in _sizes(anchor_sizes, levels, 4))
    return RetinaNet(
        pyramid(backbone, channels, levels, backbone_checkpoint),
        num_classes,
        min_size,
        max_size,
        anchor_generator=AnchorGenerator(scales, (RATIOS,) * levels),
        **params,
    )


@MODELS.register("fcos_fpn")
def fcos_fpn(
    num_classes: int = 91,
    backbone: str = "resnet18",
    channels: int = 128,
    levels: int = 3,
    convs: int = 2,
    min_size: int = 160,
    max_size: int = 192,
    score_thresh: float = 0.05,
    backbone_checkpoint: str | None = None,
    **params: Any,
) -> nn.Module:
    """FCOS (Tian et al., ICCV 2019) on `pyramid`; ``convs``: convolutions of each head; otherwise as `fasterrcnn_fpn`.
    ``channels``: a multiple of 32. Objects of less confidence than ``score_thresh`` are not given; torchvision's 0.2 leaves a
    weak model without any."""
    from torchvision.models.detection import FCOS
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.fcos import FCOSHead

    if channels % 32:
        raise UserError(f"fcos_fpn: channels must be a multiple of 32 (groups of its norms), got {channels}")
    anchors = AnchorGenerator(tuple((size,) for size in _sizes(None, levels, 1)), ((1.0,),) * levels)
    return FCOS(
        pyramid(backbone, channels, levels, backbone_checkpoint),
        num_classes,
        min_size,
        max_size,
        anchor_generator=anchors,
        head=FCOSHead(channels, 1, num_classes, convs),
        score_thresh=score_thresh,
        **params,
    )


@MODELS.register("ghnd_bottleneck")
def ghnd_bottleneck(
    in_channels: int = 64,
    encoder: Sequence[int] = (64, 256, 64, 3),
    decoder: Sequence[int] = (64, 128, 256, 256),
) -> nn.Module:
    """Encoder and decoder of 2×2 convolutions that take the place of a ResNet's ``layer1`` (Matsubara and Levorato, ICPR 2020): as
    in the authors' code the encoder's are padded by a pixel and the decoder's are not, so that a map (N, in_channels, H, W)
    keeps its size; without biases, BatchNorm behind each but the bottleneck, which has it in front of the decoder, ReLU behind
    every second.

    encoder: channels behind each of its convolutions, the last those of the bottleneck, 3; decoder: likewise, 256 at the end of
    ResNet-50's ``layer1``, 64 of ResNet-18's.
    """
    if len(encoder) != len(decoder) or not encoder or len(encoder) % 2:
        raise UserError(
            f"ghnd_bottleneck: encoder and decoder need an even number of convolutions, as many as each other, got {len(encoder)} "
            f"and {len(decoder)}"
        )
    *encoding, _norm, _relu = _convolutions([in_channels, *encoder], padding=1)
    decoding = _convolutions([encoder[-1], *decoder], padding=0)
    return nn.Sequential(
        OrderedDict(
            encoder=nn.Sequential(*encoding),
            decoder=nn.Sequential(nn.BatchNorm2d(encoder[-1]), nn.ReLU(), *decoding),
        )
    )


def _convolutions(widths: Sequence[int], padding: int) -> list[nn.Module]:
    found: list[nn.Module] = []
    for n, (before, after) in enumerate(zip(widths, widths[1:], strict=False)):
        found += [nn.Conv2d(before, after, 2, padding=padding, bias=False), nn.BatchNorm2d(after)]
        found += [nn.ReLU()] if n % 2 else []
    return found
