"""Sets of labelled images, and seeded stratified choices from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distpro.data.counter import make_generator
from distpro.data.files import ImageFiles
from pathways.registry import UserError, nearest


@dataclass(frozen=True, eq=False)
class Split:
    """Samples: ``images`` uint8 (N, C, H, W) contiguous, or files that are decoded batch by batch; ``labels`` (N,)
    int64, or label maps (N, H, W) uint8 in which 255 is void, or depth maps (N, H, W) uint16 in which 0 is no
    measurement and ``metres`` is what one unit stands for (None of labels); ``index`` (N,) int64, the samples' numbers in
    the set as stored, which a choice of samples keeps."""

    images: Tensor | ImageFiles
    labels: Tensor
    index: Tensor
    metres: float | None = None

    @classmethod
    def of(cls, images: Tensor | ImageFiles, labels: Tensor, metres: float | None = None) -> Split:
        """The whole set as stored."""
        return cls(images, labels, torch.arange(len(labels)), metres)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def streamed(self) -> bool:
        return isinstance(self.images, ImageFiles)

    @property
    def dense(self) -> bool:
        """Whether the labels are maps, one label or depth per pixel."""
        return self.labels.ndim > 1

    @property
    def image_shape(self) -> tuple[int, int, int]:
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def select(self, rows: Tensor) -> Split:
        """The samples at positions ``rows`` (K,) int64."""
        images = self.images.select(rows.tolist()) if isinstance(self.images, ImageFiles) else self.images[rows]
        return replace(self, images=images, labels=rows_of(self.labels, rows), index=self.index[rows])

    def decoded(self) -> Split:
        """The same samples with their images in memory."""
        return replace(self, images=self.peek(len(self))) if self.streamed else self

    def spaced(self, count: int) -> Tensor:
        """At most ``count`` positions, evenly spaced over the split, (K,) int64."""
        count = min(count, len(self))
        return torch.arange(count) * len(self) // count if count else torch.arange(0)

    def peek(self, count: int) -> Tensor:
        """At most ``count`` images, evenly spaced over the split, uint8 (K, C, H, W)."""
        rows = self.spaced(count)
        return self.images.decode(rows.tolist()) if isinstance(self.images, ImageFiles) else self.images[rows]


def rows_of(labels: Tensor, rows: Tensor) -> Tensor:
    """``labels[rows]``, which PyTorch 2.8 has not learned for depth maps' uint16 yet."""
    return labels.view(torch.int16)[rows].view(torch.uint16) if labels.dtype is torch.uint16 else labels[rows]


def split(whole: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Two parts, ``fraction`` and the rest, stratified and seeded; the order of the samples is kept.

    Each class is cut in the same proportion, up to the rounding of one sample; label maps are cut at random. Raises
    UserError if ``fraction`` is not between 0 and 1 or leaves a part empty.
    """
    first, rest = parted(whole.labels, fraction, seed)
    return whole.select(first), whole.select(rest)


def parted(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """The positions of the two parts of `split`, each ascending."""
    if not 0 < fraction < 1:
        raise UserError(f"the fraction of a split must be between 0 and 1, got {fraction}")
    count = round(fraction * len(labels))
    if count in (0, len(labels)):
        raise UserError(f"a fraction of {fraction} of {len(labels)} samples leaves one part of the split empty")
    first = stratified(labels, count, seed)
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[first] = False
    return first, rest.nonzero().flatten()


def stratified(labels: Tensor, count: int, seed: int) -> Tensor:
    """``count`` positions in ``labels``, ascending, drawn at random: of (N,) with each class in its proportion, of
    label maps (N, H, W) each sample as likely."""
    if labels.ndim > 1:
        return torch.randperm(len(labels), generator=make_generator(seed, "stratified"))[:count].sort().values
    sizes = torch.bincount(labels)
    quota = _apportion(sizes, count)
    shuffled = torch.randperm(len(labels), generator=make_generator(seed, "stratified"))
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    first_of_class = torch.cumsum(sizes, 0) - sizes
    place_in_class = torch.arange(len(labels)) - first_of_class[labels[by_class]]
    return by_class[place_in_class < quota[labels[by_class]]].sort().values


def _apportion(sizes: Tensor, count: int) -> Tensor:
    """Whole numbers that sum to ``count`` in proportion to ``sizes``: largest remainders, lower classes first."""
    exact, total = sizes * count, int(sizes.sum())
    quota = exact // total
    missing = count - int(quota.sum())
    quota[torch.argsort(exact % total, descending=True, stable=True)[:missing]] += 1
    return quota


def sample(whole: Split, count: int, seed: int) -> Split:
    """``count`` samples, stratified and seeded. Raises UserError if there are fewer."""
    check_count(count, len(whole))
    return whole.select(stratified(whole.labels, count, seed))


def check_count(count: int, most: int) -> None:
    """Raise UserError unless so many samples can be taken from ``most``."""
    if not 1 <= count <= most:
        raise UserError(f"samples must be between 1 and the {most} training images, got {count}")


def class_numbers(classes: int | Sequence[int | str], names: Sequence[str]) -> list[int]:
    """The labels meant by a number of classes (the first ones) or a list of labels or names. Raises UserError for an
    unknown or repeated class, or for more classes than there are."""
    if isinstance(classes, int):
        if not 1 <= classes <= len(names):
            raise UserError(f"classes must be between 1 and {len(names)}, got {classes}")
        return list(range(classes))
    chosen = [_class_number(c, names) for c in classes]
    if not chosen or len(set(chosen)) < len(chosen):
        raise UserError(f"classes must be a list of different classes, got {list(classes)}")
    return chosen


def _class_number(wanted: int | str, names: Sequence[str]) -> int:
    if isinstance(wanted, int) and 0 <= wanted < len(names):
        return wanted
    if wanted in names:
        return list(names).index(str(wanted))
    raise UserError(f"unknown class {wanted!r}{nearest(str(wanted), names)} (there are {len(names)})")


def keep_classes(whole: Split, chosen: Sequence[int]) -> Split:
    """The samples of the labels ``chosen``, whose labels become their places in that list. Raises UserError for label
    maps, of which every sample may hold every class."""
    if whole.dense:
        raise UserError("classes: a data set of label maps cannot be cut down to some of its classes")
    kept = whole.select(torch.isin(whole.labels, torch.tensor(chosen)).nonzero().flatten())
    new_label = torch.zeros(int(whole.labels.max()) + max(chosen) + 1, dtype=torch.int64)
    new_label[torch.tensor(chosen)] = torch.arange(len(chosen))
    return replace(kept, labels=new_label[kept.labels])
