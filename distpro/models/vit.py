"""Vision transformers: Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021, in the sizes of Touvron et al.,
"Training data-efficient image transformers & distillation through attention", ICML 2021."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn

from distpro.console import pip_install
from distpro.models.base import MODELS, StageTaps
from pathways.registry import UserError


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


@MODELS.register("deit")
def deit(
    num_classes: int = 1000,
    img_size: int = 224,
    patch_size: int = 16,
    embed_dim: int = 192,
    depth: int = 12,
    num_heads: int = 3,
    mlp_ratio: float = 4.0,
    drop_path_rate: float = 0.0,
    fused: bool = True,
) -> nn.Module:
    """DeiT with its distillation token, timm's. (N, 3, S, S) → in training ``{"logits": (N, K), "distilled": (N, K)}``, of the
    class token's head and of the distillation token's; in evaluation (N, K), their mean.

    The defaults are DeiT-Ti/16; 384 and 6 heads make DeiT-S, 768 and 12 DeiT-B. For images of 32×32: ``img_size`` 32,
    ``patch_size`` 4. timm's and the authors' checkpoints fit. Taps: ``head_dist`` (logits of the distillation token),
    ``blocks.N`` (tokens: class, distillation, then the patches row by row; `stage_taps` are four of them), ``norm``.

    Args:
        drop_path_rate: stochastic depth of the last block, less before; 0.1 in the paper.
        fused: False computes attention in steps, so that ``blocks.N.attn.attn_drop:input`` are the attention maps (N, heads, L, L).

    Raises UserError without timm, and for sizes that do not fit one another.
    """
    if img_size % patch_size or embed_dim % num_heads or min(depth, num_heads) < 1:
        raise UserError(
            "model 'deit': img_size must be a multiple of patch_size, embed_dim of num_heads, got "
            f"{img_size} and {patch_size}, {embed_dim} and {num_heads}; depth {depth}"
        )
    model = _distilled_transformer()(
        num_classes=num_classes,
        img_size=img_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        drop_path_rate=drop_path_rate,
    )
    model.set_distilled_training(True)
    if not fused:
        for block in model.blocks:
            block.attn.fused_attn = False
    stages = min(4, depth)
    blocks = tuple(f"blocks.{(i + 1) * depth // stages - 1}" for i in range(stages))
    model.stage_taps = StageTaps(post=blocks, pre=blocks, stem="patch_embed", embedding="head:input")
    return model


@cache
def _distilled_transformer() -> Any:
    try:
        from timm.models.deit import VisionTransformerDistilled
    except ImportError:
        raise UserError(f"model 'deit' needs timm: {pip_install('timm')}") from None

    class DistilledTransformer(VisionTransformerDistilled):
        """timm's, whose two answers have names: what is called ``logits`` is what a task reads."""

        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
            output = super().forward_head(x, pre_logits)
            return {"logits": output[0], "distilled": output[1]} if isinstance(output, tuple) else output

    return DistilledTransformer
