"""What a person should know of a machine before a run, or say when they report a fault."""

from __future__ import annotations

import os
import platform
from importlib.util import find_spec
from pathlib import Path

import torch

from distpro.build.device import native_precisions
from distpro.console import pip_install
from distpro.runs.folder import environment

EXTRAS = {
    "demo": ("sklearn",),
    "export": ("safetensors", "onnx", "onnxscript"),
    "timm": ("timm",),
    "tune": ("optuna",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
    "text": ("transformers",),
    "detection": ("torchmetrics", "faster_coco_eval"),
    "segmentation": ("segmentation_models_pytorch",),
    "completion": ("argcomplete",),
}
"""The modules of each of the package's optional extras."""


def findings() -> list[tuple[str, str]]:
    """What there is, one line each: (what, found)."""
    here = environment()
    rows = [(name, str(found)) for name, found in here["packages"].items()]
    rows += [("python", f"{here['python']} on {platform.platform(terse=True)}"), ("revision", here["revision"])]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        rows.append(("device", f"{', '.join(names)} (CUDA {torch.version.cuda})"))
    else:
        rows.append(
            ("device", f"CPU ({platform.machine()}), {os.cpu_count()} cores, {here['threads']} threads; no CUDA")
        )
    rows.append(("precision", f"native: {', '.join(native_precisions(device))}"))
    rows.append(("data", _data_folder()))
    for extra, modules in EXTRAS.items():
        missing = [module for module in modules if find_spec(module) is None]
        rows.append((extra, f"no {', '.join(missing)}: {pip_install(extra)}" if missing else "yes"))
    return rows


def _data_folder() -> str:
    named = os.environ.get("DISTPRO_DATA")
    if not named:
        return "$DISTPRO_DATA is not set: relative paths are looked for where you are"
    return f"$DISTPRO_DATA = {named}" + ("" if Path(named).is_dir() else ": no such folder")
