"""Recipes of several trainings in one config: what each takes over, runs, leaves, and resumes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import distpro
from distpro.build.carry import Carry
from distpro.build.data import build_data
from distpro.build.runs import build_retrain
from distpro.config.reading import merge, read_config
from distpro.config.stages import stages_of
from distpro.files import load_safely
from distpro.train.trainer import Interrupted, Trainer
from pathways import UserError
from tests.digits import settings

pytestmark = pytest.mark.slow

HINT = {
    "name": "hint",
    "task_weight": 0,
    "training": {"epochs": 2},
    "terms": [{"loss": "hint", "weight": 1, "student_taps": ["layer2"], "teacher_taps": ["layer2"]}],
}
KD = {"name": "kd", "task_weight": 0.1, "training": {"epochs": 1}, "terms": [{"loss": "kd", "weight": 0.9}]}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    content = merge(settings(), {"student": {"model": "resnet14"}, "training": {"epochs": 1}})
    distpro.train(content, out=folder / "run")
    return folder / "run" / "student.pt"


def recipe(teacher, *stages, **changes):
    plain = {"pathways": None, "terms": [], "retrain": {"weights": "constant"}, "stages": list(stages)}
    return merge(merge(settings(teacher), plain), changes)


def test_a_stage_says_only_what_is_different(teacher):
    one, two = stages_of(read_config(recipe(teacher, HINT, KD)))
    assert (one.name, two.name) == ("1_hint", "2_kd")
    assert (one.config.training.epochs, two.config.training.epochs) == (2, 1)
    assert one.config.training.batch_size == two.config.training.batch_size == 20
    assert [t.loss for t in one.config.terms + two.config.terms] == ["hint", "kd"]
    assert one.config.task_weight == 0 and two.config.task_weight == 0.1
    assert not one.config.stages and not two.fresh and not two.previous_teaches
    with_freeze = stages_of(read_config(recipe(teacher, {"freeze": ["conv1"]}, KD)))
    assert with_freeze[1].config.freeze == ["conv1"]  # the rest comes from the stage before, not from the top


def test_a_config_without_stages_is_one(teacher):
    config = read_config(settings(teacher))
    assert [(s.name, s.config) for s in stages_of(config)] == [("", config)]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"trainning": {}}], r"stages.0 \(stage1\): unknown key 'trainning'; did you mean 'training'"),
        (
            [HINT, {"name": "b", "terms": [{"loss": "kd", "wieght": 1}]}],
            r"stages.1 \(b\): unknown key 'terms.0.wieght'",
        ),
        ([{"teacher": "previous"}], r"stages.0 \(stage1\): teacher is 'previous', but there is no stage before"),
        ([{"name": "../x"}], "letters, digits"),
        ([{"stages": []}], "no stages, base or preset of its own"),
        ([{"terms": [], "task_weight": 0}], "nothing to train"),
    ],
)
def test_mistakes_name_the_stage(teacher, stages, message):
    with pytest.raises(UserError, match=message):
        distpro.retrain(recipe(teacher, *stages))


def test_hints_then_distillation(teacher, tmp_path):
    result = distpro.retrain(recipe(teacher, HINT, KD), out=tmp_path / "run")
    first, second = tmp_path / "run" / "1_hint", tmp_path / "run" / "2_kd"
    assert result.metrics == json.loads((tmp_path / "run" / "result.json").read_text())
    assert result.metrics == json.loads((second / "result.json").read_text())
    hinted, final = load_safely(first / "student.pt"), load_safely(second / "student.pt")
    start = load_safely_start(recipe(teacher, HINT, KD))
    moved = {name for name, value in hinted.items() if not torch.equal(value, start[name])}
    assert any(name.startswith("layer2") for name in moved)
    assert not any(name.startswith(("layer3", "fc")) for name in moved)  # behind the hint nothing has run
    assert load_safely(tmp_path / "run" / "student.pt").keys() == final.keys()
    assert all(torch.equal(v, final[k]) for k, v in load_safely(tmp_path / "run" / "student.pt").items())
    assert distpro.evaluate(tmp_path / "run")["accuracy"] == pytest.approx(result.metrics["accuracy"], abs=1e-3)


def load_safely_start(content):
    """The first stage's student before its first step."""
    config = stages_of(read_config(content))[0].config
    trainer = build_retrain(config, build_data(config), None)
    return {name: value.clone() for name, value in trainer.objective.student.model.state_dict().items()}


