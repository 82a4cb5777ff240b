"""What a config may say, and how mistakes are answered."""

import shlex

import pytest

from distpro.config.reading import read_config
from distpro.schedule import REDUCTIONS
from pathways.registry import UserError
from tests.config import STUDENT, message_of


@pytest.mark.parametrize(
    ("text", "key", "meant", "allowed"),
    [
        ("trainning: {}", "'trainning'", "'training'", "tracking"),
        ("training: {epoch: 3}", "'training.epoch'", "'epochs'", "max_steps"),
        ("training: {optimizer: {momentm: 0.9}}", "'training.optimizer.momentm'", "'momentum'", "nesterov"),
        ("terms: [{loss: kd}, {loss: kd, wieght: 2}]", "'terms.1.wieght'", "'weight'", "teacher_taps"),
        ("teacher: {model: resnet8, chekpoint: a.pt}", "'teacher.chekpoint'", "'checkpoint'", "taps"),
        ("pathways: {transfroms: [conv1x1]}", "'pathways.transfroms'", "'transforms'", "distance"),
        ("retrain: {training: {epcohs: 3}}", "'training.epcohs'", "'epochs'", "max_steps"),
    ],
)
def test_an_unknown_key_names_file_key_nearest_and_allowed(write, text, key, meant, allowed):
    path = write(STUDENT + text)
    message = message_of(path)
    assert message.startswith(str(path))
    assert f"unknown key {key}; did you mean {meant}?" in message
    assert allowed in message.split("allowed here: ")[1]
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("training: {epochs: 0}", ("'training.epochs' is 0", "greater than 0")),
        ("training: {epochs: many}", ("'training.epochs' is 'many'", "valid integer")),
        ("training: {epochs: 1.5}", ("'training.epochs' is 1.5", "valid integer")),
        ("training: {optimizer: {momentum: 1}}", ("'training.optimizer.momentum' is 1", "less than 1")),
        ("precision: bfloat", ("'precision' is 'bfloat'", "'float32'", "did you mean 'bfloat16'?")),
        ("terms: {loss: kd}", ("'terms' is {'loss': 'kd'}", "valid list")),
        ("terms: [{loss: kd, weight: high}]", ("'terms.0.weight' is 'high'", "valid number", "'learned'", "mapping")),
        (
            "terms: [{loss: kd, weight: {schedule: totl}}]",
            ("'terms.0.weight'", "reduction 'totl'", "did you mean 'total'?", "connection"),
        ),
        (
            "terms: [{loss: kd, weight: {lineer: {initial: 1, final: 0}}}]",
            ("'terms.0.weight'", "process 'lineer'", "did you mean 'linear'?", "cosine"),
        ),
        (
            "terms: [{loss: kd, weight: {linear: {initial: 1, final: 0, by: epochs}}}]",
            ("'terms.0.weight'", "'epochs'", "did you mean 'epoch'?", "fraction"),
        ),
        ("task_weight: {step: {valeu: 1}}", ("'task_weight'", "'valeu'", "did you mean 'value'?")),
        ("task_weight: {cosine: 3}", ("'task_weight'", "'cosine' needs its parameters as a mapping", "3")),
        (
            "teacher: {model: resnet8}\nteachers: {a: {model: resnet8}}",
            ("teacher and teachers exclude each other",),
        ),
        ("teacher: resnet56", ("'teacher' is 'resnet56'", "valid mapping")),
        ("data: {image_shape: [3, 32]}", ("'data.image_shape.2' is missing",)),
        ("data: {classes: 1.5}", ("'data.classes' is 1.5", "valid integer", "valid list")),
        ("1: 2", ("'1' is 2", "keys should be strings")),
    ],
)
def test_a_wrong_value_is_one_line_with_key_value_and_rule(write, text, parts):
    path = write(STUDENT + text)
    message = message_of(path)
    assert message.startswith(f"{path}: ")
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_several_mistakes_are_named_together(write):
    lines = message_of(write(STUDENT + "seed: -1\nthreads: 0\nextra: 1")).splitlines()
    assert sorted(line.split("'")[1] for line in lines) == ["extra", "seed", "threads"]


def test_a_missing_student_is_named(write):
    assert "'student' is missing" in message_of(write("seed: 1"))


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("training.epochs", "expected key=value"),
        ("=3", "expected key=value"),
        ("training.epochs=[1", "not valid YAML"),
        ("training.epoch=1", "unknown key 'training.epoch'; did you mean 'epochs'?"),
        ("training.epochs.x=1", "'training.epochs' is {'x': 1}"),
    ],
)
def test_a_bad_override_is_named(override, part):
    assert part in message_of({"student": {"model": "resnet8"}}, override)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("seed: 1\ntraining: {epochs: 3\n", "line 3: not valid YAML"),
        ("seed: 1\nteacher: !!python/object/apply:os.getcwd []\n", "line 2: not valid YAML"),
        ("seed: 1\nstudent: {model: resnet8}\nseed: 2\n", "line 3: duplicate key 'seed'"),
        ("student: {model: resnet8}\nseed: 010\n", "line 2: YAML reads 010 as 8; write that, or put it in quotes"),
        ("student: {model: resnet8}\nseed: 1:30\n", "line 2: YAML reads 1:30 as 90"),
        (
            "student: {model: resnet8}\ndata: {params: {off: 1}}\n",
            "line 2: YAML reads the key 'off' as False; put it in quotes",
        ),
        ("student:\n  model: resnet8\nterms:\n- {loss: kd,\n   loss: at}\n", "line 5: duplicate key 'loss'"),
        ("student: {model: resnet8, weight: 2}", "student.weight: only a teacher has one"),
        ("student: {model: resnet8, input: {mean: [0], std: [1]}}", "student.input: only a teacher has one"),
        ("seed: &a [*a]\n", "an alias leads back to itself"),
        ("- seed", "a config is a mapping"),
        ("", "a config is a mapping"),
    ],
)
def test_a_file_that_is_no_config(write, text, part):
    path = write(text)
    message = message_of(path)
    assert message.startswith(str(path))
    assert part in message


