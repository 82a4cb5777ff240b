"""Detection of objects: the model's own losses, and mean average precision as COCO defines it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distpro.batch import Batch
from distpro.console import pip_install
from pathways.call import Call
from pathways.registry import UserError, nearest

_BY_BATCH = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)  # what training mode changes in a pass

NUMBERS = {"map": "map", "map50": "map_50", "map75": "map_75"}  # of torchmetrics'


class Found(NamedTuple):
    """What an evaluated detector says: per image its ``boxes``, ``labels`` and ``scores``, and the losses that it computes of
    the batch in training mode, None where they were not asked for."""

    objects: list[dict[str, Tensor]]
    losses: dict[str, Tensor] | None = None


class Detection:
    """Task of finding objects as torchvision's detectors do: a list of images in, and per image a mapping with ``boxes`` (n, 4)
    and ``labels`` (n,) int64 from 1 on as target; the model gives its losses by name in training, and objects in evaluation.

    There is no response that losses of logits could read: they are refused by name. The loss is the weighted sum of the
    model's own. A model gives them in training mode only, so a search's validation loss is computed there, as that of any
    other task, with the statistics of the batch and without a trace in the running ones. The evaluation's ``loss`` has its own
    pass in training mode, in which the layers that depend on the batch (BatchNorm, dropout) stay in evaluation mode, with one
    and the same draw of the anchors or regions that the loss takes a sample of.

    Args:
        weights: of the model's losses by name (``loss_classifier``, ``bbox_regression``, ...); 1 where nothing is said.
        with_loss: whether an evaluation computes the loss beside the metrics, which costs a second pass.
    """

    headline = "map"
    higher_is_better = True
    targets = "boxes"

    def __init__(self, weights: Mapping[str, float] | None = None, with_loss: bool = True):
        self.weights, self.with_loss = dict(weights or {}), with_loss
        self._classes: int | None = None
        for name, weight in self.weights.items():
            if not isinstance(weight, int | float) or isinstance(weight, bool) or not weight >= 0:
                raise UserError(f"detection: weights.{name} must be a number of at least 0, got {weight!r}")

    def model_arguments(self, data: Any) -> dict[str, Any]:
        """With the background, which torchvision's models count as class 0."""
        self._classes = data.num_classes
        return {} if data.num_classes is None else {"num_classes": data.num_classes + 1}

    def call(self, batch: Batch, training: bool) -> Call:
        if not isinstance(batch.inputs, list):
            raise UserError(f"detection needs a list of images, got {type(batch.inputs).__name__}")
        if not training:
            return Call((batch.inputs,))
        return Call((batch.inputs, [_without_crowds(target) for target in self.checked(batch)]))

    def checked(self, batch: Batch) -> list[Mapping[str, Tensor]]:
        """The targets. Raises UserError for boxes and labels that no detector can learn from. Values are looked at on the CPU only:
        elsewhere it would wait for the device."""
        targets = _targets(batch)
        if len(targets) != len(batch.inputs):
            raise UserError(f"detection: {len(batch.inputs)} images have {len(targets)} targets")
        for image, target in zip(batch.inputs, targets, strict=True):
            boxes, labels = target["boxes"], target["labels"]
            if labels.dtype != torch.int64:
                kind = str(labels.dtype).removeprefix("torch.")
                raise UserError(f"detection: labels are class numbers, int64, got {kind}")
            if boxes.shape != (len(labels), 4) or labels.dim() != 1:
                raise UserError(
                    "detection: an image has boxes (n, 4) and labels (n,), with no object (0, 4) and (0,), got "
                    f"{tuple(boxes.shape)} and {tuple(labels.shape)}"
                )
            if labels.device.type == "cpu" and len(labels):
                self._check_values(image, boxes.detach(), labels)
        return targets

    def _check_values(self, image: Tensor, boxes: Tensor, labels: Tensor) -> None:
        low, high = (int(x) for x in labels.aminmax())
        if low < 1 or (self._classes is not None and high > self._classes):
            most = "" if self._classes is None else f", 1 to {self._classes}"
            wrong = low if low < 1 else high
            raise UserError(f"detection: there is a label {wrong}, outside of the classes{most} (0 is the background)")
        sides = torch.tensor([image.shape[-1], image.shape[-2]], dtype=boxes.dtype)
        within = (boxes[:, 2:] > boxes[:, :2]) & (boxes[:, 2:] > 0) & (boxes[:, :2] < sides)  # False for nan, too
        if not bool(within.all()):
            box = [round(x, 2) for x in boxes[int((~within.all(1)).nonzero()[0])].tolist()]
            raise UserError(
                f"detection: the box {box} is empty or outside of its image of {int(sides[0])}x{int(sides[1])} "
                "(corners x1, y1, x2, y2 in pixels)"
            )

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """The weighted sum of the model's own losses."""
        losses = self.parts(output)
        if not losses:
            kind = type(output).__name__
            raise UserError(f"detection: the model gave no losses by name in training mode, but {kind}")
        for name in self.weights:
            if name not in losses:
                raise UserError(
                    f"detection: weights: the model has no loss '{name}'{nearest(name, losses)} (allowed: {', '.join(losses)})"
                )
        return torch.stack([value.reshape(()) * self.weights.get(name, 1.0) for name, value in losses.items()]).sum()

    def parts(self, output: Any) -> dict[str, Tensor]:
        """The model's own losses, before their weights; none in evaluation mode."""
        losses = output.losses if isinstance(output, Found) else output
        return dict(losses) if isinstance(losses, Mapping) else {}

    def response(self, output: Any) -> Tensor | None:
        return None

    def labels(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        return None, None

    def metrics(self) -> MeanAveragePrecision:
        return MeanAveragePrecision(self)

    def predict(self, model: nn.Module, batch: Batch) -> Found:
        """What a model in evaluation mode says of a batch, and with ``with_loss`` its losses."""
        objects = self.call(batch, False).run(model)
        if not self.with_loss:
            return Found(objects)
        with losses_of(model):
            return Found(objects, self.call(batch, True).run(model))


@contextmanager
def losses_of(model: nn.Module) -> Iterator[None]:
    """The model in training mode but for the layers that depend on the batch, with one and the same draw of random numbers;
    afterwards modes and random state are what they were."""
    modes = {module: module.training for module in model.modules()}
    devices = sorted({t.device.index for t in model.parameters() if t.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        try:
            for module in modes:
                module.training = not isinstance(module, _BY_BATCH)
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _targets(batch: Batch) -> list[Mapping[str, Tensor]]:
    target = batch.target
    if not isinstance(target, list) or not all(
        isinstance(t, Mapping) and {"boxes", "labels"} <= set(t) for t in target
    ):
        raise UserError("detection needs a mapping with boxes and labels per image as target")
    return target


def _without_crowds(target: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model learns from: a box around a crowd is no object. Boxes in the precision that torchvision's matchers take."""
    kept = target["iscrowd"] == 0 if "iscrowd" in target else slice(None)
    return {"boxes": target["boxes"][kept].float(), "labels": target["labels"][kept]}


class MeanAveragePrecision:
    """Mean average precision in percent over classes and IoU thresholds .50:.05:.95 (``map``), and at .50 and .75, at most 100
    objects an image, as COCO's evaluation computes it (by faster-coco-eval through torchmetrics); ``loss``, the mean over
    samples of the batches' losses, where the outputs hold them."""

    def __init__(self, task: Detection):
        self.task = task
        self._found: list[dict[str, Tensor]] = []
        self._truth: list[dict[str, Tensor]] = []
        self._loss, self._samples = 0.0, 0

    def update(self, output: Any, batch: Batch) -> None:
        objects = output.objects if isinstance(output, Found) else output
        if not isinstance(objects, list) or len(objects) != batch.samples:
            raise UserError(
                f"detection: the model must give a list with objects per image, got {type(objects).__name__}"
            )
        self._found += [_on_cpu(found, ("boxes", "scores", "labels")) for found in objects]
        self._truth += [_on_cpu(truth, ("boxes", "labels", "iscrowd")) for truth in self.task.checked(batch)]
        if self.task.parts(output):
            self._loss += self.task.loss(output, batch).item() * batch.samples
            self._samples += batch.samples

    def state(self) -> dict[str, Any]:
        return {"found": self._found, "truth": self._truth, "loss": self._loss, "samples": self._samples}

    def merge(self, states: Sequence[Any]) -> None:
        self._found = [found for state in states for found in state["found"]]
        self._truth = [truth for state in states for truth in state["truth"]]
        self._loss, self._samples = (sum(state[name] for state in states) for name in ("loss", "samples"))

    def compute(self) -> dict[str, float]:
        if not self._truth:
            return {}
        if not any(len(_without_crowds(truth)["boxes"]) for truth in self._truth):
            raise UserError(
                "detection: no image of the evaluation has a box of one object, there is nothing to measure"
            )
        metric = _coco_metric()
        metric.update(self._found, self._truth)
        computed = metric.compute()
        found = {name: 100 * computed[theirs].item() for name, theirs in NUMBERS.items()}
        return found | ({"loss": self._loss / self._samples} if self._samples else {})


def _coco_metric() -> Any:
    try:
        import faster_coco_eval  # noqa: F401  # torchmetrics says less of what is missing
        from torchmetrics.detection import MeanAveragePrecision as Metric
    except ImportError:
        raise UserError(
            f"detection: mean average precision needs torchmetrics and faster-coco-eval: {pip_install('detection')}"
        ) from None
    metric = Metric(
        iou_type="bbox",
        backend="faster_coco_eval",
        iou_thresholds=np.linspace(
            0.5, 0.95, 10
        ).tolist(),  # COCO's; torchmetrics rounds its own to float32, and a recall of
        rec_thresholds=np.linspace(0.0, 1.0, 101).tolist(),  # exactly 3/10 then falls short of its point
        sync_on_compute=False,  # merged over processes already
    )
    metric.warn_on_many_detections = False
    return metric


def _on_cpu(values: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    found = {name: values[name].detach().cpu() for name in names if name in values}
    return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}
