"""Several teachers as one, and a teacher that was trained on inputs of another normalisation or size.

Both are modules around modules: what is tapped in them is named by its path, ``resnet56.layer2`` or ``model.layer2``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from keyword import iskeyword
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from distpro.models.base import StageTaps, stage_taps
from pathways.registry import UserError, nearest
from pathways.taps import LOGITS

COMBINATIONS = ("logits", "probabilities", "log_probabilities")


def _taps_under(path: str, model: nn.Module) -> StageTaps | None:
    """The taps that ``model`` states, as names in a model that has it at ``path``."""
    taps = stage_taps(model)
    if taps is None:
        return None
    post, pre = (tuple(f"{path}.{name}" for name in names) for names in (taps.post, taps.pre))
    embedding = None if taps.embedding is None else f"{path}.{taps.embedding}"
    return StageTaps(post=post, pre=pre, stem=f"{path}.{taps.stem}", embedding=embedding)


class InputAdapter(nn.Module):
    """A model that takes inputs normalised for another one. (N, C, H, W) → what `model` gives.

    With images in 0-1, x = (image − student_mean) / student_std comes in and (image − mean) / std goes on to `model`:
    x · student_std / std + (student_mean − mean) / std, one multiplication and addition per channel.

    Args:
        model: becomes the child `model`.
        student_mean, student_std: per channel, what the inputs are normalised with.
        mean, std: per channel, what ``model`` was trained with.
        size: (H, W), or one number for both, to which inputs are resized for ``model`` (bilinear, with antialiasing);
            None leaves their size.

    Raises UserError for numbers that are not one per channel, standard deviations or sizes that are not positive.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        model: nn.Module,
        student_mean: Sequence[float],
        student_std: Sequence[float],
        mean: Sequence[float],
        std: Sequence[float],
        size: int | tuple[int, int] | None = None,
    ):
        super().__init__()
        given = {"student_mean": student_mean, "student_std": student_std, "mean": mean, "std": std}
        for name, values in given.items():
            if not len(values) == len(student_mean) > 0:
                raise UserError(f"InputAdapter: {name} has {len(values)} numbers, student_mean has {len(student_mean)}")
            if name.endswith("std") and min(values) <= 0:
                raise UserError(f"InputAdapter: {name} must be positive, got {list(values)}")
        if size is not None and min(size if isinstance(size, Sequence) else [size]) < 1:
            raise UserError(f"InputAdapter: size must be at least 1, got {size}")
        self.model = model
        self.size = size
        from_mean, from_std, to_mean, to_std = (
            torch.tensor(v, dtype=torch.float64).view(-1, 1, 1) for v in given.values()
        )
        dtype = torch.get_default_dtype()
        self.register_buffer("scale", (from_std / to_std).to(dtype), persistent=False)
        self.register_buffer("shift", ((from_mean - to_mean) / to_std).to(dtype), persistent=False)

    @property
    def stage_taps(self) -> StageTaps | None:
        """The taps that the wrapped model states, under ``model.``."""
        return _taps_under("model", self.model)

    def forward(self, x: Tensor) -> Any:
        x = torch.addcmul(self.shift, x, self.scale)
        if self.size is not None:
            x = F.interpolate(x, self.size, mode="bilinear", align_corners=False, antialias=True)
        return self.model(x)


@fx.wrap  # one node in a traced graph, where the tensors are real and can be compared
def _combined(logits: dict[str, Tensor], weights: dict[str, float], combine: str) -> Tensor:
    shapes = {name: tuple(z.shape) for name, z in logits.items()}
    if len(set(shapes.values())) > 1:
        shown = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise UserError(f"Ensemble: members must give logits of one shape, got {shown}")
    values = {name: z if combine == "logits" else F.log_softmax(z, 1) for name, z in logits.items() if weights[name]}
    if combine == "probabilities":
        return torch.stack([z + math.log(weights[name]) for name, z in values.items()]).logsumexp(0)
    return torch.stack([z * weights[name] for name, z in values.items()]).sum(0)


class Ensemble(nn.Module):
    """The weighted mean of several models' answers. (N, ...) → (N, K) or, per pixel, (N, K, ...) over K classes.

    A member's own logits are the tap with its name; its other taps are under that name (`member_taps`).

    Args:
        models: members by name; each becomes the child of that name.
        weights: member → weight, zero or more, divided by their sum; equal by default.
        combine: what is averaged. ``logits``: Σ w_i z_i. ``probabilities``: log Σ w_i softmax(z_i), so that the
            softmax of the ensemble's output is the mean of its members'. ``log_probabilities``: Σ w_i log softmax(z_i);
            it has the softmax of the mean logits, and a constant that one member adds to all its logits changes nothing.

    Raises UserError for a name that a module cannot have as a child, weights that do not fit the members or whose sum
    is not positive, and an unknown ``combine``; at the first pass, for members whose logits differ in shape.
    """

    def __init__(
        self, models: Mapping[str, nn.Module], weights: Mapping[str, float] | None = None, combine: str = "logits"
    ):
        super().__init__()
        if combine not in COMBINATIONS:
            raise UserError(
                f"Ensemble: unknown combine '{combine}'{nearest(combine, COMBINATIONS)} "
                f"(allowed: {', '.join(COMBINATIONS)})"
            )
        self.combine = combine
        self.weights = _normalised(list(models), {name: 1.0 for name in models} if weights is None else weights)
        for name, model in models.items():
            if not _may_name_a_member(name) or hasattr(self, name):
                raise UserError(f"Ensemble: '{name}' cannot be the name of a member; choose another")
            self.add_module(name, model)

    def member_taps(self, name: str) -> StageTaps | None:
        """The taps that a member states, under its name, or None. Raises UserError for an unknown member."""
        if name not in self.weights:
            raise UserError(
                f"Ensemble has no member '{name}'{nearest(name, self.weights)} (it has: {', '.join(self.weights)})"
            )
        return _taps_under(name, self.get_submodule(name))

    def forward(self, x: Tensor) -> Tensor:
        return _combined({name: getattr(self, name)(x) for name in self.weights}, self.weights, self.combine)


def _may_name_a_member(name: Any) -> bool:
    """Whether taps and traced code can have the name in them."""
    return isinstance(name, str) and name not in ("", LOGITS) and not iskeyword(name) and not set(".:[]") & set(name)


def _normalised(members: Sequence[str], weights: Mapping[str, float]) -> dict[str, float]:
    """Weights of sum 1, in the order of ``members``."""
    if not members:
        raise UserError("Ensemble: at least one member is needed")
    for name in weights:
        if name not in members:
            raise UserError(
                f"Ensemble: weight of an unknown member '{name}'{nearest(name, members)} "
                f"(members: {', '.join(members)})"
            )
    missing = [name for name in members if name not in weights]
    if missing:
        raise UserError(f"Ensemble: no weight for {', '.join(missing)}")
    total = math.fsum(weights.values())
    if not 0 < total < math.inf or min(weights.values()) < 0:
        raise UserError(f"Ensemble: weights must be zero or more, with a positive sum, got {dict(weights)}")
    return {name: weights[name] / total for name in members}
