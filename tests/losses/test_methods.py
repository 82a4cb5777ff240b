"""Every method's config: it is complete, describes itself without data, and trains what its method trains.

The configs run as they are but for data (32 digits, no augmentation), small networks, and 20 steps on one batch: twenty
epochs, so that a warm-up of twenty epochs is over at the end.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import distpro
from distpro import build
from distpro.batch import Batch
from distpro.cli import main
from distpro.config.reading import read_config
from distpro.config.schema import Config
from distpro.config.stages import stages_of
from distpro.data import DATASETS, Split
from distpro.data.datasets import Source
from distpro.losses import LOSSES, available_losses
from distpro.process import Clock, parse_process
from distpro.tasks import TASKS
from distpro.tasks.classification import Classification
from distpro.train.trainer import Trainer
from pathways.probing import untouched
from pathways.registry import check_parameters
from tests.conftest import ROOT
from tests.losses.examples_tokens import EXAMPLES as OF_TOKENS

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")

pytestmark = pytest.mark.slow

METHODS = {path.stem: path for path in sorted((ROOT / "retrain_configs" / "methods").glob("*.yaml"))}
BASE = METHODS.pop("base")

SMALL = (
    "data.name=digits",
    "data.samples=32",
    "data.params={image_size: 8}",
    "data.augment=[]",
    "data.mean=[0.2956973805, 0.2956973805, 0.2956973805]",  # of these 32 images
    "data.std=[0.3710970952, 0.3710970952, 0.3710970952]",
    "student.model=resnet8",
    "training.batch_size=32",
    "training.max_steps=20",
    "training.clip_norm=5",  # the weights are published for features of other sizes than this teacher's
    "threads=1",
    "precision=float32",
    "tracking.tensorboard=false",
    "tracking.evaluate_every=1000",
)

# Parameters of losses that are made for 50,000 images and 240 epochs.
SMALLER = {"crd": {"nce_k": 64}, "ctkd": {"warmup_steps": 10}}

# The share that each loss has to fall by, and those that 20 steps can hardly move, by term or stage.
FALL, SLOW_FALL = 0.1, 0.01
SLOW = {
    ("vid", "vid"): "the variances start at 5 and come down slowly",
    ("mgd", "mgd"): "its published factor is 7e-5",
    ("ft", "ft"): "the paraphraser's six convolutions have no BatchNorm, and a rate of 0.01",
    ("dab", "dab"): "its rate of 1e-4 is meant for gradients of sums, which are clipped here",
    ("ghnd", "task"): "the classifier alone is trained, on fixed features",
    ("hnd", "task"): "the classifier alone is trained, on fixed features",
}


def stages(name: str) -> list[Config]:
    return [stage.config for stage in stages_of(read_config(METHODS[name]))]


# What the files say


@pytest.mark.parametrize("loss", [name for name in available_losses() if name not in OF_TOKENS])
def test_every_loss_has_a_config_of_its_name(loss):
    assert loss in METHODS, f"retrain_configs/methods/{loss}.yaml is missing"
    terms = [term for config in stages(loss) for term in config.terms if term.loss == loss]
    assert terms
    assert any(term.pretrain for term in terms) == (LOSSES[loss].stages == 2)


@pytest.mark.parametrize("name", METHODS)
def test_a_config_leaves_nothing_to_a_schedule(name):
    text = METHODS[name].read_text(encoding="utf-8")
    assert text.startswith("# ") and "onstants" in text and "\nbase: base.yaml\n" in text
    for config in stages(name):
        assert config.retrain.weights == "constant" and config.pathways is None
        assert all(isinstance(term.weight, (float, dict)) for term in config.terms)


def holds_a_task_part(loss: str) -> bool:
    documented = " ".join((importlib.import_module(LOSSES[loss].__module__).__doc__ or "").split())
    return "should not add another" in documented and loss != "kd"  # kd holds one on request only


@pytest.mark.parametrize("loss", [name for name in available_losses() if holds_a_task_part(name)])
def test_a_loss_that_holds_a_task_part_gets_no_other(loss):
    assert {config.task_weight for config in stages(loss)} == {0}


@pytest.mark.parametrize("name", METHODS)
def test_a_dry_run_needs_no_data(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISTPRO_DATA", raising=False)
    smaller = ["student.model=resnet8", *(["teacher.model=resnet14"] if read_config(METHODS[name]).teacher else [])]
    status = main(["retrain", str(METHODS[name]), "--dry-run", *smaller])
    shown = capsys.readouterr()
    if name == "ifvd":  # CIFAR-100 has no label maps
        assert status == 2 and "label map (N, H, W)" in shown.err
        return
    assert status == 0, shown.err
    assert shown.out.count("student  ") == len(stages(name))
    terms = [term for config in stages(name) for term in config.terms]
    assert all(f"    {t.loss}{f'@{t.teacher}' if t.teacher else ''}  level" in shown.out for t in terms)


# What they train


@dataclass
class Watched:
    """One training, and its loss terms on the batch that it trains on, with first and with trained parameters.

    Both are computed at the end, in training mode, with the same buffers (such as a memory bank), random numbers and
    scalars (those of the first step): they differ in what was trained and in nothing else.
    """

    config: Config
    trainer: Trainer
    first: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.batch = next(self.trainer.train_loader.epoch(0))
        self.first = {name: p.detach().clone() for name, p in self.parameters().items()}

    def parameters(self) -> dict[str, Tensor]:
        objective = self.trainer.objective
        student = {f"student.{n}": p for n, p in objective.student.model.named_parameters()}
        return student | {f"terms.{n}": p for n, p in objective.terms.named_parameters()}

    def losses(self, *first: str) -> dict[str, float]:
        """The terms' losses, or the task's if there are none, with ``first`` values of the parameters whose names begin
        so."""
        objective, batch, trained = self.trainer.objective.train(), self.batch, {}
        with untouched(objective):
            for name, p in self.parameters().items():
                trained[name] = p.clone()
                if name.startswith(first):
                    p.copy_(self.first[name])
            torch.manual_seed(0)
            objective.at(0)
            found = objective.training_pass(batch, [1.0] * len(objective.entries))
            for name, p in self.parameters().items():
                p.copy_(trained[name])
        return dict(zip(objective.keys, found.terms.tolist(), strict=True)) or {"task": found.task.item()}

    def moved(self) -> set[str]:
        """Names of the parameters that are not what they were."""
        return {name for name, p in self.parameters().items() if not torch.equal(p, self.first[name])}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Checkpoint of a ResNet-14 after 24 steps on 200 digits, which base.yaml trains too."""
    folder = tmp_path_factory.mktemp("teacher")
    longer = ["student.model=resnet14", "data.samples=200", "training.batch_size=50", "training.max_steps=24"]
    longer += ["data.mean=[0.3059966299, 0.3059966299, 0.3059966299]"]  # of these 200 images
    longer += ["data.std=[0.3771332826, 0.3771332826, 0.3771332826]"]
    result = distpro.train(BASE, folder / "run", [*SMALL, *longer])
    assert result.metrics["accuracy"] > 50
    return folder / "run" / "student.pt"


