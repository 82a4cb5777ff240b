"""What a config may say, what wins where files disagree, and how mistakes are answered."""

import os
import shlex

import pytest

from distpro.config.reading import default_space, for_retrain, merge, presets, read_config
from distpro.config.schema import Config, SearchConfig
from distpro.runs.commands import retrain_config
from distpro.schedule import REDUCTIONS
from pathways.registry import UserError

STUDENT = "student: {model: resnet8}\n"


@pytest.fixture
def write(tmp_path):
    def to_file(text, name="run.yaml"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return to_file


def message_of(source, *overrides):
    with pytest.raises(UserError) as error:
        read_config(source, overrides)
    return str(error.value)


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


# Precedence


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


# Stages


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


def test_a_config_survives_its_own_dump(write):
    config = read_config(write(STUDENT + "preset: paper\nterms: [{loss: kd, weight: {schedule: total}}]"))
    assert read_config(config.model_dump()) == config


@pytest.mark.parametrize("name", presets())
def test_every_preset_is_a_valid_config(name):
    config = read_config({"preset": name, "student": {"model": "resnet8"}})
    assert config != Config(student={"model": "resnet8"})
    if not name.startswith("default"):
        assert for_retrain(config).training.epochs > config.training.epochs


def test_a_search_without_a_space_takes_the_default_one():
    """One that names pathways, terms, or neither of them in so many words (null) does not."""
    pair = {"teacher": {"model": "resnet20"}, "student": {"model": "resnet8"}}
    config = read_config(pair, space=default_space)
    assert config.pathways.connect == "matched" and len(config.terms) == 6
    assert config.search.horizon == 0.25 and config.search.weighting == "log" and config.retrain.start == 1
    assert read_config(pair).pathways is None and not read_config(pair).terms
    assert not read_config({**pair, "pathways": {"connect": "same"}}, space=default_space).terms
    assert read_config({**pair, "pathways": None, "terms": [{"loss": "kd"}]}, space=default_space).search.horizon == 1
    own = read_config({**pair, "search": {"horizon": 7}}, space=default_space)
    assert own.search.horizon == 7 and len(own.terms) == 6
    for task in ("depth", {"depth": {}}, {"name": "depth"}):  # of a regression nothing compares classes
        config = read_config({**pair, "task": task}, space=default_space)
        assert [term.loss for term in config.terms] == ["l1", "at"] and config.search.horizon == 0.25


@pytest.mark.parametrize(
    ("search", "trials", "rounds"),
    [
        ({"budget": 30}, 9, 0),
        ({"budget": 10.5}, 6, 0),
        ({"budget": 4}, 0, 0),
        ({"budget": 40, "rounds": 9}, 9, 5),  # 5 for the start, 2 to judge it, 6 for each round
        ({"budget": 40, "rounds": 2}, 9, 2),
    ],
)
def test_a_budget_cuts_trials_and_rounds_down(search, trials, rounds):
    found = SearchConfig(**{"horizon": 0.25, **search})
    assert (found.trials, found.rounds) == (trials, rounds)
    assert SearchConfig(**found.model_dump()) == found
    costs = found.most_trials + 4 * max(1, found.rounds)
    assert costs <= found.budget


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"budget": 3}, "a pass alone costs 4"),
        ({"budget": 12, "rounds": 3}, "a round and its judgement cost 6 trainings, after 7"),
        ({"budget": 12, "horizon": 1}, "for a longer search.horizon"),
    ],
)
def test_a_budget_that_is_too_small(search, said):
    with pytest.raises(UserError, match=said):
        read_config({"student": {"model": "resnet8"}, "search": {"horizon": 0.25, **search}})


@pytest.mark.parametrize("horizon", [0, -3, 1.5, 0.0, "all"])
def test_a_horizon_is_steps_a_fraction_or_whole(horizon):
    with pytest.raises(UserError, match="horizon"):
        read_config({"student": {"model": "resnet8"}, "search": {"horizon": horizon}})


def test_a_horizon_in_steps():
    steps = [SearchConfig(horizon=h).steps_back(48) for h in (1, 12, 0.25, "whole", 100, 0.001)]
    assert steps == [1, 12, 12, 48, 48, 1]


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


