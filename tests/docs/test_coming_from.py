"""docs/coming_from.md: our configs can be built; docs/troubleshooting.md: its messages are those of the code."""

from __future__ import annotations

import ast
import re

import pytest
import yaml

from distpro import build
from distpro.build.terms import build_terms
from distpro.config.reading import merge, read_config
from distpro.data import Blank
from distpro.losses import LOSSES
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
CONFIGS = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]
SIZES = {"folder": (1000, (3, 64, 64)), "cifar10": (10, (3, 32, 32)), "cifar100": (100, (3, 32, 32))}


@pytest.mark.slow
@pytest.mark.parametrize("given", CONFIGS, ids=["torchdistill", "repdistiller", "mdistiller", "timm"])
def test_a_config_of_ours_can_be_built(given):
    if "timm" in str(given):
        pytest.importorskip("timm")
    if "base" in given:
        base = yaml.safe_load((ROOT / given.pop("base")).read_text(encoding="utf-8"))
        given = merge(base, given)
    config = read_config(given)
    build.check_names(config)
    data = Blank(*SIZES[config.data.name])
    models = build.build_pair(config, data, load=False)
    (term, *others) = build_terms(config, models, data)
    assert term.loss is not None and (len(others) == 0 or config.terms[0].loss == "at")
    assert config.retrain.weights == "constant"
    assert not config.training.optimizer.nesterov or config.data.name == "folder"


def test_the_losses_that_it_names_exist():
    assert {term["loss"] for config in CONFIGS for term in config["terms"]} == {"kd", "at", "dkd"}
    assert {"l2", "deit", "crd"} <= set(LOSSES)


def constants():
    """The text of all string constants of both packages, those of f-strings in their parts."""
    files = [path for package in ("distpro", "pathways") for path in (ROOT / package).rglob("*.py")]
    nodes = (node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


@pytest.mark.slow
def test_the_messages_of_the_troubleshooting_page_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    assert len(messages) > 20
    code = constants()
    parts = {part for message in messages for part in message.split("…") if len(part.strip()) > 3}
    assert [part for part in sorted(parts) if part not in code] == []