@pytest.fixture
def trained(teacher, monkeypatch):
    """A function that runs a method's config and gives its trainings, one per stage."""
    seen: list[Watched] = []
    build_retrain = build.build_retrain

    def watch(config: Config, *args: Any, **more: Any) -> Trainer:
        trainer = build_retrain(config, *args, **more)
        seen.append(Watched(config, trainer))
        return trainer

    def run(name: str, *overrides: str) -> list[Watched]:
        monkeypatch.setattr(build, "build_retrain", watch)
        distpro.retrain(METHODS[name], overrides=[*SMALL, *fitting(name, teacher), *overrides])
        return seen

    return run


def fitting(name: str, teacher: Any) -> list[str]:
    """Overrides for what a method's config has: its teachers, its only term alone, and losses of a smaller kind."""
    config = read_config(METHODS[name])
    models = (["teacher"] if config.teacher else []) + [f"teachers.{n}" for n in config.teachers]
    found = [text for path in models for text in (f"{path}.model=resnet14", f"{path}.checkpoint={teacher}")]
    terms = [term.model_dump(exclude_unset=True) for term in config.terms]
    if terms and not config.stages and all(isinstance(term["weight"], float) for term in terms):
        found.append("task_weight=0")
    if any(term["loss"] in SMALLER for term in terms):
        fewer = [{**term, "params": term["params"] | SMALLER.get(term["loss"], {})} for term in terms]
        found.append(f"terms={json.dumps(fewer)}")
    return found


