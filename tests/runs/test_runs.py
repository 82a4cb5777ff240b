"""The commands as functions, on digits: what they leave behind, and the controls that one schedule serves."""

from __future__ import annotations

import json
import math
import platform
from importlib.metadata import version

import pytest
import torch
import yaml

import distpro
from distpro import build
from distpro.build.device import fastest_precision
from distpro.config.reading import merge, read_config
from distpro.data import Blank
from distpro.files import load_safely
from distpro.models import build_model
from distpro.schedule import Schedule
from distpro.train.tracking import read_metrics
from distpro.train.trainer import Trainer
from distpro.weights import replay
from pathways import UserError
from tests.digits import settings

pytestmark = pytest.mark.slow

CONTROLS = ["searched", "equal", "final", "constant", "none"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a trained teacher, a search with it, and a retrain with its schedule."""
    folder = tmp_path_factory.mktemp("runs")
    for_teacher = settings(changes={"data": {"samples": 400}, "student": {"model": "resnet14"}})
    distpro.train(for_teacher, out=folder / "teacher")
    distpro.search(searching(folder), out=folder / "search")
    distpro.retrain(schedule=folder / "search" / "alpha.pt", out=folder / "retrain")
    return folder


def searching(folder, changes=None):
    """Without normalisation, so that a schedule's weights are those of the training."""
    return settings(folder / "teacher" / "student.pt", merge({"search": {"normalise": "none"}}, changes or {}))


def schedule_of(runs):
    return Schedule.load(runs / "search" / "alpha.pt")


# Files


@pytest.mark.parametrize("run", ["teacher", "search", "retrain"])
def test_what_a_run_leaves(run, runs):
    folder, result = runs / run, json.loads((runs / run / "result.json").read_text())
    files = {"config.yaml", "environment.json", "metrics.jsonl", "result.json", "checkpoint.pt", "data.json"}
    files |= {"log.txt", "checkpoint.previous.pt"}
    assert {path.name for path in folder.iterdir()} == files | {"alpha.pt" if run == "search" else "student.pt"}
    config = read_config(folder / "config.yaml")
    assert config.retrain.weights == ("none" if run == "teacher" else "searched")
    assert config.seed == 0 and config.training.epochs == 3
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["packages"]["torch"] == version("torch")
    assert environment["python"] == platform.python_version()
    assert f"accuracy {result['accuracy']:.4g}" in (folder / "log.txt").read_text()
    last = read_metrics(folder)[-1]
    assert last["test/accuracy"] == result["accuracy"] and result["step"] == last["step"]
    assert result["best_accuracy"] >= result["accuracy"]


def test_the_config_of_a_run_repeats_it(runs, tmp_path):
    """To the same numbers."""
    again = distpro.search(runs / "search" / "config.yaml", out=tmp_path)
    assert torch.equal(again.weights, schedule_of(runs).weights)
    ours, theirs = (load_safely(folder / "checkpoint.pt")["student"] for folder in (tmp_path, runs / "search"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_without_a_folder_nothing_is_written(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    schedule = distpro.search(searching(runs))
    assert torch.equal(schedule.weights, schedule_of(runs).weights)
    result = distpro.retrain(searching(runs, {"training": {"max_steps": 1}}), schedule=schedule)
    assert result.folder is None and result.metrics["step"] == 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_begin_leaves_no_folder(runs, tmp_path):
    missing = searching(runs, {"teacher": {"checkpoint": "nowhere.pt"}})
    with pytest.raises(UserError, match="nowhere.pt"):
        distpro.search(missing, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_overrides_win(runs, tmp_path):
    schedule = distpro.search(searching(runs), out=tmp_path, overrides=["seed=3", "training.max_steps=2"])
    assert len(schedule) == 2 and schedule.meta["config"]["seed"] == 3
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["training"]["max_steps"] == 2


@pytest.mark.parametrize("native, chosen", [(True, "bfloat16"), (False, "float32")])
def test_automatic_precision_is_written_down(native, chosen, runs, tmp_path, monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: native, raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    short = {"precision": "auto", "training": {"max_steps": 2}}
    schedule = distpro.search(searching(runs, short), out=tmp_path / "search")
    distpro.retrain(searching(runs, short), schedule=schedule, out=tmp_path / "retrain")
    assert schedule.meta["config"]["precision"] == chosen
    assert yaml.safe_load((tmp_path / "retrain" / "config.yaml").read_text())["precision"] == chosen


def test_automatic_precision_on_gpus(monkeypatch):
    gpu = torch.device("cuda")
    for native, chosen in ((True, ["bfloat16", "bfloat16"]), (False, ["float16", "float32"])):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert [fastest_precision(gpu, searching) for searching in (False, True)] == chosen


# The schedule


def test_the_schedule_says_where_it_comes_from(runs):
    schedule = schedule_of(runs)
    assert schedule.keys == (*(f"layer{i}:pre_relu<-layer{i}@conv1x1" for i in (1, 2, 3)), "kd")
    assert schedule.levels.tolist() == [[1, 1, 1], [2, 2, 1], [3, 3, 1], [0, 0, 0]]
    assert schedule.weights.shape == schedule.alpha_tilde.shape == (12, 4)
    assert schedule.weights[0].tolist() == pytest.approx([1 / 5] * 4)
    exponentials = schedule.alpha_tilde.exp()
    assert torch.allclose(schedule.weights, exponentials / (exponentials.sum(1, True) + math.e))
    assert schedule.steps_per_epoch == 4
    meta = schedule.meta
    chosen = {"search": {"estimator": "forward_mode"}}  # what `auto` came to
    assert read_config(meta["config"]) == read_config(searching(runs, chosen))
    assert (meta["weighting"], meta["threshold"], meta["lambda"]) == ("biased_softmax", 0.5, 1.0)
    meaning = (schedule.reading, schedule.strength, schedule.warmup, schedule.threshold, schedule.start)
    assert meaning == ("biased_softmax", 1.0, 0.0, 0.5, 1 / 3) and schedule.scalars == {}
    for role, model in (("teacher", "resnet14"), ("student", "resnet8")):
        size = sum(p.numel() for p in build_model(model, num_classes=10).parameters())
        assert meta[role] == {"model": model, "parameters": size}
    assert meta["data"]["name"] == "digits" and meta["data"]["train"] == 100
    assert meta["versions"]["torch"] == version("torch")


# Retrain and its controls


def test_a_retrain_takes_the_schedules_own_config(runs):
    """On the whole training set: 5 steps an epoch, not the 4 of the search."""
    ours, theirs = (read_config(runs / run / "config.yaml") for run in ("retrain", "search"))
    assert ours.model_dump(exclude={"retrain"}) == theirs.model_dump(exclude={"retrain"})
    assert ours.retrain.schedule == str(runs / "search" / "alpha.pt")
    assert json.loads((runs / "retrain" / "result.json").read_text())["step"] == 15


def weights_of_run(how, runs, monkeypatch, changes=None):
    """Weights by key at each step, the student as it began, and the result of a retrain."""
    seen, students = [], []
    original = Trainer.train_step

    def train_step(self, batch):
        if not seen:
            students.append({name: t.clone() for name, t in self.objective.student.model.state_dict().items()})
        seen.append(dict(zip(self.objective.keys, self.weights.weights(self.step), strict=True)))
        original(self, batch)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    config = searching(runs, {"retrain": {"weights": how}, **(changes or {})})
    result = distpro.retrain(config, schedule=schedule_of(runs))
    monkeypatch.undo()
    return seen, students[0], result


@pytest.fixture(scope="module")
def controls(runs):
    with pytest.MonkeyPatch.context() as patch:
        return {how: weights_of_run(how, runs, patch) for how in CONTROLS}


def test_weights_of_the_controls(controls, runs):
    learned = schedule_of(runs).weights
    keys = schedule_of(runs).keys
    for how in CONTROLS:
        assert len(controls[how][0]) == 15
    for step in range(15):
        weights = {how: controls[how][0][step] for how in CONTROLS}
        assert weights["none"] == {}
        assert weights["constant"] == dict.fromkeys(keys, 1.0)
        assert weights["equal"] == pytest.approx(dict.fromkeys(keys, 0.25))
        assert weights["final"] == pytest.approx(dict(zip(keys, learned[-1].tolist(), strict=True)))
        position = 4 + step * 7 / 14  # the last 8 of 12 searched steps over 15
        left, part = min(int(position), 10), position - min(int(position), 10)
        between = (1 - part) * learned[left] + part * learned[left + 1]
        assert weights["searched"] == pytest.approx(dict(zip(keys, between.tolist(), strict=True)), rel=1e-5)


def test_controls_of_one_seed_begin_with_one_student(controls, runs):
    torch.manual_seed(0)
    truth = build_model("resnet8", num_classes=10).state_dict()
    for how in CONTROLS:
        for name, tensor in controls[how][1].items():
            assert torch.equal(tensor, truth[name]), (how, name)


def test_controls_end_differently(controls):
    losses = [controls[how][2].metrics["loss"] for how in CONTROLS]
    assert all(math.isfinite(loss) for loss in losses) and len(set(losses)) == len(CONTROLS)


def test_search_begins_with_the_same_student_too(runs):
    trainers = []
    for seed in (0, 1):
        config = read_config(searching(runs), [f"seed={seed}"])
        trainers.append(build.build_search(config, build.build_data(config)))
    first, other = (t.objective.student.model.state_dict()["conv1.weight"] for t in trainers)
    torch.manual_seed(0)
    assert torch.equal(first, build_model("resnet8", num_classes=10).conv1.weight)
    assert not torch.equal(first, other)


def test_no_teacher_is_built_where_none_is_needed(runs):
    """So that the baseline runs where the teacher's checkpoint is not."""
    config = searching(runs, {"teacher": {"checkpoint": "nowhere.pt"}, "training": {"max_steps": 1}})
    assert distpro.train(config).metrics["step"] == 1


def test_distill_weight_and_its_warmup(runs, monkeypatch):
    """λ = 6 over min(epoch / 3, 1), epochs from 1 (ReviewKD's warm-up)."""
    changes = {"training": {"distill_weight": 6.0, "distill_warmup": 3}}
    seen, _, _ = weights_of_run("equal", runs, monkeypatch, changes)
    assert [weights["kd"] for weights in seen[::5]] == pytest.approx([0.5, 1.0, 1.5])


def test_the_threshold_drops_in_a_retrain(runs, monkeypatch):
    """α̃ of one process falls below τ half-way: it is dropped from there on; one that is always below is taken out."""
    schedule = schedule_of(runs)
    schedule.alpha_tilde[:] = 1.0
    schedule.alpha_tilde[6:, 0] = 0.4
    schedule.alpha_tilde[:, 3] = 0.5
    objective = distpro.Objective(*pair_of(runs))
    replayed = replay(objective, "searched", 12, schedule, threshold=0.5, start=0)
    assert objective.keys == list(schedule.keys[:3])
    assert [replayed.weights(step)[0] > 0 for step in range(12)] == [True] * 6 + [False] * 6
    assert all(replayed.weights(step)[1] > 0 for step in range(12))


@pytest.mark.parametrize("optimizer", [{}, {"dampening": 0.1, "nesterov": False}, {"momentum": 0.0}, {"name": "adamw"}])
def test_a_term_that_is_dropped_at_first_may_come_later(optimizer, runs, tmp_path):
    """Its transform gets its first gradient when the optimiser has long had all the others'."""
    schedule = schedule_of(runs)
    schedule.alpha_tilde[:6, 0] = 0.4
    config = searching(runs, {"training": {"optimizer": optimizer}})
    distpro.retrain(config, schedule=schedule, out=tmp_path)
    objective = distpro.Objective(*pair_of(runs))
    trained = load_safely(tmp_path / "checkpoint.pt")["terms"]
    begun = objective.terms.state_dict()
    assert not torch.equal(trained["0.transform.project.0.weight"], begun["0.transform.project.0.weight"])


def test_transforms_are_initialised_from_the_seed_alone(runs):
    """Whatever was built before them, so that a control's student begins with the same transforms."""
    config = read_config(searching(runs))
    pair = build.build_pair(config, Blank(10, (3, 8, 8)))
    first, second = (build.build_terms(config, pair)[0].transform.project[0].weight for _ in range(2))
    assert torch.equal(first, second)


def pair_of(runs):
    config = read_config(searching(runs))
    pair = build.build_pair(config, Blank(10, (3, 8, 8)))
    return pair.teacher, pair.student, build.build_terms(config, pair)


def test_a_kd_retrain_driven_by_the_total(runs, monkeypatch):
    """The schedule of a feature search replayed by a loss that it does not know."""
    terms = {"pathways": None, "terms": [{"loss": "dist", "weight": {"schedule": "total"}}]}
    seen, _, _ = weights_of_run("searched", runs, monkeypatch, terms)
    total = schedule_of(runs).after(1 / 3).weights.sum(1)
    assert seen[0] == pytest.approx({"dist": total[0].item()})
    assert seen[14] == pytest.approx({"dist": total[-1].item()})


# Another pair


def test_a_schedule_serves_another_pair_by_level(runs, monkeypatch):
    """A WRN student, whose taps have other names."""
    changes = {"student": {"model": "wrn_16_1", "params": {}}}
    seen, _, _ = weights_of_run("searched", runs, monkeypatch, changes)
    schedule = schedule_of(runs).after(1 / 3)
    assert set(seen[0]) != set(schedule.keys) and "kd" in seen[0]
    assert list(seen[0].values()) == pytest.approx(schedule.weights[0].tolist())
    assert list(seen[14].values()) == pytest.approx(schedule.weights[-1].tolist())


def test_levels_that_do_not_fit_are_said_and_a_mapping_joins_them(runs, monkeypatch):
    """A student whose stages 2 and 3 meet the teacher's other way round."""
    changes = {
        "pathways": {"connect": [["layer1:pre_relu", "layer1"], ["layer2:pre_relu", "layer3"]]},
        "student": {"model": "resnet14"},
    }
    missing = r"no column for term 'layer2:pre_relu<-layer3@conv1x1' \(level \(2, 3, 'conv1x1'\)\)"
    with pytest.raises(UserError, match=missing + ".*4 terms over 3 teacher and 3 student levels.*mapping"):
        distpro.retrain(searching(runs, changes), schedule=schedule_of(runs))
    mapping = {"layer2:pre_relu<-layer3@conv1x1": "layer3:pre_relu<-layer3@conv1x1"}
    changes["retrain"] = {"weights": "searched", "mapping": mapping}
    seen, _, _ = weights_of_run("searched", runs, monkeypatch, changes)
    first, _, third, kd = schedule_of(runs).after(1 / 3).weights[0].tolist()
    assert list(seen[0].values()) == pytest.approx([first, third, kd])


# Evaluation


def test_evaluate(runs):
    """A run, its checkpoint with a config, and a config's teacher give what the trainings said."""
    said = {run: json.loads((runs / run / "result.json").read_text()) for run in ("teacher", "retrain")}
    metrics = ("accuracy", "top5", "loss")
    for run in said:
        assert distpro.evaluate(runs / run) == pytest.approx({m: said[run][m] for m in metrics})
    path = runs / "retrain" / "student.pt"
    assert distpro.evaluate(path, config=runs / "retrain" / "config.yaml") == distpro.evaluate(runs / "retrain")
    of_teacher = distpro.evaluate(runs / "search" / "config.yaml")  # on a quarter of its samples, normalised as it was
    assert of_teacher == pytest.approx({m: said["teacher"][m] for m in metrics})


# Wrong use


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (lambda runs: distpro.search(settings()), "a search needs a teacher"),
        (lambda runs: distpro.search(searching(runs, {"teacher": {"checkpoint": None}})), "random weights teach"),
        (lambda runs: distpro.search(searching(runs, {"precision": "float16"})), "float32 or bfloat16"),
        (lambda runs: distpro.search(searching(runs, {"pathways": {"weight": 1.0}, "terms": []})), "to be learned"),
        (lambda runs: distpro.retrain(), "needs a config, a schedule, or both"),
        (lambda runs: distpro.retrain(searching(runs)), "retrain.weights is 'searched', which needs a schedule"),
        (lambda runs: distpro.retrain(schedule=runs / "retrain" / "student.pt"), "not a distpro schedule"),
        (lambda runs: distpro.evaluate(runs / "search"), "is a search, which leaves a schedule and no student"),
        (lambda runs: distpro.evaluate(runs / "retrain" / "student.pt"), "give --config CFG"),
        (lambda runs: distpro.search(searching(runs), out=runs / "search"), "holds a run already"),
    ],
)
def test_wrong_use(command, message, runs):
    with pytest.raises(UserError, match=message):
        command(runs)


def test_a_schedule_never_runs_code_that_its_config_names(runs):
    """Unless the user repeats it."""
    schedule = schedule_of(runs)
    schedule.meta["config"]["student"]["model"] = "tests.no_such_module:build"
    with pytest.raises(UserError, match="names code of its own, student.model 'tests.no_such_module:build'"):
        distpro.retrain(schedule=schedule)
    with pytest.raises(UserError, match="no_such_module") as caught:
        distpro.retrain(schedule=schedule, overrides=["student.model=tests.no_such_module:build"])
    assert "names code of its own" not in str(caught.value)
