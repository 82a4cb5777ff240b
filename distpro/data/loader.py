"""Batches of a split: shuffled, augmented and normalised, and each a pure function of (seed, epoch, step)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from distpro.batch import Batch
from distpro.data.augment import Augmentation, AugmentSpec, ResizedCrop, apply, build_augment, draw_for, output_size
from distpro.data.counter import make_generator
from distpro.data.files import Box, ImageFiles
from distpro.data.mixing import Mixing
from distpro.data.order import BatchLoader, Plan, occurrences
from distpro.data.recolour import PerImage
from distpro.data.splits import Split, rows_of
from pathways.registry import UserError

COPY = 40  # bits of a sample's number, above which the number of its copy stands in what its draws count by
EXPANSIONS = {"": 1, "rotations": 4}  # rows per sample


class Loader(BatchLoader):
    """Batches of ``batch_size`` samples of ``split``.

    There is no state: the order of epoch e depends on (seed, e), the augmentation of sample n on (seed, e, n), and
    PyTorch's global random numbers are neither read nor changed. So a run that continues at (epoch, step) sees what
    it would have seen, and a sample looks the same whatever the batch size, the rank or the device.

    The target is int64: labels (N,), or label maps (N, H, W) that move with their images, 255 where they show nothing.
    Depth maps (N, H, W) move likewise; they are float32, in metres, 0 where nothing is measured or shown.

    mean, std: per channel, for images in 0-1.
    augment: names, or {name: parameters}, in the order of application (``distpro.data.AUGMENTATIONS``).
    rank, world_size: whose part of each step's batch this is, see `Plan`.
    expand: ``"rotations"`` follows every image by itself turned by 90, 180 and 270 degrees: 4 rows per sample.
    augment_epochs: draw the augmentations of epoch e as those of epoch e modulo this number; None: each epoch its own.
    repeats: how many times a sample comes one after the other, each augmented in its own way (Hoffer et al., "Augment Your
        Batch", CVPR 2020), in an epoch of the same length, which sees fewer samples then.
    sampler: draws the samples of an epoch with replacement: ``"balanced"``, each class as often, or a weight per class.
    num_classes: K, for augmentations that mix samples: the target is then (N, K) float32 probabilities.
    workers: processes that decode the files of a streamed split; without use for images in memory.

    Raises UserError for an augmentation that does not exist or does not fit, and for a split without a full batch.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augment: AugmentSpec = (),
        shuffle: bool,
        seed: int = 0,
        drop_last: bool,
        device: str | torch.device = "cpu",
        channels_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        expand: str = "",
        augment_epochs: int | None = None,
        num_classes: int | None = None,
        repeats: int = 1,
        sampler: str | Sequence[float] | None = None,
    ):
        self.device = torch.device(device)
        self.seed, self.augment_epochs, self.workers = seed, augment_epochs, workers
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        weights = None if sampler is None else sample_weights(split.labels, sampler)
        self._plan = Plan(len(split), batch_size, shuffle, seed, drop_last, rank, world_size, repeats, weights)
        self._scale, self._shift = _affine(mean, std, split.image_shape[0], self.device)
        augmentations = build_augment(augment)
        self._crop = _decoding_crop(augmentations, split)
        self._mixing = {name: a for name, a in augmentations.items() if isinstance(a, Mixing)}
        self._augmentations = {
            name: a for name, a in augmentations.items() if a is not self._crop and name not in self._mixing
        }
        self._ahead = split.streamed and any(isinstance(a, PerImage) for a in self._augmentations.values())
        self._num_classes, self.expand = num_classes, expand
        self._check(split)
        self.split, self._stored_index = split, split.index
        self._images = split.images if isinstance(split.images, ImageFiles) else split.images.to(self.device)
        stored = split.labels if split.metres is None else split.labels.view(torch.int16)  # all devices can index it
        self._metres, self._labels, self._index = split.metres, stored.to(self.device), split.index.to(self.device)

    def _check(self, split: Split) -> None:
        if self.expand not in EXPANSIONS:
            raise UserError(f"expand must be '' or 'rotations', got {self.expand!r}")
        height, width = output_size(list(self._augmentations.values()), *split.image_shape[1:])
        if self.expand and height != width:
            raise UserError(f"rotations need square images, got {(split.image_shape[0], height, width)}")
        mixing = next(iter(self._mixing), None)
        for name, augmentation in self._augmentations.items():
            if isinstance(augmentation, PerImage) and split.image_shape[0] not in (1, 3):
                raise UserError(f"augmentation '{name}' is for images of 1 or 3 channels, got {split.image_shape[0]}")
            if isinstance(augmentation, PerImage) and augmentation.moves and split.dense:
                raise UserError(
                    f"augmentation '{name}' moves pixels, and label maps would not follow (colour_jitter moves none)"
                )
        if split.dense:
            if split.streamed:
                raise UserError("label maps need their images in memory: a streamed set has one label per image")
            if tuple(split.labels.shape[1:]) != split.image_shape[1:]:
                raise UserError(f"label maps {tuple(split.labels.shape)} do not fit images of {split.image_shape}")
            if mixing or self.expand:
                what = f"augmentation '{mixing}'" if mixing else "a loss that reads rotations"
                raise UserError(f"{what} needs one label per image, but the data set has label maps")
        if mixing and (self._num_classes is None or self.expand):
            why = "does not go with losses that read rotations" if self.expand else "needs the number of classes"
            raise UserError(f"augmentation '{mixing}' {why}")

    @property
    def streamed(self) -> bool:
        """Whether images are decoded as they are asked for."""
        return isinstance(self._images, ImageFiles)

    def __len__(self) -> int:
        """Batches per epoch, the same on each rank."""
        return len(self._plan)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step ``start`` on."""
        order = self._plan.order(epoch)
        rows = order.to(self.device)
        index = self._index[rows]
        drawing = epoch % self.augment_epochs if self.augment_epochs else epoch
        counter = self._stored_index[order]
        if (
            self._plan.repeats > 1 or self._plan.weights is not None
        ):  # each copy of a sample is augmented in its own way
            counter = counter + (occurrences(order) << COPY)
        counted = counter.to(self.device)
        in_worker = self._augmentations if self._ahead else {}
        drawn, mixing = (
            [draw_for(name, a, counted, self.seed, drawing) for name, a in kind.items()]
            for kind in ({} if in_worker else self._augmentations, self._mixing)
        )
        parts = [self._plan.part(step) for step in range(start, len(self))]
        if isinstance(self._images, ImageFiles):
            asked = [(order[part].tolist(), counter[part]) for part in parts]
            read = self._stream(_Decoder(self._images, self._crop, in_worker, self.seed, drawing), asked)
        else:
            read = ((self._images.index_select(0, rows[part]), None) for part in parts)
        for part, (images, kept) in zip(parts, read, strict=True):
            x, y = self._finish(images, kept, rows_of(self._labels, rows[part]), [numbers[part] for numbers in drawn])
            if self._mixing:
                y = F.one_hot(y, self._num_classes or -1).float()
            for augmentation, numbers in zip(self._mixing.values(), mixing, strict=True):
                x, y = augmentation.mix(x, y, numbers[part])  # type: ignore[attr-defined]
            x = x.contiguous(memory_format=self.memory_format)
            yield Batch(x, y, len(y), index[part], EXPANSIONS[self.expand])

    def _stream(self, decoder: _Decoder, batches: list[Any]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The images of each batch, uint8 (B, 3, H, W), and which of their pixels are kept."""
        ahead = DataLoader(
            decoder,
            batch_size=None,
            sampler=batches,  # type: ignore[arg-type]  # a sampler of whole batches
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=make_generator(self.seed, decoder.epoch, "workers"),  # else it would draw from the global one
        )
        for read in ahead:
            if isinstance(read, UserError):
                raise read
            images, kept = (None if x is None else x.to(self.device, non_blocking=True) for x in read)
            assert images is not None
            yield images, kept

    def _finish(
        self, images: Tensor, kept: Tensor | None, labels: Tensor, drawn: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Normalised float32 images, and int64 labels or label maps, or float32 depth maps, of uint8 images. ``kept``: the mask of
        what has been augmented already."""
        maps, depth = labels if labels.ndim > 1 else None, self._metres is not None
        if depth:
            maps = labels.int() & 0xFFFF  # 16 bits without a sign
        if drawn:
            images, kept, maps = apply(list(self._augmentations.values()), images, drawn, maps, depth)
        x = images.float().mul_(self._scale).add_(self._shift)
        if kept is not None:
            x.masked_fill_(~kept.unsqueeze(1), 0)
        if self.expand:
            x = torch.stack([torch.rot90(x, turns, (2, 3)) for turns in range(4)], dim=1).flatten(0, 1)
        if self._metres is not None and maps is not None:
            return x, maps.float() * self._metres
        return x, labels if maps is None else maps.long()


class _Decoder(TorchDataset):
    """Decodes a batch of files, in a worker process, and augments it there where that is done image by image."""

    def __init__(
        self,
        files: ImageFiles,
        crop: ResizedCrop | None,
        augmentations: Mapping[str, Augmentation],
        seed: int,
        epoch: int,
    ):
        self.files, self.crop, self.augmentations, self.seed, self.epoch = files, crop, augmentations, seed, epoch

    def __getitem__(self, asked: tuple[list[int], Tensor]) -> tuple[Tensor, Tensor | None] | UserError:
        """Of positions, and the numbers (B,) that their draws count by."""
        rows, counter = asked
        try:
            images = self.files.decode(rows, self._boxes(counter), threads=1)
        except UserError as error:  # raised here it would reach the user as a worker's traceback
            return error
        drawn = [draw_for(name, a, counter, self.seed, self.epoch) for name, a in self.augmentations.items()]
        return apply(list(self.augmentations.values()), images, drawn)[:2]

    def _boxes(self, counter: Tensor) -> list[Box] | None:
        if self.crop is None:
            return None
        drawn = draw_for("resized_crop", self.crop, counter, self.seed, self.epoch)
        return [partial(self.crop.box, drawn=numbers) for numbers in drawn.tolist()]


def sample_weights(labels: Tensor, sampler: str | Sequence[float]) -> Tensor:
    """How often each sample is drawn, (N,) float64, of labels (N,). Raises UserError where there is not one label a sample, and
    for weights that do not fit the classes."""
    if labels.dim() != 1:
        raise UserError("data.sampler: weights are by class, and the data set has label maps")
    counts = torch.bincount(labels).double()
    if isinstance(sampler, str):
        if sampler != "balanced":
            raise UserError(f"data.sampler: 'balanced' or a weight per class, got '{sampler}'")
        return (1 / counts)[labels]
    weights = torch.tensor(sampler, dtype=torch.float64)
    if len(weights) < len(counts) or weights.min() < 0 or not weights[labels].any():
        raise UserError(
            f"data.sampler: one weight of at least 0 per class, not all 0, for {len(counts)} classes; got {list(sampler)}"
        )
    return weights[labels]


def _affine(mean: Sequence[float], std: Sequence[float], channels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(scale, shift), each (C, 1, 1), with byte * scale + shift = (byte / 255 - mean) / std."""
    if len(mean) != channels or len(std) != channels or min(std) <= 0:
        raise UserError(f"mean and std must be {channels} numbers each, std above 0, got {list(mean)} and {list(std)}")
    m, s = (torch.tensor(v, dtype=torch.float64).view(channels, 1, 1) for v in (mean, std))
    return (1 / (255 * s)).float().to(device), (-m / s).float().to(device)


def _decoding_crop(augmentations: Mapping[str, Augmentation], split: Split) -> ResizedCrop | None:
    """The augmentation that works while files are decoded. Raises UserError if images in memory cannot have it."""
    for place, (name, augmentation) in enumerate(augmentations.items()):
        if isinstance(augmentation, ResizedCrop):
            if not split.streamed:
                raise UserError(f"augmentation '{name}' needs a streamed data set (folder with stream: true)")
            if place > 0:
                raise UserError(f"augmentation '{name}' must be the first of the list: it reads the file")
            return augmentation
    return None