def test_merge_keys_and_aliases_may_repeat(write):
    path = write("student: &s {model: resnet8, params: {}}\nteacher: {<<: *s, model: resnet14}\n")
    assert read_config(path).teacher.model == "resnet14"


def test_a_binary_file_is_no_config(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"PK\x03\x04\xff\xfe")
    assert "not a text file" in message_of(tmp_path / "weights.pt")


def test_a_missing_file_names_the_nearest_one(write, tmp_path):
    write(STUDENT, "cifar10.yaml")
    assert "no such config file; did you mean 'cifar10.yaml'?" in message_of(tmp_path / "cifar01.yaml")
    assert "no such config file" in message_of(tmp_path / "nowhere" / "a.yaml")
    assert "is a folder; a config is one YAML file" in message_of(tmp_path)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (
            "preset: papr",
            "unknown preset 'papr'; did you mean 'paper'? (allowed: default, default_depth, paper, paper_imagenet)",
        ),
        ("preset: [paper]", "unknown preset"),
        ("base: rum.yaml", "rum.yaml: no such config file; did you mean 'run.yaml'?"),
        ("base: [a.yaml]", "expected the path of one YAML file"),
        ("base: run.yaml", "leads back to itself"),
        ("base: other.yaml", "leads back to itself"),
    ],
)
def test_a_bad_preset_or_base(write, text, part):
    write("base: run.yaml", "other.yaml")
    assert part in message_of(write(STUDENT + text))


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("learning_rate=0.1", "'training.optimizer.lr'"),
        ("training.learning_rate=0.1", "'training.optimizer.lr'"),
        ("lr=0.1", "'training.optimizer.lr'"),
        ("momentm=0.1", "'training.optimizer.momentum' or 'search.momentum'"),
        ("epochs=3", "'training.epochs' or 'tune.epochs'"),
        ("lambda=3", "'training.distill_weight'"),
        ("data.batch_size=3", "'training.batch_size'"),
    ],
)
def test_a_key_of_another_section_is_found(write, override, meant):
    message = message_of(write(STUDENT), override)
    assert f"did you mean {meant}?" in message and "\n" not in message


def test_a_mapping_is_a_config_too_and_stays_as_it_is():
    source = {"preset": "paper", "student": {"model": "resnet8"}}
    assert read_config(source, ["seed=3"]).training.epochs == 40
    assert source == {"preset": "paper", "student": {"model": "resnet8"}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("-2E+1", -20.0),
        ("1.5e-3", 0.0015),
        ("3", 3),
        ("true", True),
        ("e3", "e3"),
        ("[1e-3]", [0.001]),
    ],
)
def test_values_are_yaml_and_scientific_numbers_need_no_point(text, value):
    config = read_config({"student": {"model": "m"}}, [f"student.params.x={text}"])
    assert config.student.params["x"] == value


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_term_may_follow_every_reduction_of_a_schedule(reduction):
    given = {"student": {"model": "resnet8"}, "terms": [{"loss": "kd", "weight": {"schedule": reduction}}]}
    assert read_config(given).terms[0].weight == {"schedule": reduction}


def test_a_config_survives_its_own_dump(write):
    config = read_config(write(STUDENT + "preset: paper\nterms: [{loss: kd, weight: {schedule: total}}]"))
    assert read_config(config.model_dump()) == config


def test_what_is_said_for_an_entry_of_a_list_does_what_was_meant(write):
    """The override that the message gives, taken from it, changes that entry alone."""
    path = write(
        STUDENT + "terms: [{loss: kd}, {loss: at, connect: same}]\ndata: {augment: [{crop: {padding: 1}}, flip]}\n"
    )
    for override in ("terms.1.weight=3", "data.augment.0.crop.padding=3"):
        said = message_of(path, override)
        assert "entries of a list cannot be set one by one: give the whole list, " in said
        (whole,) = shlex.split(said.partition("the whole list, ")[2])
        before, after = read_config(path), read_config(path, [whole])
        if override.startswith("terms"):
            assert after.terms[1].weight == 3 and after.terms[1].connect == "same" and after.terms[0] == before.terms[0]
            assert after.data == before.data
        else:
            assert after.data.augment == [{"crop": {"padding": 3}}, "flip"] and after.terms == before.terms
    assert "terms=[...]" in message_of(path, "terms.2.weight=3")
    assert "terms=[...]" in message_of(write(STUDENT), "terms.0.weight=3")


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("training.optimizer=sgd", "did you mean 'training.optimizer.name'?"),
        ("training.learning_rate=cosine", "did you mean 'training.learning_rate.name'?"),
        ("training.learning_rate=0.1", "did you mean 'training.optimizer.lr'?"),
        ("student=resnet8", "did you mean 'student.model'?"),
        ("cache=true", r"\(of folder\)"),
    ],
)
def test_a_value_where_a_section_is_meant(said, meant):
    with pytest.raises(UserError, match=f"input should be a valid mapping.*{meant}"):
        read_config({"student": {"model": "resnet8"}}, [said])
