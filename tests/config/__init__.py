"""Tests of configs."""

import pytest

from distpro.config.reading import read_config
from pathways.registry import UserError

STUDENT = "student: {model: resnet8}\n"


def message_of(source, *overrides):
    with pytest.raises(UserError) as error:
        read_config(source, overrides)
    return str(error.value)
