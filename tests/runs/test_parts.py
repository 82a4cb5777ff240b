"""What is said of training and test part."""

import pytest
import torch

from distpro.data import Loader, Split
from distpro.runs.parts import said_of_parts, said_of_scale


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


@pytest.mark.parametrize(
    ("labels", "classes", "said"),
    [
        ([1, 2], 3, "0: do the labels begin at 1?"),
        ([0, 1], 4, "2, 3: 4 names, and labels up to 1?"),
        ([10, 20], 21, "0, 1, 2, 3, 4 and 14 more: do the labels leave numbers out?"),
    ],
)
def test_of_classes_without_a_sample(labels, classes, said):
    parts = loader(images(8, 0), labels * 4), loader(images(4, 1), labels * 2)
    assert said_of_parts(*parts, classes) == [f"no sample at all of class {said}"]
    assert said_of_parts(*parts) == []


def test_nothing_of_classes_that_all_have_samples():
    parts = loader(images(8, 0), [0, 1] * 4), loader(images(4, 1), [1, 2] * 2)
    assert said_of_parts(*parts, 3) == ["no test sample of class 0", "no training sample of class 2"]


def test_of_a_scale_that_images_hardly_have():
    for mean, std in [
        ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),  # CIFAR-10
        ([0.1307], [0.3081]),  # MNIST
        ([0.0], [1.0]),
        ((), ()),
    ]:
        assert said_of_scale(mean, std) == []
    (twice,) = said_of_scale([0.4914 / 255], [0.2470 / 255])
    assert (
        twice == "mean [0.00193] and std [0.00097]: a std below 1/255, one grey level; are they divided by 255 twice?"
    )
    (negative,) = said_of_scale([0.5, -0.5], [0.2, 0.2])
    assert negative == "mean [0.5, -0.5] and std [0.2, 0.2]: images in 0-1 have no mean below 0"
