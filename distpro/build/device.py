"""Where a run computes, and in which precision."""

from __future__ import annotations

import torch

from distpro.config.schema import Config
from distpro.train import distributed
from pathways.registry import UserError


def device_of(config: Config) -> torch.device:
    """The config's device; ``auto`` is CUDA if there is one. Raises UserError for one that is not there."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    name = f"cuda:{distributed.local_rank()}" if name == "cuda" and distributed.world_size() > 1 else name
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device: '{name}' is no device (allowed: auto, cpu, cuda, cuda:N)") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: '{name}' asked for, but CUDA is not available here")
    return device


def fastest_precision(device: torch.device, searching: bool = False) -> str:
    """bfloat16 where the device computes in it; else float16 on a GPU, but float32 for a search, which loss scaling would
    disturb; else float32."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16"
        return "float32" if searching else "float16"
    native = any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))
    return "bfloat16" if device.type == "cpu" and native else "float32"
