"""The package as it is installed: what it imports and when, its version, and that it works without the repository."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import distpro
from distpro.cli import main
from distpro.config.reading import read_config
from distpro.config.starters import starters, write_starter
from pathways.registry import UserError
from tests.conftest import ROOT

OPTIONAL = ["tensorboard", "matplotlib", "higher", "sklearn", "timm", "onnx", "safetensors", "optuna"]

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is not installed", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run_blocked(code, blocked, folder):
    """Run code in a process of its own where some packages are not installed. Returns what it printed."""
    program = f"BLOCKED = {blocked!r}\n{BLOCKER}\n{code}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_blocker_blocks(tmp_path):
    with pytest.raises(AssertionError, match="yaml is not installed"):
        run_blocked("import yaml", ["yaml"], tmp_path)


@pytest.mark.slow
def test_pathways_need_torch_alone(tmp_path):
    code = """
import pkgutil, pathways, torch
from torch import nn
for module in pkgutil.iter_modules(pathways.__path__):
    __import__(f"pathways.{module.name}")

def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU())

x = torch.randn(2, 3, 9, 9)
options = dict(teacher_taps=["0", "2"], student_taps=["1", "3"], connect="all", transforms=["conv1x1", "attention"])
print(len(pathways.build_pathways(network(), network(), x, distance="hcl", **options)))
"""
    assert run_blocked(code, ["distpro", "pydantic", "yaml", "rich", *OPTIONAL], tmp_path) == "8\n"


def test_import_and_help_and_version_need_nothing(tmp_path):
    blocked = ["torch", "torchvision", "numpy", "pydantic", "yaml", "rich", *OPTIONAL]
    assert run_blocked("import distpro; print(distpro.__version__)", blocked, tmp_path) == f"{distpro.__version__}\n"
    for arguments, said in (
        (["--version"], distpro.__version__),
        (["--help"], "retrain"),
        (["init", "--help"], "FILE"),
    ):
        assert said in run_blocked(f"import distpro.cli; distpro.cli.main({arguments})", blocked, tmp_path)


@pytest.mark.slow
def test_what_the_package_offers_needs_no_extras(tmp_path):
    code = "import distpro\nfor name in distpro.__all__: getattr(distpro, name)\nprint(distpro.available_losses()[0])"
    assert run_blocked(code, OPTIONAL, tmp_path) == f"{distpro.available_losses()[0]}\n"


def test_functions_are_not_hidden_by_the_folders_of_their_names():
    import distpro.search.searcher
    import distpro.train.trainer

    assert distpro.search.__module__ == distpro.train.__module__ == "distpro.runs.commands"
    assert sys.modules["distpro.search.searcher"].Searcher and sys.modules["distpro.train.trainer"].Trainer
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        _ = distpro.serach


def test_a_source_tree_that_is_not_installed_has_a_version(tmp_path):
    code = """
import importlib.metadata as metadata

def version(name):
    raise metadata.PackageNotFoundError(name)

metadata.version = version
import distpro
print(distpro.__version__)
"""
    assert run_blocked(code, [], tmp_path) == "0+unknown\n"


# Configs to begin with


@pytest.mark.parametrize("name", starters())
def test_an_example_is_written_with_its_teacher(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", name]) == 0
    out = capsys.readouterr().out
    search, teacher = read_config(f"{name}.yaml"), read_config(f"{name}_teacher.yaml")
    assert (search.teacher.model, search.data.name) == (teacher.student.model, teacher.data.name)
    folder = Path(search.teacher.checkpoint).parent
    assert f"distpro train {name}_teacher.yaml --out {folder}\n" in out
    assert f"distpro search {name}.yaml --out runs/{name}\n" in out
    shipped = ROOT / "search_configs" / f"{name}.yaml"
    assert read_config(shipped) == search  # and not a copy:
    assert set(yaml.safe_load(shipped.read_text())) == {"base"}


def test_an_example_goes_where_one_says(tmp_path):
    assert write_starter("digits", tmp_path / "new" / "mine.yaml") == (
        tmp_path / "new" / "mine.yaml",
        tmp_path / "new" / "mine_teacher.yaml",
    )


def test_init_overwrites_nothing_and_names_the_nearest(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("digits_teacher.yaml").write_text("mine")
    assert main(["init", "digits"]) == 2
    assert (
        capsys.readouterr().err == "distpro: digits_teacher.yaml already exists; choose another name with --out FILE\n"
    )
    assert os.listdir() == ["digits_teacher.yaml"] and Path("digits_teacher.yaml").read_text() == "mine"
    assert main(["init", "digit"]) == 2
    message = "distpro: unknown example 'digit'; did you mean 'digits'? (allowed: digits)\n"
    assert capsys.readouterr().err == message
    with pytest.raises(UserError, match=r"mine\.txt: a config's name ends with \.yaml"):
        write_starter("digits", "mine.txt")


# The wheel


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The content of the wheel, built from a copy of the sources, which it leaves alone."""
    for needed, oldest in (("pip", 0), ("setuptools", 77)):
        if importlib.util.find_spec(needed) is None or int(version(needed).partition(".")[0]) < oldest:
            pytest.skip(f"{needed} is not installed here, or older than {oldest}")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("distpro", "pathways"):
        for path in (ROOT / name).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                copy = source / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--quiet", "-w", folder]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_packages_and_the_license(unpacked):
    for name in ("distpro", "pathways"):
        shipped = {
            p.relative_to(ROOT) for p in (ROOT / name).rglob("*") if p.is_file() and "__pycache__" not in p.parts
        }
        assert shipped == {p.relative_to(unpacked) for p in (unpacked / name).rglob("*") if p.is_file()}
    (license,) = unpacked.glob("*.dist-info/licenses/LICENSE")
    assert license.read_text() == (ROOT / "LICENSE").read_text()
    (facts,) = unpacked.glob("*.dist-info/METADATA")
    assert "License-Expression: MIT" in facts.read_text()


@pytest.mark.slow
def test_the_wheel_works_without_the_repository(unpacked, tmp_path):
    def distpro_says(*arguments):
        command = [sys.executable, "-m", "distpro", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(unpacked), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (facts,) = unpacked.glob("*.dist-info")
    assert distpro_says("--version") == f"distpro {facts.name.split('-')[1].removesuffix('.dist')}\n"
    assert "Relational" in distpro_says("list", "losses")
    assert distpro_says("list", "presets").split() == ["default", "default_depth", "paper", "paper_imagenet"]
    assert "wrote digits.yaml" in distpro_says("init", "digits")
    where = "import distpro, pathways; print(distpro.__file__, pathways.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    said = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert said.stdout.split() == [str(unpacked / name / "__init__.py") for name in ("distpro", "pathways")]