def test_the_second_stage_goes_on_from_the_first(teacher, monkeypatch):
    """By hand: the same two trainings, the weights carried over in between."""
    content = recipe(teacher, HINT, KD)
    staged = distpro.retrain(content).metrics
    one, two = (stage.config for stage in stages_of(read_config(content)))
    data = build_data(one)
    trainer = build_retrain(one, data, None)
    trainer.fit()
    second = build_retrain(two, data, None, carry=Carry(trainer.objective.student.model.state_dict()))
    by_hand = second.fit()
    assert {k: v for k, v in staged.items() if k != "seconds"} == {k: v for k, v in by_hand.items() if k != "seconds"}


def test_a_pruned_stage_is_the_whole_one(teacher, monkeypatch):
    """Identical losses, and less that runs: nothing behind the hint, in neither model."""
    found = []
    for prune in (True, False):
        rows, objectives = [], []

        def record(self, values, rows=rows, objectives=objectives):
            rows.append(values)
            objectives.append(self.objective)

        monkeypatch.setattr(Trainer, "_record", record)
        distpro.retrain(recipe(teacher, HINT, prune=prune))
        found.append(([row["term/hint"] for row in rows if "term/hint" in row], objectives[0]))
        assert not any("train/task_loss" in row for row in rows)
    (pruned, part), (whole, all_of_it) = found
    assert pruned == whole and len(pruned) > 2 and pruned[-1] < pruned[0]
    for model in ("student", "teacher"):
        ran, everything = (set(getattr(o, model).modules_run) for o in (part, all_of_it))
        assert (
            {name for name in everything - ran if name.startswith(("layer3", "pool", "fc"))}
            == everything - ran
            != set()
        )


