"""A detector of torchvision's as a program of one image, in formats that other programs read."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

OUTPUTS = ("boxes", "scores", "labels")


class OneImage(nn.Module):
    """image (3, H, W), normalised as the data are → boxes (n, 4), corners in its pixels, scores (n,) and labels (n,) of what was
    found."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self.model([image])[0]
        return found["boxes"], found["scores"], found["labels"]


def onnx_of(model: nn.Module, image: Tensor, facts: str) -> bytes:
    """An ONNX file for an image of any size, with ``facts`` as metadata ``distpro``. By PyTorch's tracing exporter, for which
    torchvision's detectors are written; its newer one cannot follow a number of boxes that depends on the image. Raises
    ImportError without the package onnx."""
    import onnx

    buffer, found = io.BytesIO(), dict.fromkeys(OUTPUTS, {0: "detections"})
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of tracing: what is constant here is so by torchvision's intent
        torch.onnx.export(
            OneImage(model).eval(),
            (image,),
            buffer,  # type: ignore[arg-type]  # it takes one
            dynamo=False,
            input_names=["image"],
            output_names=list(OUTPUTS),
            dynamic_axes={"image": {1: "height", 2: "width"}, **found},
        )
    made = onnx.load_from_string(buffer.getvalue())
    made.metadata_props.add(key="distpro", value=facts)
    return bytes(made.SerializeToString())


def program_of(model: nn.Module, image: Tensor) -> torch.export.ExportedProgram:
    """A program for images of the size of this one: torchvision scales an image by numbers that it computes from its size."""
    with _nms_without_branches(model, image):
        return torch.export.export(OneImage(model).eval(), (image,), strict=False)


@contextmanager
def _nms_without_branches(model: nn.Module, image: Tensor) -> Iterator[None]:
    """Let torchvision's `batched_nms`, which asks how many boxes there are, do the same without asking: boxes of different classes
    are moved so far apart that none overlap."""
    from torchvision.ops import boxes as ops

    transform: Any = getattr(model, "transform", None)
    sides = (*image.shape[1:], getattr(transform, "max_size", 0), *(getattr(transform, "fixed_size", None) or ()))
    apart = float(max(sides) + 1)
    original = ops.batched_nms

    def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
        return ops.nms(boxes + apart * idxs.to(boxes)[:, None], scores, iou_threshold)

    ops.batched_nms = batched_nms
    try:
        yield
    finally:
        ops.batched_nms = original
