"""Numbers in configs: YAML takes some for text, and some are none."""

import pytest

from distpro.config.reading import read_config
from pathways.registry import UserError

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