def test_a_paraphraser_learns_first_and_stays(teacher, tmp_path):
    """FT: the first stage trains the teacher's autoencoder and never runs the student; the second stage takes it over,
    by the term's key, and leaves it alone."""
    first = {
        "name": "paraphrase",
        "task_weight": 0,
        "terms": [{"loss": "ft", "weight": 1, "pretrain": True}],
        "training": {"epochs": 6, "optimizer": {"name": "adam", "lr": 0.001}},
    }
    second = {"name": "transfer", "task_weight": 1, "terms": [{"loss": "ft", "weight": 200}], "training": {"epochs": 1}}
    distpro.retrain(recipe(teacher, first, second), out=tmp_path / "run")
    one, two = (load_safely(tmp_path / "run" / name / "terms.pt")["ft"] for name in ("1_paraphrase", "2_transfer"))
    assert all(torch.equal(one[n], two[n]) for n in one if n.startswith("paraphraser"))
    assert not all(torch.equal(one[n], two[n]) for n in one if n.startswith("translator"))
    start = load_safely_start(recipe(teacher, first, second))
    kept = load_safely(tmp_path / "run" / "1_paraphrase" / "student.pt")
    assert all(torch.equal(value, kept[name]) for name, value in start.items())
    rows = [json.loads(line) for line in (tmp_path / "run" / "1_paraphrase" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["term/ft"] for row in rows if "term/ft" in row]
    assert losses[-1] < 0.5 * losses[0]


def test_generations(teacher, tmp_path):
    """Born-Again Networks: each generation is new and learns from the one before."""
    born = {"name": "again", "teacher": "previous", "fresh": True, "seed": 1}
    distpro.retrain(recipe(teacher, KD, born, {**born, "name": "third", "seed": 2}), out=tmp_path / "run")
    folders = [tmp_path / "run" / name for name in ("1_kd", "2_again", "3_third")]
    configs = [read_config(folder / "config.yaml") for folder in folders]
    assert [config.seed for config in configs] == [0, 1, 2]
    assert configs[1].teacher.checkpoint == str(folders[0] / "student.pt")  # the run can be repeated from its folder
    assert configs[2].teacher.model == "resnet8"
    again = distpro.retrain(folders[2] / "config.yaml")
    assert again.metrics["accuracy"] == json.loads((folders[2] / "result.json").read_text())["accuracy"]


def test_an_assistant_in_between(teacher, tmp_path):
    assistant = {"name": "assistant", "student": {"model": "resnet14"}, **{k: v for k, v in KD.items() if k != "name"}}
    student = {"name": "student", "teacher": "previous", "student": {"model": "resnet8"}}
    stages = stages_of(read_config(recipe(teacher, assistant, student)))
    assert stages[1].fresh and stages[1].previous_teaches and stages[1].config.teacher.model == "resnet14"
    distpro.retrain(recipe(teacher, assistant, student), out=tmp_path / "run")
    assert distpro.evaluate(tmp_path / "run")["accuracy"] > 0


def test_frozen_parts_do_not_move(teacher, tmp_path):
    content = recipe(teacher, {**KD, "freeze": ["conv1", "bn1", "layer1"]})
    start = load_safely_start(content)
    distpro.retrain(content, out=tmp_path / "run")
    after = load_safely(tmp_path / "run" / "student.pt")
    frozen = [name for name in start if name.startswith(("conv1", "bn1", "layer1"))]
    assert frozen and all(torch.equal(start[name], after[name]) for name in frozen)  # running statistics too
    assert not any(torch.equal(start[n], after[n]) for n in start if n.startswith("layer2") and n.endswith("weight"))
    with pytest.raises(UserError, match="no module 'layer9'"):
        distpro.retrain(recipe(teacher, {**KD, "freeze": ["layer9"]}))


def test_a_resumed_recipe_remembers_the_terms_of_all_stages(teacher, tmp_path):
    """The third stage uses what the first has trained, also when both earlier ones had ended before."""
    first = {"name": "a", "task_weight": 0, "terms": [{"loss": "ft", "weight": 1, "pretrain": True}]}
    third = {"name": "c", "task_weight": 0, "terms": [{"loss": "ft", "weight": 1}]}
    content = recipe(teacher, first, {**KD, "name": "b"}, third, training={"epochs": 1})
    distpro.retrain(content, out=tmp_path / "run")
    before = load_safely(tmp_path / "run" / "student.pt")
    shutil.rmtree(tmp_path / "run" / "3_c")
    distpro.retrain(content, out=tmp_path / "run", resume=True)
    after = load_safely(tmp_path / "run" / "student.pt")
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("stop", [2, 12])
def test_a_recipe_resumes_in_any_stage(teacher, tmp_path, monkeypatch, stop):
    """Stopped in its first or its second stage (10 steps, then 5), it comes to the same numbers."""
    content = recipe(teacher, HINT, KD)
    distpro.retrain(content, out=tmp_path / "whole")
    steps = []
    plain = Trainer.train_step

    def counting(self, batch):
        plain(self, batch)
        steps.append(self.step)
        if len(steps) == stop:
            self._stop.number = 15

    monkeypatch.setattr(Trainer, "train_step", counting)
    with pytest.raises(Interrupted):
        distpro.retrain(content, out=tmp_path / "run")
    distpro.retrain(content, out=tmp_path / "run", resume=True)
    assert len(steps) == 15
    for name in ("1_hint", "2_kd", "."):
        ours, whole = (load_safely(tmp_path / run / name / "student.pt") for run in ("run", "whole"))
        assert all(torch.equal(value, ours[key]) for key, value in whole.items())


def test_a_finished_recipe_is_not_run_over(teacher, tmp_path):
    content = recipe(teacher, KD)
    distpro.retrain(content, out=tmp_path / "run")
    with pytest.raises(UserError, match="holds a run already; continue it with --resume"):
        distpro.retrain(content, out=tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "1_kd")
    distpro.retrain(content, out=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "1_kd" / "student.pt").is_file()


def test_a_search_has_no_stages(teacher):
    with pytest.raises(UserError, match="a search is one training"):
        distpro.search(merge(settings(teacher), {"stages": [KD]}))
