"""Where a run computes, and in which precision."""

from __future__ import annotations

from functools import cache

import torch

from distpro.config.schema import Config
from distpro.console import note
from distpro.train import distributed
from pathways.fusing import computes_in_bfloat16
from pathways.registry import UserError


def device_of(config: Config) -> torch.device:
    """The config's device; ``auto`` is CUDA if there is one. Raises UserError for one that is not there."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    name = f"cuda:{distributed.local_rank()}" if name == "cuda" and distributed.world_size() > 1 else name
    allowed = "(allowed: auto, cpu, cuda, cuda:N)"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device: '{name}' is not a device {allowed}") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device: '{name}' is a kind of device that runs are not made for {allowed}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device: '{name}' asked for, but CUDA is not available here")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise UserError(
            f"device: '{name}' asked for, but the machine has {count} of its kind, numbered from 0 {allowed}"
        )
    return device


def fastest_precision(device: torch.device, searching: bool = False) -> str:
    """bfloat16 where the device computes in it; else float16 on a GPU, but float32 for a search, which loss scaling would
    disturb; else float32."""
    if _computes_in("bfloat16", device):
        return "bfloat16"
    return "float16" if device.type == "cuda" and not searching else "float32"


def native_precisions(device: torch.device) -> list[str]:
    """Those that the device computes in itself."""
    return [name for name in ("float32", "bfloat16", "float16") if _computes_in(name, device)]


def settle_precision(config: Config, searching: bool = False) -> Config:
    """The config with ``precision: auto`` replaced by the fastest of its device."""
    if config.precision != "auto":
        return config
    return config.model_copy(update={"precision": fastest_precision(device_of(config), searching)})


def note_emulation(config: Config) -> None:
    """Say, once, if the device only emulates the config's precision."""
    device = device_of(config)
    if config.precision != "auto" and device.type in ("cpu", "cuda") and not _computes_in(config.precision, device):
        _say_emulated(config.precision, "CPU" if device.type == "cpu" else "GPU")


@cache
def _say_emulated(precision: str, device: str) -> None:
    note(
        f"precision: {precision} is emulated on this {device}, several times slower than float32; auto takes the fastest"
    )


def _computes_in(precision: str, device: torch.device) -> bool:
    """Whether the device has arithmetic for a precision. False for kinds of device that are not known."""
    if precision == "float32":
        return True
    if device.type == "cuda":
        return precision == "float16" or torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    return computes_in_bfloat16() if precision == "bfloat16" else getattr(torch.cpu, "_is_amx_fp16_supported", bool)()