NO_NUMBERS = {  # override → the key that the message names
    "terms=[{loss: kd, weight: %s}]": "terms.0.weight",
    "terms=[{loss: kd, weight: {linear: {initial: %s, final: 0}}}]": "terms.0.weight",
    "terms=[{loss: kd, weight: {linear: {initial: 1, final: 0, end: %s}}}]": "terms.0.weight",
    "terms=[{loss: kd, weight: {step: {value: 1, milestones: [0.1, %s]}}}]": "terms.0.weight",
    "task_weight=%s": "task_weight",
    "task_weight={constant: {value: %s}}": "task_weight",
    "pathways={weight: %s}": "pathways.weight",
    "teacher={model: resnet8, weight: %s}": "teacher.weight",
    "teacher={model: resnet8, input: {mean: [%s], std: [1]}}": "teacher.input.mean",
    "training.distill_weight=%s": "training.distill_weight",
    "training.optimizer.lr=%s": "training.optimizer.lr",
    "training.optimizer.betas=[0.9, %s]": "training.optimizer.betas",
    "training.learning_rate.milestones=[%s]": "training.learning_rate.milestones",
    "training.clip_norm=%s": "training.clip_norm",
    "training.epochs=%s": "training.epochs",
    "data.mean=[%s]": "data.mean",
    "data.samples=%s": "data.samples",
    "search.threshold=%s": "search.threshold",
    "search.betas=[%s, 0.9]": "search.betas",
    "retrain.training={epochs: %s}": "epochs",
    "seed=%s": "seed",
}


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf", "yes", "off"])
@pytest.mark.parametrize("override", NO_NUMBERS)
def test_what_is_no_number_is_refused_for_every_number(override, number):
    with pytest.raises(UserError) as error:
        read_config({"student": {"model": "resnet8"}}, [override % number])
    said = str(error.value)
    assert (
        NO_NUMBERS[override] in said
        and ("number, found" in said or "is True, expected float" in said or "is False, expected float" in said)
        and len(said.splitlines()) == 1
    )


def test_infinite_parameters_are_refused_and_truth_values_are_their_owners_affair():
    with pytest.raises(UserError, match="'terms.0.params': temperature: expected a finite number, found nan"):
        read_config({"student": {"model": "resnet8"}}, ["terms=[{loss: kd, params: {temperature: .nan}}]"])
    said = read_config(
        {"student": {"model": "resnet8"}}, ["student.params={pretrained: yes}", "training.drop_last=yes"]
    )
    assert said.student.params == {"pretrained": True} and said.training.drop_last is True


@pytest.mark.parametrize(
    ("text", "number"),
    [("2.5e1", 25.0), ("1e-3", 1e-3), ("1E3", 1e3), (".5e1", 5.0), ("1.e+2", 100.0), ("+2.5e1", 25.0)],
)
def test_numbers_that_yaml_takes_for_text(text, number):
    said = read_config(
        {"student": {"model": "resnet8"}},
        [
            f"training.optimizer.lr={text}",
            f"terms=[{{loss: kd, weight: {text}, params: {{temperature: {text}, moved: [{text}]}}}}]",
            f"task_weight={{linear: {{initial: {text}, final: 0}}}}",
        ],
    )
    assert said.training.optimizer.lr == said.terms[0].weight == number
    assert said.terms[0].params == {"temperature": number, "moved": [number]}
    assert said.task_weight == {"linear": {"initial": number, "final": 0}}


@pytest.mark.parametrize("text", ["e5", "1e", "1e5x", "v1e5", "1.2.3e4"])
def test_words_that_look_like_numbers_stay_words(text):
    assert read_config({"student": {"model": "resnet8"}}, [f"name={text}"]).name == text


@pytest.mark.parametrize(
    ("search", "samples", "share"),
    [
        ({}, 300, 0.2),
        ({"horizon": 10}, 300, 0.5),
        ({"horizon": 10}, 500, 0.4),
        ({"horizon": "whole"}, 5000, 0.2),
        ({"horizon": 10, "validation_fraction": 0.1}, 300, 0.1),
    ],
)
def test_few_samples_leave_more_of_them_to_judge_by(search, samples, share):
    config = read_config({"student": {"model": "resnet8"}, "search": search})
    assert config.search.fraction_of(samples) == share


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
