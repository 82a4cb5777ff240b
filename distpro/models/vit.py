"""Vision transformers: Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021, in the sizes of Touvron et al.,
"Training data-efficient image transformers & distillation through attention", ICML 2021."""

from __future__ import annotations

from torch import nn

from distpro.models.base import MODELS, StageTaps


@MODELS.register("deit_tiny")
def deit_tiny(num_classes: int = 1000) -> nn.Module:
    """DeiT-Ti with 16×16 patches, without the distillation token. (N, 3, 224, 224) → (N, num_classes).

    `stage_taps` are the tokens (197, 192) after every third of the 12 layers; there is no ReLU, so `pre` equals `post`.
    The embedding is the class token. Initialised as torchvision does (truncated normal, head 0).
    """
    from torchvision.models import VisionTransformer  # takes longer to import than the rest of distpro

    model = VisionTransformer(
        image_size=224, patch_size=16, num_layers=12, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=num_classes
    )
    layers = tuple(f"encoder.layers.encoder_layer_{i}" for i in (2, 5, 8, 11))
    model.stage_taps = StageTaps(post=layers, pre=layers, stem="encoder.dropout", embedding="heads:input")
    return model
