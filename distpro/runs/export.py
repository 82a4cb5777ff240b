"""A run's student in formats that other programs read."""

from __future__ import annotations

from pathlib import Path

import torch

from distpro import build
from distpro.build.models import build_network
from distpro.config.reading import read_config
from distpro.config.stages import stages_of
from distpro.losses import LOSSES
from distpro.models import load_checkpoint
from pathways.registry import UserError


def export(folder: str | Path, format: str = "safetensors", out: str | Path | None = None) -> Path:
    """Write the trained student of a run.

    Args:
        folder: the run's folder.
        format: ``safetensors`` (weights), ``pt2`` (torch.export program) or ``onnx``; the latter two take batches of
            any size.
        out: file to write; by default ``student.<format>`` in the folder.

    Returns the file's path. Raises UserError if the run has no student, or a package is missing.
    """
    folder = Path(folder)
    path = Path(out) if out else folder / f"student.{format}"
    weights = folder / "student.pt"
    if not weights.is_file():
        raise UserError(f"{folder}: no student.pt; has the training ended?")
    config = stages_of(read_config(folder / "config.yaml"))[-1].config
    through = [term.loss for term in config.terms if hasattr(LOSSES[term.loss], "predict")]
    if through:
        raise UserError(f"{folder}: the student answers through its term '{through[0]}', which cannot be exported yet")
    data = build.build_data(config)
    model = build_network(config.student, data.num_classes, load=False).eval()
    load_checkpoint(model, weights)
    x = torch.zeros(2, *data.image_shape)
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    try:
        if format == "safetensors":
            from safetensors.torch import save_file

            save_file({name: t.contiguous() for name, t in model.state_dict().items()}, path)
        elif format == "pt2":
            torch.export.save(torch.export.export(model, (x,), dynamic_shapes=dynamic), path)
        else:
            torch.onnx.export(model, (x,), str(path), dynamo=True, dynamic_shapes=dynamic, verbose=False)
    except ImportError as error:
        raise UserError(f"export to {format} needs a package more: pip install 'distpro[export]' ({error})") from None
    return path
