"""What wins where the command line, a file, its bases and presets disagree."""

import os

import pytest

from distpro.config.reading import for_retrain, merge, presets, read_config
from distpro.config.schema import Config
from distpro.runs.commands import retrain_config
from tests.config import STUDENT, message_of


def test_override_beats_file_beats_base_beats_preset(write):
    write(
        "preset: paper\nstudent: {model: resnet8, params: {shortcut: zero_pad}}\n"
        "training: {batch_size: 96, optimizer: {lr: 0.05}, clip_norm: 1}\nsearch: {repeats: false}\n",
        "base/common.yaml",
    )
    path = write("base: base/common.yaml\ntraining: {batch_size: 64, optimizer: {weight_decay: 0}}\n")
    config = read_config(path, ["training.batch_size=32", "student.model=resnet20"])
    assert config.training.batch_size == 32  # override
    assert config.training.optimizer.weight_decay == 0  # file
    assert (config.training.optimizer.lr, config.training.clip_norm) == (0.05, 1)  # base
    assert config.training.epochs == 40 and config.training.learning_rate.milestones == [10, 20, 30]  # preset
    assert config.search.repeats is False and config.search.estimator == {"finite_difference": {"epsilon": 0.01}}
    assert config.student.model == "resnet20" and config.student.params == {"shortcut": "zero_pad"}


def test_a_base_is_looked_for_beside_the_file_that_names_it(write, tmp_path, monkeypatch):
    write(STUDENT + "seed: 7", "base/inner.yaml")
    write("base: inner.yaml", "base/outer.yaml")
    monkeypatch.chdir(os.sep)
    assert read_config(write("base: base/outer.yaml")).seed == 7


def test_null_takes_a_section_of_the_base_away(write):
    write(STUDENT + "pathways: {connect: all}", "base.yaml")
    assert read_config(write("base: base.yaml")).pathways is not None
    assert read_config(write("base: base.yaml\npathways: null")).pathways is None


def test_null_takes_the_parameters_of_another_model_away(write):
    write("student: {model: resnet20, params: {shortcut: projection}}", "base.yaml")
    path = write("base: base.yaml\nstudent: {model: mobilenet_v2, params: null}")
    assert read_config(path).student.params == {}
    assert read_config(path, ["student.params.width=1"]).student.params == {"width": 1}


def test_null_takes_one_of_several_teachers_of_the_base_away(write):
    write(STUDENT + "teachers: {a: {model: resnet14}, b: {model: resnet20}}", "base.yaml")
    config = read_config(write("base: base.yaml\nteachers: {a: null, c: {model: resnet32}}"))
    assert {name: teacher.model for name, teacher in config.teachers.items()} == {"b": "resnet20", "c": "resnet32"}


def test_merge_is_deep_for_mappings_and_whole_for_lists():
    below = {"a": {"x": 1, "y": [1, 2]}, "b": 1}
    assert merge(below, {"a": {"y": [3]}, "b": {"c": 2}}) == {"a": {"x": 1, "y": [3]}, "b": {"c": 2}}
    assert below == {"a": {"x": 1, "y": [1, 2]}, "b": 1}


def test_an_empty_mapping_clears(write):
    base = write("student: {model: wrn, params: {depth: 16, widen_factor: 1}}\n", "base.yaml")
    assert read_config(base, ["student.params={}"]).student.params == {}
    assert read_config(write("base: base.yaml\nstudent: {params: {}}\n")).student.params == {}
    assert read_config(base, ["student.params={depth: 40}"]).student.params == {"depth": 40, "widen_factor": 1}


def test_an_empty_section_leaves_a_schedule_and_a_space_what_they_say():
    source = {"student": {"model": "resnet8"}, "training": {}, "search": {}}
    below = {"training": {"distill_weight": 3.0}}
    config = read_config(source, below=below, space={"terms": [{"loss": "kd"}], "search": {"horizon": 0.25}})
    assert (config.training.distill_weight, config.search.horizon) == (3.0, 0.25)


def test_a_preset_on_the_command_line_is_that_of_the_file(write):
    base = write(STUDENT + "preset: default\ntraining: {epochs: 3}\n", "base.yaml")
    said, written = read_config(base, ["preset=paper", "seed=2"]), STUDENT + "preset: paper\ntraining: {epochs: 3}\n"
    assert said == read_config(write(written), ["seed=2"])
    assert said.training.epochs == 3 and said.search.repeats and said.precision == "float32"
    assert read_config(base, ["preset=null"]) == read_config(write(STUDENT + "training: {epochs: 3}\n"))
    assert "did you mean 'paper'?" in message_of(base, "preset=papr")
    assert "preset=paper would change nothing" in message_of(said.model_dump(), "preset=paper")


def test_for_retrain_merges_what_is_different_there(write):
    path = write(
        STUDENT + "training: {epochs: 40, optimizer: {lr: 0.2, momentum: 0.8}}\n"
        "retrain: {weights: equal, training: {epochs: 240, optimizer: {lr: 0.1}}}\n"
    )
    config = read_config(path)
    retrain = for_retrain(config)
    assert config.training.epochs == 40
    assert (retrain.training.epochs, retrain.training.optimizer.lr) == (240, 0.1)
    assert retrain.training.optimizer.momentum == 0.8 and retrain.retrain.weights == "equal"
    assert for_retrain(retrain) == retrain


@pytest.mark.parametrize(
    ("said", "epochs"),
    [
        ([], 240),
        (["training.epochs=2"], 2),
        (["training={epochs: 2}"], 2),
        (["training.epochs=2", "retrain.training.epochs=3"], 3),
        (["retrain.training.epochs=3", "training.epochs=2"], 3),
    ],
)
def test_the_command_line_of_a_retrain_goes_before_what_its_config_says_of_retrains(write, said, epochs):
    path = write(STUDENT + "training: {epochs: 40}\nretrain: {weights: none, training: {epochs: 240}}\n")
    assert retrain_config(path, None, said).training.epochs == epochs
    assert read_config(path, said[:1]).retrain.training["epochs"] in (240, 3)  # of a search it does not


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_a_valid_config(name):
    config = read_config({"preset": name, "student": {"model": "resnet8"}})
    assert config != Config(student={"model": "resnet8"})
    if not name.startswith("default"):
        assert for_retrain(config).training.epochs > config.training.epochs


def test_the_paper_preset_says_what_the_paper_says():
    """Section 4.1: 40 epochs, lr / 10 at 10, 20, 30; ReviewKD's 240 epochs with drops at 150, 180, 210; γ, g, τ."""
    config = read_config({"preset": "paper", "student": {"model": "resnet20"}})
    full = for_retrain(config)
    assert (config.training.epochs, full.training.epochs) == (40, 240)
    assert config.training.learning_rate.milestones == [10, 20, 30]
    assert full.training.learning_rate.milestones == [150, 180, 210]
    sgd = config.training.optimizer
    assert (config.training.batch_size, sgd.name, sgd.lr, sgd.momentum, sgd.nesterov, sgd.weight_decay) == (
        128,
        "sgd",
        0.1,
        0.9,
        True,
        5e-4,
    )
    assert (config.search.learning_rate, config.search.validation_fraction, config.retrain.threshold) == (
        0.05,
        0.2,
        0.5,
    )
    assert config.search.weighting == {"biased_softmax": {"g": 1.0}}
