"""What is said of training and test part."""

import torch

from distpro.data import Loader, Split
from distpro.runs.parts import said_of_parts


def loader(images, labels):
    split = Split.of(images, torch.tensor(labels))
    return Loader(split, 4, mean=[0.5] * 3, std=[0.5] * 3, shuffle=False, drop_last=False)


def images(n, seed):
    return torch.randint(256, (n, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_nothing_of_parts_that_are_as_they_should_be():
    assert said_of_parts(loader(images(8, 0), [0, 1] * 4), loader(images(4, 1), [0, 1] * 2)) == []


def test_of_samples_in_both_parts():
    train = images(8, 0)
    test = torch.cat([train[5:7], images(2, 1)])
    (said,) = said_of_parts(loader(train, [0, 1] * 4), loader(test, [0, 1] * 2))
    assert said.startswith("2 of 4 test samples are in the training part too")


def test_of_classes_that_a_part_lacks():
    said = said_of_parts(loader(images(8, 0), [0, 1, 2, 3] * 2), loader(images(4, 1), [0, 5] * 2))
    assert said == ["no test sample of class 1, 2, 3", "no training sample of class 5"]
