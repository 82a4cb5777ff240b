"""A student of lazy modules has its weights from the seed and two samples of the data, as in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import distpro
from distpro.build.data import build_data, example_of
from distpro.build.given import Given
from distpro.build.models import build_pair
from distpro.config.reading import read_config
from tests.digits import settings


def lazy():
    layers = (nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(10))


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_lazy_student_has_the_weights_of_its_first_pass(channels_last):
    config = read_config(settings(changes={"channels_last": channels_last, "seed": 3}))
    data = build_data(config)
    student = build_pair(config, data, given=Given(student=lazy())).student
    plain, inputs = lazy(), example_of(config, data).inputs
    torch.manual_seed(3)
    plain.eval()(inputs)
    truth = plain.state_dict()
    assert student.state_dict().keys() == truth.keys()
    assert all(torch.equal(value, truth[name]) for name, value in student.state_dict().items())
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert student[0].weight.is_contiguous(memory_format=layout)


def test_a_lazy_student_trains():
    student = lazy()
    metrics = distpro.train(settings(changes={"training": {"epochs": 1}}), student=student).metrics
    assert metrics["loss"] > 0 and student[1].num_batches_tracked == 5
