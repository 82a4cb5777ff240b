"""docs/extending.md: its blocks run, and the method that they add trains."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import shutil
import sys

import pytest
import torch
import yaml

import distpro
from distpro.cli import main
from distpro.config.reading import merge
from distpro.losses import LOSSES, available_losses, build_loss
from pathways import DISTANCES, TRANSFORMS
from pathways.registry import UserError
from tests.conftest import ROOT
from tests.losses import test_conformance
from tests.losses.test_methods import (  # noqa: F401  # fixtures too
    BASE,
    METHODS,
    SMALL,
    check_that_it_learns,
    check_what_moves,
    fitting,
    teacher,
    trained,
)

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
LOSS_FILE, EXAMPLE, TEST, PARTS, MODEL = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
METHOD_CONFIG, IN_A_PACKAGE, PARTS_CONFIG = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """What a test registers is gone after it."""
    for registry in (LOSSES, DISTANCES, TRANSFORMS):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


@pytest.fixture
def pefd(tmp_path):
    """The page's loss, as a file of distpro/losses would be."""
    (tmp_path / "pefd.py").write_text(LOSS_FILE)
    spec = importlib.util.spec_from_file_location("distpro.losses.pefd", tmp_path / "pefd.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    shutil.copy(BASE, tmp_path / "base.yaml")
    (tmp_path / "pefd.yaml").write_text(METHOD_CONFIG)
    return tmp_path / "pefd.yaml"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder with a package ``mylab`` that can be imported, the working directory of the test."""
    (tmp_path / "mylab").mkdir()
    (tmp_path / "mylab" / "pefd.py").write_text(LOSS_FILE)
    (tmp_path / "mylab" / "models.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [n for n in sys.modules if n.partition(".")[0] == "mylab"]:
        del sys.modules[name]


def test_the_method_is_not_there_yet():
    assert "pefd" not in available_losses()


def test_one_file_makes_a_loss_known(pefd, capsys):
    assert "pefd" in available_losses()
    assert main(["list", "losses"]) == 0
    assert "pefd" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"^loss 'pefd' reads one embedding \(D,\) of each model, got \[\(4, 2, 2\), "):
        build_loss("pefd", [(4, 2, 2)], [(4, 2, 2)])


def test_its_test_passes(pefd):
    names = {}
    exec(TEST, names)
    torch.manual_seed(0)
    names["test_pefd_is_the_cosine_distance_to_the_mean_projection"]()


CONFORMANCE = [
    (name, test)
    for name, test in inspect.getmembers(test_conformance, inspect.isfunction)
    if list(inspect.signature(test).parameters) in (["name"], ["name", "given"]) and "first_stage" not in name
]


@pytest.mark.parametrize(("name", "test"), CONFORMANCE, ids=[name for name, _ in CONFORMANCE])
def test_it_conforms(name, test, pefd, monkeypatch):
    examples = dict(test_conformance.EXAMPLES)
    exec(EXAMPLE, {"EXAMPLES": examples})
    monkeypatch.setattr(test_conformance, "EXAMPLES", examples)
    for given in ["target", "index"] if "given" in inspect.signature(test).parameters else [None]:
        test("pefd", *[given] * (given is not None))


@pytest.mark.slow
def test_its_config_trains(pefd, trained, monkeypatch):  # noqa: F811
    monkeypatch.setitem(METHODS, "pefd", pefd)
    (training,) = trained("pefd")
    assert training.config.terms[0].weight == 25
    check_that_it_learns("pefd", training)
    check_what_moves(training)


def test_every_attribute_of_the_table_exists_and_none_is_missing():
    (rows,) = re.findall(r"\| attribute \| says \|\n\|---\|---\|\n(.*?)\n\n", PAGE, re.DOTALL)
    listed = {name for row in rows.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    base = distpro.losses.DistillationLoss
    assert listed == {n for n in base.__annotations__ if not n.startswith("_")}


@pytest.mark.slow
def test_a_package_of_one_s_own(package, teacher, capsys):  # noqa: F811
    """By its path, without registering; but not out of a schedule file."""
    (package / "pefd.yaml").write_text(IN_A_PACKAGE)
    shutil.copy(BASE, package / "base.yaml")
    small = [*SMALL, *fitting("kd", teacher), "training.max_steps=2", "task_weight=1"]
    assert main(["retrain", "pefd.yaml", *small, "--out", "run"]) == 0
    assert (package / "run" / "student.pt").is_file()
    learned = 'terms=[{"loss": "mylab.pefd:ProjectorEnsemble", "key": "pefd"}]'
    schedule = distpro.search("pefd.yaml", overrides=[*small, learned])
    with pytest.raises(
        UserError, match="names code of its own, terms.0.loss 'mylab.pefd:ProjectorEnsemble'.*give a config"
    ):
        distpro.retrain(schedule=schedule)
    capsys.readouterr()
    assert main(["retrain", "pefd.yaml", *small, 'terms=[{"loss": "mylab.pefd:Projector"}]']) == 2
    assert "'mylab.pefd' has no 'Projector'; did you mean 'ProjectorEnsemble'?" in capsys.readouterr().err


@pytest.mark.slow
def test_a_distance_a_transform_and_a_model(package, teacher, capsys):  # noqa: F811
    exec(PARTS, {})
    content = merge(yaml.safe_load(BASE.read_text(encoding="utf-8")), yaml.safe_load(PARTS_CONFIG))
    small = [s for s in SMALL if not s.startswith("student")]
    small += ["teacher.model=resnet14", f"teacher.checkpoint={teacher}", "training.max_steps=3"]
    (package / "parts.yaml").write_text(yaml.safe_dump(content))
    result = distpro.retrain("parts.yaml", out="run", overrides=small)
    saved = torch.load("run/student.pt", weights_only=True)
    assert result.metrics["step"] == 3 and saved["0.weight"].shape == (8, 3, 3, 3)
    assert main(["retrain", "parts.yaml", "--dry-run", *small]) == 0
    shown = capsys.readouterr().out
    assert "student  mylab.models:tiny" in shown and "layer3:pre_relu<-3@resized  level (3, 2, 1)" in shown
