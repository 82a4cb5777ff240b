"""Architectures of other libraries, with random weights at a small size, and the stages that they are known to have.

The stages are written down from the architectures' papers and sources: their widths, and for tokens the tokens in front
and the grid. ``maps`` are (N, C, H, W), ``last`` (N, H, W, C), ``tokens`` (N, L, D); None: the model computes several
sizes side by side or hands containers from block to block, so that its taps have to be named.
"""

import importlib
import pydoc
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import _efficientnet_conf


class Stages(NamedTuple):
    kind: str
    widths: list[int]
    grids: tuple[int, ...] = ()  # sides of the square grids of tokens; one for all or one per stage; 0: not known
    prefix: int = 0


def narrowed(model, by):
    """A model of convolutions, BatchNorms and linear layers with so many times fewer channels between image and classes."""

    def less(channels, ends=()):
        return channels if channels in ends else channels // by

    for module in model.modules() if by > 1 else ():
        if isinstance(module, torch.nn.Conv2d):
            depthwise = module.groups == module.in_channels
            module.in_channels, module.out_channels = less(module.in_channels, (3,)), less(module.out_channels, (5,))
            module.groups = module.in_channels if depthwise else module.groups
            _keep_rows(module, ["weight", "bias"], module.out_channels)
            _keep_columns(module, module.in_channels // module.groups)
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.num_features = less(module.num_features)
            _keep_rows(module, ["weight", "bias", "running_mean", "running_var"], module.num_features)
        elif isinstance(module, torch.nn.Linear):
            module.in_features, module.out_features = less(module.in_features), less(module.out_features, (5,))
            _keep_rows(module, ["weight", "bias"], module.out_features)
            _keep_columns(module, module.in_features)
    return model


def _keep_rows(module, names, rows):
    for name in names:
        tensor = getattr(module, name)
        if tensor is not None:
            kept = tensor[:rows].detach().clone()
            setattr(module, name, torch.nn.Parameter(kept) if isinstance(tensor, torch.nn.Parameter) else kept)


def _keep_columns(module, columns):
    """And outputs as large as before: their variance is a sum over the columns."""
    scale = (module.weight.shape[1] / columns) ** 0.5
    module.weight = torch.nn.Parameter(scale * module.weight.detach()[:, :columns])


def maps(*widths):
    return Stages("maps", list(widths))


def last(*widths):
    return Stages("last", list(widths))


def tokens(widths, grids=(), prefix=0):
    return Stages("tokens", widths, grids, prefix)


class Architecture(NamedTuple):
    library: str
    name: str
    size: int
    stages: Stages | None
    params: dict[str, Any] = {}
    narrower: int = 1

    def smaller(self):
        """With fewer and narrower layers or smaller images, where it is known how to say so."""
        changes = dict(SMALLER.get(str(self), {}))
        return self._replace(
            size=changes.pop("size", self.size), narrower=changes.pop("narrower", 1), params={**self.params, **changes}
        )

    def build(self, seed=0):
        """The model in float64, its parameters drawn at random: also class tokens that begin at zero, where a
        LayerNorm with eps 1e-12 has derivatives that no two ways of computing agree on."""
        torch.manual_seed(seed)
        model = narrowed(self._build(), self.narrower).double()
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        return model

    def _build(self):
        if self.library == "transformers":
            transformers = pytest.importorskip("transformers")
            config = getattr(transformers, f"{self.name}Config")(num_labels=5, **self.params)
            kind = "SequenceClassification" if self.is_text else "ImageClassification"
            return getattr(transformers, f"{self.name}For{kind}")(config)
        if "class" in self.params:
            pytest.importorskip(self.library)
            params = {k: pydoc.locate(v) if isinstance(v, str) else v for k, v in self.params.items()}
            return params.pop("class")(**params, num_classes=5)
        if "classifier" in self.params:  # of a few layers of thousands of features each
            with torch.device("meta"):
                model = torchvision.models.get_model(self.name, weights=None)
                model.classifier = torch.nn.Linear(self.params["classifier"], 5)
            model.to_empty(device="cpu")
            for module in model.modules():
                if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                    module.reset_parameters()
            return model
        if self.library == "timm":
            return pytest.importorskip("timm").create_model(self.name, num_classes=5, **self.params)
        if self.name == "vit":
            return torchvision.models.VisionTransformer(self.size, 8, 12, 2, 16, 32, num_classes=5)
        unset = {"weights_backbone": None} if "deeplab" in self.name else {}
        if self.name in ("googlenet", "inception_v3"):
            unset = {"aux_logits": False, "init_weights": False}
        return torchvision.models.get_model(self.name, weights=None, num_classes=5, **unset, **self.params)

    @property
    def is_text(self):
        return self.name in ("Bert", "DistilBert")

    def inputs(self, samples=2, seed=0):
        generator = torch.Generator().manual_seed(seed)
        if self.is_text:
            ids = torch.randint(0, 50, (samples, self.size), generator=generator)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        x = torch.randn(samples, 3, self.size, self.size, generator=generator, dtype=torch.float64)
        return {"pixel_values": x} if self.library == "transformers" else x

    @property
    def is_there(self):
        return importlib.util.find_spec(self.library) is not None

    def __str__(self):
        return f"{self.library}-{self.name}"


def _of(library, rows):
    return [
        Architecture(library, name, size, stages, more[0] if more else {})
        for name, size, stages, *more in rows
    ]  # fmt: skip


_BOTTLENECKS = maps(64, 256, 512, 1024)

TORCHVISION = _of("torchvision", [
    ("alexnet", 64, maps(64, 192, 256)),
    ("convnext_tiny", 32, maps(96, 192, 384)),
    ("deeplabv3_mobilenet_v3_large", 64, maps(16, 24, 40, 960)),
    ("densenet121", 32, _BOTTLENECKS),
    ("efficientnet_b0", 32, maps(16, 24, 40, 112)),
    ("googlenet", 64, maps(64, 192, 480, 832, 1024)),
    ("inception_v3", 96, maps(64, 192, 288, 768)),
    ("mnasnet0_5", 32, maps(8, 16, 24, 48)),
    ("mobilenet_v2", 32, maps(16, 24, 32, 96)),
    ("mobilenet_v3_small", 32, maps(16, 16, 24, 48)),
    ("regnet_x_400mf", 32, maps(32, 32, 64, 160)),
    ("resnet18", 32, maps(64, 64, 128, 256)),
    ("resnet50", 32, _BOTTLENECKS),
    ("resnext50_32x4d", 32, _BOTTLENECKS),
    ("shufflenet_v2_x0_5", 32, maps(24, 24, 48, 96)),
    ("squeezenet1_0", 64, maps(96, 256, 512, 512)),
    ("swin_t", 64, last(96, 192, 384, 768)),
    ("swin_v2_t", 64, last(96, 192, 384, 768)),
    ("vgg11", 64, maps(128, 256, 512, 512, 512)),
    ("vit", 32, tokens([16] * 4, (4,), 1)),
])  # fmt: skip

_AT_64 = {"img_size": 64}

TIMM = _of("timm", [
    ("cait_xxs24_224", 64, tokens([192] * 4, (4,)), _AT_64),
    ("coat_tiny", 64, None, _AT_64),
    ("convmixer_768_32", 64, maps(768, 768, 768, 768)),
    ("convnext_atto", 32, maps(40, 80, 160)),
    ("convnextv2_atto", 32, maps(40, 80, 160), {"conv_mlp": False}),
    ("crossvit_tiny_240", 240, None),
    ("davit_tiny", 64, maps(96, 192, 384, 768)),
    ("deit_tiny_distilled_patch16_224", 64, tokens([192] * 4, (4,), 2), _AT_64),
    ("densenet121", 32, _BOTTLENECKS),
    ("dla34", 32, maps(32, 64, 128, 256)),
    ("edgenext_xx_small", 64, maps(24, 48, 88, 168)),
    ("efficientnet_b0", 32, maps(16, 24, 40, 112)),
    ("efficientvit_b0", 64, maps(8, 16, 32, 64, 1024)),
    ("eva02_tiny_patch14_224", 56, tokens([192] * 4, (4,), 1), {"img_size": 56}),
    ("focalnet_tiny_srf", 64, maps(96, 192, 384, 768)),
    ("ghostnet_050", 32, maps(8, 12, 20, 56)),
    ("hrnet_w18_small", 64, None),
    ("mambaout_femto", 64, Stages("maps, last", [24, 48, 96, 192, 288])),
    ("mixer_s32_224", 64, tokens([512] * 4, (2,)), _AT_64),
    ("mobilenetv3_small_050", 32, maps(16, 8, 16, 24)),
    ("mobilevit_xxs", 64, maps(16, 24, 48, 64, 320)),
    ("pit_ti_224", 64, tokens([64, 128, 256], (7, 4, 2), 1), _AT_64),
    ("poolformer_s12", 64, maps(64, 128, 320, 512)),
    ("pvt_v2_b0", 64, maps(32, 64, 160, 256)),
    ("regnety_002", 32, maps(32, 24, 56, 152)),
    ("repvgg_a0", 32, maps(48, 48, 96, 192)),
    ("repvit_m0_9", 64, maps(24, 48, 96, 192, 384)),
    ("res2net50_14w_8s", 32, _BOTTLENECKS),
    ("resmlp_12_224", 64, tokens([384] * 4, (4,)), _AT_64),
    ("resnet18", 32, maps(64, 64, 128, 256)),
    ("resnetv2_50", 64, maps(64, 256, 512, 1024, 2048)),
    ("sequencer2d_s", 64, last(192, 384), _AT_64),
    ("starnet_s1", 32, maps(32, 24, 48, 96)),
    ("swin_tiny_patch4_window7_224", 64, last(96, 192, 384, 768), {"img_size": 64, "window_size": 4}),
    ("swinv2_cr_tiny_224", 64, maps(96, 192, 384, 768), _AT_64),
    ("tnt_s_patch16_224", 64, None, _AT_64),
    ("twins_svt_small", 64, tokens([64, 128, 256, 512], (16, 8, 4, 2))),
    ("vit_small_patch16_dinov3", 64, tokens([384] * 4, (4,), 5), _AT_64),
    ("vit_tiny_patch16_224", 64, tokens([192] * 4, (4,), 1), _AT_64),
    ("xcit_nano_12_p16_224", 64, tokens([128] * 4, (4,))),
])  # fmt: skip

_TINY = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
_PATCHES = {"image_size": 32, "patch_size": 8, **_TINY}

TRANSFORMERS = _of("transformers", [
    ("Bert", 9, tokens([16] * 4), {"vocab_size": 50, **_TINY}),
    ("DistilBert", 9, tokens([16] * 4), {"vocab_size": 50, "dim": 16, "n_layers": 4, "n_heads": 2, "hidden_dim": 32}),
    ("ViT", 32, tokens([16] * 4, (4,), 1), _PATCHES),
    ("DeiT", 32, tokens([16] * 4, (4,), 2), _PATCHES),
    ("Swin", 32, tokens([8, 16, 32], (16, 0, 0)), {
        "image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2, 2], "num_heads": [1, 2, 4], "window_size": 4,
    }),
    ("ConvNext", 32, maps(8, 16, 24, 32), {
        "image_size": 32, "patch_size": 2, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1],
    }),
])  # fmt: skip

