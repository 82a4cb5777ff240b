"""What should be heard of the parts of the data: samples that are in two of them, classes without a sample, a strange scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distpro.data import Loader, Split
from distpro.data.counter import make_generator

SHARED = 0.01
"""Of the test samples; below that, two alike may be chance: CIFAR has a few."""

SHOWN = 5


def said_of_parts(train_loader: object, test_loader: object, classes: int = 0) -> list[str]:
    """A line for each doubt. Of images in memory with one label each; nothing is said of others. ``classes``: how many the data say
    they have; 0 where that is not known."""
    if not isinstance(train_loader, Loader) or not isinstance(test_loader, Loader):
        return []
    train, test = train_loader.split, test_loader.split
    if train.dense or test.dense:
        return []
    notes = []
    ours, theirs = set(train.labels.unique().tolist()), set(test.labels.unique().tolist())
    for what, missing in (("test", sorted(ours - theirs)), ("training", sorted(theirs - ours))):
        if missing:
            notes.append(f"no {what} sample of class {_some(missing)}")
    empty = sorted(set(range(classes)) - ours - theirs)
    if empty:
        if empty == [0]:
            doubt = "do the labels begin at 1?"
        elif empty[0] > max(ours | theirs):
            doubt = f"{classes} names, and labels up to {max(ours | theirs)}?"
        else:
            doubt = "do the labels leave numbers out?"
        notes.append(f"no sample at all of class {_some(empty)}: {doubt}")
    shared = _shared(train, test)
    if shared > SHARED * len(test):
        notes.append(
            f"{shared} of {len(test)} test samples are in the training part too: its metrics say nothing of new ones"
        )
    return notes


def said_of_scale(mean: Sequence[float], std: Sequence[float]) -> list[str]:
    """Of a mean and std that images in 0-1 hardly have. Those above 1 are refused, see `distpro.data.statistics`."""
    got = f"mean {[round(x, 5) for x in mean]} and std {[round(x, 5) for x in std]}"
    if min(std, default=1.0) < 1 / 255:
        return [f"{got}: a std below 1/255, one grey level; are they divided by 255 twice?"]
    if min(mean, default=0.0) < 0:
        return [f"{got}: images in 0-1 have no mean below 0"]
    return []


def _some(classes: Sequence[int]) -> str:
    more = f" and {len(classes) - SHOWN} more" if len(classes) > SHOWN else ""
    return ", ".join(map(str, classes[:SHOWN])) + more


def _shared(train: Split, test: Split) -> int:
    """How many of the test images are training images too, byte by byte (but for a chance of 2**-64 each)."""
    if train.streamed or test.streamed or train.image_shape != test.image_shape:
        return 0
    return int(torch.isin(_digests(test), _digests(train)).sum())


def _digests(part: Split) -> Tensor:
    """(N,) int64: the bytes of each image times random numbers, modulo 2**64."""
    assert isinstance(part.images, Tensor)
    flat = part.images.reshape(len(part), -1)
    limits = torch.iinfo(torch.int64)
    factors = torch.randint(limits.min, limits.max, flat.shape[1:], generator=make_generator("digests"))
    return torch.cat([(rows.long() * factors).sum(1) for rows in flat.split(1024)])
