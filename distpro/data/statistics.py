"""Mean and standard deviation of a data set's images: where they come from, and where a run keeps those that it used."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distpro.data.splits import Split
from pathways.registry import UserError

DATA = "data.json"  # in a run's folder: what the data were


class Statistics(NamedTuple):
    """Per channel, for images in 0-1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def close_to(self, other: Statistics) -> bool:
        """Whether a model trained with one may be given images normalised with the other: no grey level moves by more
        than about one of 256."""
        pairs = zip((*self.mean, *self.std), (*other.mean, *other.std), strict=False)
        return len(self.mean) == len(other.mean) and all(abs(a - b) < 0.005 for a, b in pairs)


def statistics(train: Split) -> Statistics:
    """Over all pixels of a split; of one in files, over 1000 images evenly spaced, whether they will be streamed or kept
    in memory."""
    images = train.images if isinstance(train.images, Tensor) else train.peek(1000)
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    share, value = counts / counts.sum(1, keepdim=True), torch.arange(256).double() / 255
    mean = share @ value
    variance = (share * (value - mean[:, None]).square()).sum(1)
    return Statistics(tuple(mean.tolist()), tuple(variance.sqrt().tolist()))


def check_statistics(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise UserError for numbers that images in 0-1 cannot have, such as those of bytes."""
    got = f"got {list(mean)} and {list(std)}"
    if not all(math.isfinite(x) for x in (*mean, *std)):
        raise UserError(f"mean and std must be finite, {got}")
    if max((*mean, *std), default=0) > 1:
        raise UserError(f"mean and std are in 0-1 units, as of images whose white is 1, {got}: divide them by 255")


def stored_facts(folder: Path) -> dict[str, Any]:
    """What a run's folder says that its data were; {} where it says nothing. Raises UserError for a damaged file."""
    file = folder / DATA
    if not file.is_file():
        return {}
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not readable ({error})") from None
    return facts if isinstance(facts, dict) else {}


def stated_by(facts: Any) -> Statistics | None:
    """The mean and std among such facts; None where they have none, as of somebody else's normalised data."""
    if not isinstance(facts, dict) or not facts.get("mean") or not facts.get("std"):
        return None
    return Statistics(tuple(facts["mean"]), tuple(facts["std"]))