def check_that_it_learns(name: str, training: Watched) -> None:
    before, after = training.losses("student.", "terms."), training.losses()
    for key, value in after.items():
        least = SLOW_FALL if (name, key) in SLOW else FALL
        assert value < before[key] - least * abs(before[key]), f"{key}: {before[key]:.4g} to {value:.4g}"


def check_what_moves(training: Watched) -> None:
    """What a stage trains moves and nothing else: all of the student but what is frozen, or not reached."""
    config, moved = training.config, training.moved()
    terms = [t for t in training.trainer.objective.terms if t.student_taps]
    if config.freeze:
        assert moved == {"student.fc.weight", "student.fc.bias"}
    elif not training.trainer.objective.computes_task and not terms:
        assert not any(name.startswith("student.") for name in moved), "the teacher's part alone is trained"
    else:
        assert "student.conv1.weight" in moved


@pytest.mark.parametrize("name", [n for n in METHODS if n != "ifvd"])
def test_a_method_trains_and_its_losses_fall(name, trained):
    trainings = trained(name)
    assert len(trainings) == len(stages(name))
    for training in trainings:
        assert training.trainer.step == 20
        check_that_it_learns(name, training)
        check_what_moves(training)


# What some of them need beside


def test_ifvd_learns_from_label_maps(trained, monkeypatch):
    """On digits whose label is, for each pixel, whether it is ink."""

    class Count:
        """Of pixels."""

        def __init__(self) -> None:
            self.pixels = 0

        def update(self, output: Any, batch: Batch) -> None:
            self.pixels += batch.target.numel()

        def state(self) -> int:
            return self.pixels

        def merge(self, states: list[int]) -> None:
            self.pixels = sum(states)

        def compute(self) -> dict[str, float]:
            return {"pixels": float(self.pixels)}

    class Pixels(Classification):
        headline = "pixels"

        def metrics(self) -> Any:
            return Count()

    def ink(image_size: int = 16) -> Source:
        digits = DATASETS["digits"](image_size)
        parts = [Split.of(p.images[:32], (p.images[:32, 0] > 100).long()) for p in (digits.train, digits.test)]
        return Source(*parts, ["paper", "ink"])

    monkeypatch.setitem(DATASETS._entries, "ink", ink)
    monkeypatch.setitem(TASKS._entries, "pixels", Pixels)
    changes = [
        "data.name=ink",
        "data.samples=null",
        "data.params={}",
        "task=pixels",
        "teacher.params={num_classes: 10}",
    ]
    (training,) = trained("ifvd", *changes)
    check_that_it_learns("ifvd", training)
    check_what_moves(training)


def test_ctkd_s_temperature_moves_against_the_student(trained):
    (training,) = trained("ctkd")
    first = training.losses("student.", "terms.")["ctkd"]
    assert training.losses("terms.")["ctkd"] < first, "the student lowers the loss"
    assert training.losses("student.")["ctkd"] > first, "the temperature raises it"


def test_kd_cosine_moves_both_weights_to_the_other_side(trained):
    (training,) = trained("kd_cosine")
    objective = training.trainer.objective
    weights = [(objective.task_weight_at(step), *objective.weights_at(step)) for step in (0, 19)]
    assert weights == [pytest.approx((0.1, 0.9)), pytest.approx((1.0, 0.0))]


def test_kd_temperature_ends_at_one(trained):
    (training,) = trained("kd_temperature")
    term = training.trainer.objective.terms[0]
    training.trainer.objective.at(19)
    assert term.loss.temperature == 1.0
    training.trainer.objective.at(0)
    assert term.loss.temperature == 4.0


def test_fitnet_s_soft_targets_fade_as_published():
    """λ from 4 to 1, on a cross-entropy without the factor τ² = 9 that kd carries."""
    process, clock = parse_process(stages("fitnet")[1].terms[0].weight), Clock(11)
    assert [9 * process.at(step, clock) for step in (0, 5, 10)] == pytest.approx([4, 2.5, 1], rel=1e-3)


