"""Data sets, splits, and augmented batches on the device."""

from distpro.data.augment import AUGMENTATIONS, build_augment
from distpro.data.datasets import DATASETS, Dataset, Source, load_data
from distpro.data.loader import Batch, Loader
from distpro.data.mixing import Mixing
from distpro.data.splits import Split, split

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "Batch",
    "Dataset",
    "Loader",
    "Mixing",
    "Source",
    "Split",
    "build_augment",
    "load_data",
    "split",
]
