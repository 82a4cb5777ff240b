"""Data sets, splits, and batches on the device: the project's own images, augmented there, and anybody's PyTorch data.

May be imported from here: what ``__all__`` lists. Nothing here knows of tasks, models or the trainer.
"""

from distpro.batch import Batch
from distpro.data import classification, depth, detection, scenes, segmentation, text  # noqa: F401  # they register their data sets
from distpro.data.augment import AUGMENTATIONS, build_augment
from distpro.data.datasets import DATASETS, Blank, Dataset, Source, load_data
from distpro.data.foreign import ForeignDataset, adopt, from_objects
from distpro.data.foreign_loader import ForeignLoader
from distpro.data.loader import Loader
from distpro.data.loading import make_loader, split
from distpro.data.mixing import Mixing
from distpro.data.order import BatchLoader
from distpro.data.splits import Split

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "Batch",
    "BatchLoader",
    "Blank",
    "Dataset",
    "ForeignDataset",
    "ForeignLoader",
    "Loader",
    "Mixing",
    "Source",
    "Split",
    "adopt",
    "build_augment",
    "from_objects",
    "load_data",
    "make_loader",
    "split",
]