def test_two_teachers_are_averaged_by_their_weights(trained):
    (training,) = trained("two_teachers")
    teacher, x = training.trainer.objective.teacher.model, training.batch.inputs
    with torch.no_grad():
        first, second = (teacher.get_submodule(name)(x) for name in ("resnet56", "resnet110"))
        torch.testing.assert_close(teacher(x), (first + 2 * second) / 3)


def states_equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("name", ["takd", "born_again"])
def test_each_generation_is_taught_by_the_one_before(name, trained):
    trainings = trained(name)
    for before, after in zip(trainings[:-1], trainings[1:], strict=True):
        assert states_equal(after.trainer.objective.teacher.model, before.trainer.objective.student.model)
        assert not torch.equal(before.first["student.conv1.weight"], after.first["student.conv1.weight"])


@pytest.mark.parametrize(("name", "part"), [("ft", "paraphraser"), ("ktaad", "translator"), ("sskd", "head_t")])
def test_the_second_stage_goes_on_with_the_first_one_s_part_and_leaves_it_alone(name, part, trained):
    first, second = trained(name)
    kept = {n for n in second.first if n.startswith(f"terms.0.loss.{part}.")}
    assert kept and kept <= first.moved()
    assert all(torch.equal(second.first[n], first.parameters()[n]) for n in kept)
    assert not kept & second.moved()


# docs/methods.md

spec = importlib.util.spec_from_file_location("methods", ROOT / "tools" / "methods.py")
methods = importlib.util.module_from_spec(spec)
spec.loader.exec_module(methods)


def test_the_page_is_fresh():
    assert methods.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("old", "new", "status"),
    [
        (r"; loss \S+, gradients \S+ \|", "; loss 3e-03, gradients 0 |", 0),
        (r"2 golden files", "3 golden files", 1),
        (r"`margin: 1.0`", "`margin: 2.0`", 1),
        (r"\| KDSVD \| `kdsvd` \|\n", "", 1),
    ],
    ids=["errors", "files", "options", "names"],
)
def test_a_stale_page_is_found(old, new, status, tmp_path, monkeypatch, capsys):
    page = methods.PAGE.read_text(encoding="utf-8")
    changed = re.sub(old, new, page, count=1)
    assert changed != page
    (tmp_path / "methods.md").write_text(changed, encoding="utf-8")
    monkeypatch.setattr(methods, "ROOT", tmp_path)
    monkeypatch.setattr(methods, "PAGE", tmp_path / "methods.md")
    assert methods.main(["--check"]) == status
    assert ("python tools/methods.py" in capsys.readouterr().err) == (status == 1)


def test_a_loss_without_golden_files_has_an_independent_check():
    assert set(methods.INDEPENDENT) == {name for name in available_losses() if not methods.files_of(name)}


def test_measured_errors_are_those_of_the_files(golden_folder, monkeypatch):
    """An error of one part in a thousand, put into the loss, is what is measured."""
    assert max(methods.measured("kd")) < 1e-5
    compare = LOSSES["kd"].compare
    monkeypatch.setattr(LOSSES["kd"], "compare", lambda self, *args: 1.001 * compare(self, *args))
    assert methods.measured("kd") == pytest.approx((1e-3, 1e-3), rel=1e-2)


@pytest.mark.parametrize(("toolkit", "row"), [(kit, row) for kit, rows in methods.TOOLKITS.items() for row in rows])
def test_names_in_other_toolkits_lead_to_losses_and_options(toolkit, row):
    loss = None
    for token in re.findall(r"`(.*?)`", row[1]):
        option, colon, value = token.partition(": ")
        if not colon:
            assert token in available_losses(), token
            loss = token
        elif option == "pretrain":
            assert LOSSES[loss].pretrain_reads
        else:
            given = value if option in ("form", "of") else value == "true" if option == "standardize" else 1
            check_parameters(loss, LOSSES[loss], {option: given})
            if option in ("form", "of"):
                assert f'"{value}"' in inspect.getsource(LOSSES[loss]), f"{loss} has no {token}"
