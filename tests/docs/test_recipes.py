"""The YAML of docs/recipes.md and docs/method.md is what a config may say."""

from __future__ import annotations

import re

import pytest
import yaml

from distpro import build
from distpro.build.terms import build_terms
from distpro.config.reading import merge, read_config
from distpro.config.stages import stages_of
from distpro.data import Blank
from distpro.process import PROCESSES
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
METHOD = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE + METHOD, re.DOTALL)
PAIR = {"student": {"model": "resnet20"}, "teacher": {"model": "resnet56"}}


@pytest.mark.slow
@pytest.mark.parametrize("text", BLOCKS)
def test_a_block_is_a_config_whose_terms_can_be_built(text):
    """The models' checkpoints and the data aside, which nobody has here."""
    given = yaml.safe_load(text)
    pair = {"student": PAIR["student"]} if "teachers" in given else PAIR
    for stage in stages_of(read_config(merge(pair, given))):
        build.check_names(stage.config)
        models = build.build_pair(stage.config, Blank(10, (3, 32, 32)), load=False)
        assert len(build_terms(stage.config, models, Blank(10, (3, 32, 32)))) >= len(stage.config.terms)


def test_the_page_names_every_process():
    assert all(f"{{{name}: " in PAGE for name in PROCESSES if name != "constant")
