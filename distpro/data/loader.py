"""Batches of a split: shuffled, augmented and normalised, and each a pure function of (seed, epoch, step)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from distpro.batch import Batch
from distpro.data.augment import Augmentation, AugmentSpec, ResizedCrop, apply, build_augment, draw_for
from distpro.data.counter import make_generator
from distpro.data.files import Box, ImageFiles
from distpro.data.mixing import Mixing
from distpro.data.splits import Split
from pathways.registry import UserError


class Loader:
    """Batches of ``batch_size`` samples of ``split``.

    There is no state: the order of epoch e depends on (seed, e), the augmentation of sample n on (seed, e, n), and
    PyTorch's global random numbers are neither read nor changed. So a run that continues at (epoch, step) sees what
    it would have seen, and a sample looks the same whatever the batch size, the rank or the device.

    mean, std: per channel, for images in 0-1.
    augment: names, or {name: parameters}, in the order of application (``distpro.data.AUGMENTATIONS``).
    rank, world_size: each step's batch of ``batch_size * world_size`` samples is cut into parts of ``batch_size``;
    a smaller last batch into parts that differ by at most one sample (shuffled: equal parts, up to world_size - 1
    samples of an epoch are left out).
    rotations: follow every image by itself turned by 90, 180 and 270 degrees: x has 4 rows per label.
    augment_epochs: draw the augmentations of epoch e as those of epoch e modulo this number; None: each epoch its own.
    num_classes: K, for augmentations that mix samples: y is then (N, K) float32 probabilities.
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
        rotations: bool = False,
        augment_epochs: int | None = None,
        num_classes: int | None = None,
    ):
        if batch_size < 1 or not 0 <= rank < world_size:
            raise UserError(f"need batch_size >= 1 and 0 <= rank < world_size, got {batch_size}, {rank}, {world_size}")
        self.device = torch.device(device)
        self.shuffle, self.seed = shuffle, seed
        self.rotations, self.augment_epochs = rotations, augment_epochs
        if rotations and split.image_shape[1] != split.image_shape[2]:
            raise UserError(f"rotations need square images, got {split.image_shape}")
        self.rank, self.world_size, self.workers = rank, world_size, workers
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.global_batch = batch_size * world_size
        whole = len(split) - len(split) % world_size if shuffle else len(split)  # training: parts of one size
        self._ends = _batch_ends(whole, self.global_batch, drop_last)
        self._scale, self._shift = _affine(mean, std, split.image_shape[0], self.device)
        augmentations = build_augment(augment)
        self._crop = _decoding_crop(augmentations, split)
        self._mixing = {name: a for name, a in augmentations.items() if isinstance(a, Mixing)}
        self._augmentations = {
            name: a for name, a in augmentations.items() if a is not self._crop and name not in self._mixing
        }
        self._num_classes = num_classes
        if self._mixing and (num_classes is None or rotations):
            why = "does not go with losses that read rotations" if rotations else "needs the number of classes"
            raise UserError(f"augmentation '{next(iter(self._mixing))}' {why}")
        self._stored_index = split.index
        self._images = split.images if isinstance(split.images, ImageFiles) else split.images.to(self.device)
        self._labels, self._index = split.labels.to(self.device), split.index.to(self.device)

    def __len__(self) -> int:
        """Batches per epoch, the same on each rank."""
        return len(self._ends)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step ``start`` on."""
        order = self._order(epoch)
        rows = order.to(self.device)
        index = self._index[rows]
        drawing = epoch % self.augment_epochs if self.augment_epochs else epoch
        drawn, mixing = (
            [draw_for(name, a, index, self.seed, drawing) for name, a in kind.items()]
            for kind in (self._augmentations, self._mixing)
        )
        parts = [self._part(step) for step in range(start, len(self))]
        if isinstance(self._images, ImageFiles):
            read = self._stream(self._images, [order[part].tolist() for part in parts], drawing)
        else:
            read = (self._images.index_select(0, rows[part]) for part in parts)
        for part, images in zip(parts, read, strict=True):
            x, y = self._finish(images, [numbers[part] for numbers in drawn]), self._labels[rows[part]]
            if self._mixing:
                y = F.one_hot(y, self._num_classes or -1).float()
            for augmentation, numbers in zip(self._mixing.values(), mixing, strict=True):
                x, y = augmentation.mix(x, y, numbers[part])  # type: ignore[attr-defined]
            yield Batch(x.contiguous(memory_format=self.memory_format), y, index[part])

    def endless(self, start: int = 0) -> Iterator[Batch]:
        """The batches of all epochs one after the other, from step ``start`` on."""
        epoch, step = divmod(start, len(self))
        while True:
            yield from self.epoch(epoch, step)
            epoch, step = epoch + 1, 0

    def _order(self, epoch: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(len(self._labels))
        # always drawn on the CPU: the generators of other devices give other permutations
        return torch.randperm(len(self._labels), generator=make_generator(self.seed, epoch, "order"))

    def _part(self, step: int) -> slice:
        """Where this rank's part of a step's batch lies in the order of the epoch."""
        first, size = step * self.global_batch, self._ends[step] - step * self.global_batch
        return slice(first + size * self.rank // self.world_size, first + size * (self.rank + 1) // self.world_size)

    def _stream(self, files: ImageFiles, batches: list[list[int]], epoch: int) -> Iterator[Tensor]:
        """The images of each batch of positions, uint8 (B, 3, H, W)."""
        decoder = _Decoder(files, self._stored_index, self._crop, self.seed, epoch)
        ahead = DataLoader(
            decoder,
            batch_size=None,
            sampler=batches,  # type: ignore[arg-type]  # a sampler of whole batches
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            generator=make_generator(self.seed, epoch, "workers"),  # else it would draw from the global one
        )
        for images in ahead:
            if isinstance(images, UserError):
                raise images
            yield images.to(self.device, non_blocking=True)

    def _finish(self, images: Tensor, drawn: list[Tensor]) -> Tensor:
        images, kept = apply(list(self._augmentations.values()), images, drawn)
        x = images.float().mul_(self._scale).add_(self._shift)
        if kept is not None:
            x.masked_fill_(~kept.unsqueeze(1), 0)
        if self.rotations:
            x = torch.stack([torch.rot90(x, turns, (2, 3)) for turns in range(4)], dim=1).flatten(0, 1)
        return x


class _Decoder(TorchDataset):
    """Decodes a batch of files, in a worker process."""

    def __init__(self, files: ImageFiles, index: Tensor, crop: ResizedCrop | None, seed: int, epoch: int):
        self.files, self.index, self.crop, self.seed, self.epoch = files, index, crop, seed, epoch

    def __getitem__(self, rows: list[int]) -> Tensor | UserError:
        try:
            return self.files.decode(rows, self._boxes(rows), threads=1)
        except UserError as error:  # raised here it would reach the user as a worker's traceback
            return error

    def _boxes(self, rows: list[int]) -> list[Box] | None:
        if self.crop is None:
            return None
        drawn = draw_for("resized_crop", self.crop, self.index[rows], self.seed, self.epoch)
        return [partial(self.crop.box, drawn=numbers) for numbers in drawn.tolist()]


def _batch_ends(samples: int, batch: int, drop_last: bool) -> list[int]:
    """For each step of an epoch, the number of samples up to its end."""
    if samples < (batch if drop_last else 1):
        raise UserError(f"the split has {samples} samples, fewer than one batch of {batch}")
    ends = list(range(batch, samples + 1, batch))
    return ends if drop_last or samples % batch == 0 else [*ends, samples]


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