ALL = [*TORCHVISION, *TIMM, *TRANSFORMERS]

_FOUR = {"depth": 4, "embed_dim": 48, "num_heads": 3}
_LEVELS = {"depths": (1, 1, 2, 1)}
_CN_BLOCKS = [CNBlockConfig(*widths) for widths in ((24, 48, 1), (48, 96, 1), (96, 192, 2), (192, None, 1))]
_BOTTLENECK = "torchvision.models.resnet.Bottleneck"
SMALLER = {
    "torchvision-alexnet": {"classifier": 256 * 6 * 6, "narrower": 4},
    "torchvision-convnext_tiny": {"class": "torchvision.models.ConvNeXt", "block_setting": _CN_BLOCKS},
    "torchvision-densenet121": {
        "class": "torchvision.models.DenseNet", "growth_rate": 8, "block_config": (2, 2, 2, 2), "num_init_features": 16,
    },
    "torchvision-deeplabv3_mobilenet_v3_large": {"size": 32, "narrower": 4},
    "torchvision-efficientnet_b0": {
        "class": "torchvision.models.EfficientNet", "dropout": 0.2,
        "inverted_residual_setting": _efficientnet_conf("efficientnet_b0", width_mult=0.25, depth_mult=0.3)[0],
    },
    "torchvision-inception_v3": {"size": 75, "narrower": 8},
    "torchvision-googlenet": {"narrower": 4},
    "torchvision-mnasnet0_5": {"narrower": 2},
    "torchvision-mobilenet_v2": {"narrower": 4},
    "torchvision-resnet18": {"narrower": 4},
    "torchvision-resnet50": {"class": "torchvision.models.ResNet", "block": _BOTTLENECK, "layers": [1, 1, 1, 1]},
    "torchvision-resnext50_32x4d": {
        "class": "torchvision.models.ResNet", "block": _BOTTLENECK, "layers": [1, 1, 1, 1], "groups": 32, "width_per_group": 4,
    },
    "torchvision-swin_t": {
        "class": "torchvision.models.SwinTransformer", "patch_size": [4, 4], "embed_dim": 24, "depths": [1, 1, 2, 1],
        "num_heads": [1, 2, 4, 8], "window_size": [7, 7],
    },
    "torchvision-swin_v2_t": {
        "class": "torchvision.models.SwinTransformer", "patch_size": [4, 4], "embed_dim": 24, "depths": [1, 1, 2, 1],
        "num_heads": [1, 2, 4, 8], "window_size": [8, 8], "block": "torchvision.models.swin_transformer.SwinTransformerBlockV2",
        "downsample_layer": "torchvision.models.swin_transformer.PatchMergingV2",
    },
    "torchvision-vgg11": {"classifier": 512 * 7 * 7, "size": 32, "narrower": 8},
    "timm-cait_xxs24_224": {"depth": 4, "embed_dim": 48, "num_heads": 4},
    "timm-coat_tiny": {"size": 32, "img_size": 32, "embed_dims": [48, 48, 48, 48], "serial_depths": [2, 1, 1, 1], "parallel_depth": 1},
    "timm-convmixer_768_32": {
        "class": "timm.models.convmixer.ConvMixer", "dim": 64, "depth": 4, "kernel_size": 7, "patch_size": 7,
    },
    "timm-convnext_atto": {**_LEVELS, "dims": (16, 32, 48, 64)},
    "timm-convnextv2_atto": {**_LEVELS, "dims": (16, 32, 48, 64)},
    "timm-crossvit_tiny_240": {
        "class": "timm.models.crossvit.CrossVit", "img_size": 48, "size": 48, "patch_size": (12, 16), "depth": ((1, 3, 0),),
        "embed_dim": (24, 48), "num_heads": (3, 3), "mlp_ratio": (4.0, 4.0, 1.0),
    },
    "timm-davit_tiny": {
        **_LEVELS, "embed_dims": (24, 48, 96, 192), "num_heads": (1, 2, 4, 8),
    },
    "timm-deit_tiny_distilled_patch16_224": _FOUR,
    "timm-densenet121": {"growth_rate": 8, "block_config": (2, 2, 2, 2)},
    "timm-dla34": {"channels": [8, 16, 16, 32, 64, 128]},
    "timm-edgenext_xx_small": {"depths": (1, 2, 2, 2)},
    "timm-efficientnet_b0": {"narrower": 4},
    "timm-efficientvit_b0": {"depths": (1, 1, 1, 1), "head_widths": (64, 64)},
    "timm-eva02_tiny_patch14_224": _FOUR,
    "timm-focalnet_tiny_srf": {"class": "timm.models.focalnet.FocalNet", **_LEVELS, "embed_dim": 24},
    "timm-hrnet_w18_small": {"size": 32, "narrower": 2},
    "timm-mambaout_femto": {**_LEVELS, "dims": (16, 32, 64, 96)},
    "timm-mixer_s32_224": {
        "class": "timm.models.mlp_mixer.MlpMixer", "patch_size": 32, "num_blocks": 4, "embed_dim": 64,
    },
    "timm-pit_ti_224": {"base_dims": [16, 16, 16], "heads": [2, 4, 8], "depth": [1, 2, 1]},
    "timm-poolformer_s12": {"size": 32},
    "timm-pvt_v2_b0": {"depths": (1, 1, 2, 1), "embed_dims": (16, 32, 80, 128)},
    "timm-repvgg_a0": {"narrower": 2},
    "timm-repvit_m0_9": {"depth": (1, 1, 2, 1), "embed_dim": (16, 32, 64, 128)},
    "timm-res2net50_14w_8s": {"layers": [1, 1, 1, 1]},
    "timm-resmlp_12_224": {
        "class": "timm.models.mlp_mixer.MlpMixer", "num_blocks": 4, "embed_dim": 64,
        "mlp_ratio": 4, "block_layer": "timm.models.mlp_mixer.ResBlock", "norm_layer": "timm.models.mlp_mixer.Affine",
    },
    "timm-resnet18": {"channels": (16, 32, 64, 128), "layers": [1, 1, 1, 1]},
    "timm-resnetv2_50": {"layers": (1, 1, 1, 1), "channels": (32, 64, 128, 256), "stem_chs": 16},
    "timm-sequencer2d_s": {"layers": (1, 1, 2, 1), "embed_dims": (48, 96, 96, 96), "hidden_sizes": (12, 24, 24, 24)},
    "timm-starnet_s1": {"base_dim": 8, "depths": [1, 1, 2, 1]},
    "timm-swin_tiny_patch4_window7_224": {**_LEVELS, "embed_dim": 24, "num_heads": (1, 2, 4, 8)},
    "timm-swinv2_cr_tiny_224": {**_LEVELS, "embed_dim": 24, "num_heads": (1, 2, 4, 8)},
    "timm-tnt_s_patch16_224": {"depth": 4, "embed_dim": 48, "num_heads_outer": 3},
    "timm-twins_svt_small": {"depths": (1, 1, 2, 1), "embed_dims": (16, 32, 64, 128), "num_heads": (1, 2, 4, 8)},
    "timm-vit_small_patch16_dinov3": _FOUR,
    "timm-vit_tiny_patch16_224": _FOUR,
    "timm-xcit_nano_12_p16_224": {"depth": 4, "embed_dim": 48, "num_heads": 4},
}  # fmt: skip
"""The same architectures with fewer and narrower layers: what the derivatives of a layer are does not depend on its width."""
NAMED = {  # taps of those without stages
    "timm-coat_tiny": ["serial_blocks1.0", "serial_blocks1.1"],
    "timm-crossvit_tiny_240": ["norm.0", "norm.1"],
    "timm-hrnet_w18_small": ["act1", "act2", "incre_modules.0"],
    "timm-tnt_s_patch16_224": ["blocks.1.norm2_proj", "blocks.3.norm2_proj"],
}
