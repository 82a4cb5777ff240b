"""Somebody else's Datasets and DataLoaders as a data set: facts, examples, parts, and code that returns them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    IterableDataset,
    Subset,
    TensorDataset,
)

from distpro.build.data import search_parts
from distpro.config.schema import Config
from distpro.data import ForeignDataset, Split, from_objects, load_data, make_loader, split
from distpro.data.datasets import DATASETS
from distpro.data.foreign import adopt, take
from pathways.registry import UserError
from tests.data.foreign_sets import Boxes, Noisy, Stream, states


def test_facts_of_a_data_set():
    data = from_objects(Noisy(), None, DataLoader(Noisy(9), 4))
    assert isinstance(data, ForeignDataset) and data.validation is None
    assert (data.names, data.num_classes, data.image_shape) == (["even", "odd"], 2, None)
    assert (data.mean, data.std) == ((), ())
    assert data.signature["train"].endswith("Noisy, 23 samples") and data.signature["test"].endswith("9 samples")
    assert "validation" not in data.signature and all(isinstance(v, str | int) for v in data.signature.values())
    images = TensorDataset(torch.rand(6, 3, 4, 5), torch.arange(6))
    assert from_objects(images, None, images, names="abc").image_shape == (3, 4, 5)
    bare = from_objects(images, images, images)
    assert (bare.names, bare.num_classes) == (None, None)
    assert from_objects(images, None, images, num_classes=6).num_classes == 6
    assert from_objects(Boxes(), None, Boxes(), num_classes=5).image_shape == (3, 8, 8)
    assert from_objects(Boxes(), None, Boxes(), num_classes=5).num_classes == 5


@pytest.mark.parametrize(
    "part, numbers",
    [
        (Noisy(), [0, 7, 15]),
        (DataLoader(Noisy(), 5, shuffle=True), [0, 7, 15]),
        (Stream(), [0, 1, 2]),
        (DataLoader(Stream(), 5), [0, 1, 2]),
        (DataLoader([(torch.full((4, 1), n), torch.ones(4)) for n in range(5)], batch_size=None), [0, 0, 0, 0]),
    ],
)
def test_examples(part, numbers):
    before = states()
    data = from_objects(part, None, Noisy())
    assert data.example(3).inputs[:, 0].tolist() == numbers
    assert data.example(3).samples == len(numbers)
    assert torch.equal(data.example(3).inputs, data.example(3).inputs)
    assert states() == before


def test_parts_are_stratified_where_labels_are_known():
    part = Noisy(40)
    part.targets = [int(n >= 10) for n in range(40)]
    for whole in (part, Subset(part, range(20, 0, -1))):
        first, rest = split(whole, 0.5, seed=0)
        assert {*first.indices, *rest.indices} == set(range(len(whole))) and len(first) == len(whole) // 2
        labels = [whole[i][1] for i in range(len(whole))]
        ones = sum(labels[i] for i in first.indices)
        assert abs(ones - sum(labels) / 2) <= 0.5
    assert split(part, 0.5, 0)[0].indices == split(part, 0.5, 0)[0].indices != split(part, 0.5, 1)[0].indices
    for labels in (np.array([-3, 5] * 20), torch.arange(40) % 4, [[0]] * 40, ["a"] * 40, [0.5] * 40, None):
        plain = TensorDataset(torch.zeros(40))
        plain.targets = labels
        assert len(split(plain, 0.25, 0)[0]) == 10
    unknown = ConcatDataset([Noisy(10), Noisy(10)])
    assert len(take(unknown, 7, 0)) == 7
    for given in (DataLoader(Noisy(), 5), Stream()):
        with pytest.raises(UserError, match="cannot be split: give a validation set"):
            split(given, 0.5, 0)
    with pytest.raises(UserError, match="fraction"):
        split(part, 1.5, 0)


def test_a_search_says_that_a_loader_without_a_length_cannot_be_split():
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(Noisy(4))

    data = SimpleNamespace(validation=None, train=DataLoader(Endless(), batch_size=5))
    with pytest.raises(UserError, match="has no length and cannot be split: give a validation set"):
        search_parts(Config(student={"model": "resnet8"}), data)


class Counted(Noisy):
    def __init__(self, count):
        super().__init__(8)
        self.count = count

    def __len__(self):
        return self.count


@pytest.mark.parametrize(
    "value, message",
    [
        (5, "got int; it must be"),
        ((Noisy(),), "got tuple; it must be"),
        ({"train": Noisy()}, "there is no 'test' part"),
        ({"train": Noisy(), "tets": Noisy()}, "unknown part 'tets'; did you mean 'test'"),
        ((Noisy(), "x"), "the test part is str; it must be a torch"),
        ((Noisy(0), Noisy()), "the train part is empty"),
        (
            (Noisy(), Counted(-1)),
            "the test part, .*Counted, has no length: ValueError: __len__\\(\\) should return >= 0$",
        ),
        ((Counted(8.0), Noisy()), "the train part, .*Counted, has no length: TypeError: 'float' object .* integer$"),
        ((DataLoader(Noisy(0), 2), Noisy()), "the train part is empty"),
        ((Split.of(torch.zeros(2, 3, 4, 4), torch.zeros(2)), Noisy()), "the train part is distpro.data.splits.Split"),
        ({"train": Noisy(), "test": Noisy(), "names": ["a"], "num_classes": 2}, "1 names, but num_classes is 2"),
    ],
)
def test_wrong_data_sets(value, message):
    with pytest.raises(UserError, match=message):
        adopt(value)


def test_data_sets_from_code(tmp_path, monkeypatch):
    (tmp_path / "my_sets.py").write_text(
        "from tests.data.foreign_sets import Noisy\n"
        "from distpro.data import DATASETS, from_objects\n"
        "def pair(root, count=23): return Noisy(count), Noisy(9)\n"
        "def three(): return {'train': Noisy(), 'validation': Noisy(4), 'test': Noisy(9)}\n"
        "def whole(): return from_objects(Noisy(), None, Noisy(), names=['a', 'b'])\n"
        "def source(image_size=8): return DATASETS['digits'](image_size)\n"
        "def nothing(): return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = load_data("my_sets:pair", "here", count=12)
    assert len(data.train) == 12 and data.validation is None
    assert len(load_data("my_sets:pair", "here", samples=6).train) == 6
    assert len(load_data("my_sets:three").validation) == 4
    assert load_data("my_sets:whole").names == ["a", "b"]
    source = load_data("my_sets:source", samples=100, classes=5)
    assert (len(source.train), source.num_classes, source.image_shape) == (100, 5, (3, 8, 8))
    assert "my_sets:pair" not in DATASETS
    for name, options, message in (
        ("my_sets:pairs", {}, "did you mean 'pair'"),
        ("my_sets:pair", {"count": 2}, "missing a required argument: 'root'"),
        ("my_sets:nothing", {}, "dataset 'my_sets:nothing': got NoneType; it must be"),
        ("my_sets:three", {"classes": 2}, "classes: dataset 'my_sets:three' brings its own samples"),
        ("my_sets:three", {"samples": 99}, "between 1 and the 23 training images"),
    ):
        with pytest.raises(UserError, match=message):
            load_data(name, **options)


def test_one_function_makes_any_loader():
    digits = load_data("digits", image_size=8, samples=50)
    loader = make_loader(digits, digits.train, 8, training=True, augment=["crop", "mixup"], drop_last=True)
    assert next(loader.epoch(0)).target.shape == (8, 10) and len(loader) == 6
    turned = next(make_loader(digits, digits.train, 8, training=True, expand="rotations").epoch(0))
    assert turned.rows_per_sample == 4
    plain = make_loader(digits, digits.test, 100, training=False, augment=["crop"], drop_last=True, expand="rotations")
    assert [b.samples for b in plain.epoch(0)] == [100, 100, 100, 59]
    data = from_objects(Noisy(), None, Noisy())
    assert len(make_loader(data, data.train, 5, training=True, drop_last=True)) == 4
    assert len(make_loader(data, data.test, 5, training=False, drop_last=True)) == 5
    for options, message in (
        ({"augment": ["flip"]}, "augment is for distpro's own data sets; a Dataset augments itself"),
        ({"augment_epochs": 3}, "augment_epochs is for"),
        ({"expand": "rotations"}, "a loss reads rotations of images"),
    ):
        with pytest.raises(UserError, match=message):
            make_loader(data, data.train, 5, training=True, **options)
