"""From a config's terms to losses that know what they have to know."""

from __future__ import annotations

import pytest
import torch

import distpro
from distpro import build
from distpro.batch import batch_of
from distpro.build.reading import norms_before
from distpro.config.reading import merge, read_config
from distpro.files import load_safely
from distpro.losses.ofd import margin
from distpro.models import build_model
from distpro.process import Clock
from pathways import UserError
from pathways.call import Call
from tests.digits import settings


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Two checkpoints of ResNet-14 with different weights."""
    folder = tmp_path_factory.mktemp("teachers")
    for seed in (5, 6):
        torch.manual_seed(seed)
        torch.save(build_model("resnet14", num_classes=10).state_dict(), folder / f"{seed}.pt")
    return folder


def content(folder, terms, **changes):
    plain = {"pathways": None, "terms": terms, "retrain": {"weights": "constant"}}
    return merge(merge(settings(folder / "5.pt"), plain), changes)


def objective_of(folder, terms, **changes):
    config = read_config(content(folder, terms, **changes))
    data = build.build_data(config)
    train = build.build_loader(config, data, data.train, training=True)
    objective = build.build_objective(config, data, data.train, Clock(20, len(train)))
    return objective, data, train


def test_default_taps_are_those_that_the_loss_names(teachers):
    terms = [
        {"loss": "kd"},
        {"loss": "at"},
        {"loss": "ofd"},
        {"loss": "review"},
        {"loss": "crd", "params": {"nce_k": 8}},
        {"loss": "srd"},
    ]
    objective, _, _ = objective_of(teachers, terms)
    stages, before = ("layer1", "layer2", "layer3"), tuple(f"layer{n}:pre_relu" for n in (1, 2, 3))
    found = {term.key: (term.student_taps, term.teacher_taps) for term in objective.terms}
    assert found["kd"] == (("logits",), ("logits",))
    assert found["at"] == (stages, stages)
    assert found["ofd"] == (before, before)
    assert found["review"] == ((*stages, "fc:input"), (*before, "fc:input"))
    assert found["crd"] == (("fc:input",), ("fc:input",))
    assert found["srd"] == (("logits", "layer3"), ("logits", "layer3"))


def test_a_loss_learns_of_the_data_what_it_needs(teachers):
    terms = [
        {"loss": "crd", "params": {"nce_k": 8}},
        {"loss": "srrl"},
        {"loss": "semckd"},
        {"loss": "ofd"},
    ]
    objective, data, _ = objective_of(teachers, terms)
    crd, srrl, semckd, ofd = (term.loss for term in objective.terms)
    assert crd.n_data == len(data.train) == 100 and torch.equal(crd.labels, data.train.labels)
    assert torch.equal(srrl.classifier, objective.teacher.model.fc.weight)
    assert semckd.batch_size == 20
    norm = objective.teacher.model.layer2[-1].bn2
    assert torch.allclose(ofd.margin1.flatten(), margin(norm.weight, norm.bias))


@pytest.mark.parametrize(
    ("name", "tap", "norm"),
    [
        ("resnet20", "layer2:pre_relu", "layer2.2.bn2"),
        ("resnet8x4", "layer1:pre_relu", "layer1.0.bn2"),
        ("wrn_16_2", "block3.0.bn1", "block3.0.bn1"),
        ("vgg8", "block2.0", None),
    ],
)
def test_the_norm_before_a_tap(name, tap, norm):
    model = build_model(name, num_classes=10)
    (found,) = norms_before(model, [tap], Call.of(torch.zeros(2, 3, 32, 32)))
    assert found is (None if norm is None else model.get_submodule(norm))


def test_samples_are_rows_of_the_training_set(teachers):
    """CRD keeps one row per training sample, whatever number the sample has in the set as stored."""
    objective, data, train = objective_of(teachers, [{"loss": "crd", "params": {"nce_k": 8}}])
    assert int(data.train.index.max()) >= len(data.train)  # a choice of samples keeps their numbers
    (term,) = objective.terms
    memory = term.loss.memory_s.clone()
    batch = next(iter(train.epoch(0)))
    objective(batch)
    moved = (term.loss.memory_s != memory).any(1).nonzero().flatten()
    expected = torch.tensor([data.train.index.tolist().index(n) for n in batch.index.tolist()]).sort().values
    assert torch.equal(moved, expected)


def test_parameters_move_from_yaml(teachers):
    ramp = {"linear": {"initial": 4, "final": 1}}
    moving = {"loss": "kd", "weight": {"cosine": {"initial": 0, "final": 1}}, "params": {"temperature": ramp}}
    objective, _, train = objective_of(teachers, [moving])
    batch = next(iter(train.epoch(0)))
    (term,) = objective.terms
    for step, temperature, weight in ((0, 4.0, 0.0), (19, 1.0, 1.0)):
        objective(batch, step=step)
        assert term.loss.temperature == pytest.approx(temperature)
        assert objective.weights_at(step) == pytest.approx([weight])


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (
            [{"loss": "kd"}, {"loss": "vid", "params": {"variance": {"linear": {"initial": 1, "final": 2}}}}],
            "cannot move",
        ),
        ([{"loss": "kd", "pretrain": True}], "no stage before its own"),
        ([{"loss": "kd", "teacher": "big"}], "no teacher 'big'"),
        ([{"loss": "kd", "key": "a"}, {"loss": "at", "key": "a"}], "two terms have one key"),
        ([{"loss": "hint", "teacher_taps": ["layer9"]}], r"terms.0 \(hint\): .*no module 'layer9'"),
        ([{"loss": "kd", "params": {"temperature": {"lineer": {"initial": 1}}}}], "'temperature'"),
    ],
)
def test_mistakes(teachers, terms, message):
    with pytest.raises(UserError, match=message):
        distpro.retrain(content(teachers, terms))


@pytest.mark.slow
@pytest.mark.parametrize("term", [{"loss": "ls"}, {"loss": "tf_kd", "params": {"form": "virtual"}}])
def test_a_loss_without_a_teacher_needs_none(teachers, term):
    """And does not run one that is there."""
    alone = distpro.retrain(content(teachers, [{**term, "weight": 1}], teacher=None)).metrics
    objective, _, train = objective_of(teachers, [{**term, "weight": 1}])
    assert objective.teacher.modules_run == []
    with_teacher = distpro.retrain(content(teachers, [{**term, "weight": 1}])).metrics
    assert alone["loss"] == with_teacher["loss"]
    with pytest.raises(UserError, match=r"terms.0 \(kd\): the config has no teacher"):
        distpro.retrain(content(teachers, [{"loss": "kd"}], teacher=None))


def test_a_step_at_which_every_weight_is_zero(teachers):
    """Nothing moves, and nothing fails."""
    rising = {"loss": "kd", "weight": {"linear": {"initial": 0, "final": 1, "start": 0.5}}}
    assert distpro.retrain(content(teachers, [rising], task_weight=0)).metrics["step"] == 15


# Several teachers, and one that wants its images otherwise


def several(teachers, **more):
    members = {"a": {"model": "resnet14", "checkpoint": str(teachers / "5.pt"), "weight": 3}}
    members["b"] = {"model": "resnet14", "checkpoint": str(teachers / "6.pt")}
    return {"teacher": None, "teachers": members, **more}


@pytest.mark.slow
def test_several_teachers_speak_together_and_apart(teachers):
    terms = [
        {"loss": "kd", "weight": 1},
        {"loss": "kd", "teacher": "b", "weight": 0.5},
        {"loss": "at", "teacher": "a", "weight": 10},
    ]
    objective, _, train = objective_of(teachers, terms, **several(teachers))
    assert objective.keys == ["kd", "kd@b", "at@a"]
    x = next(iter(train.epoch(0))).inputs
    alone = {}
    for name, seed in (("a", 5), ("b", 6)):
        alone[name] = build_model("resnet14", num_classes=10).eval()
        alone[name].load_state_dict(load_safely(teachers / f"{seed}.pt"))
    with torch.no_grad():
        a, b = alone["a"](x), alone["b"](x)
        taught = objective.run_teacher(batch_of(x))
    assert torch.allclose(taught["logits"], (3 * a + b) / 4, atol=1e-5)
    assert torch.allclose(taught["b"], b, atol=1e-5)
    assert {"a.layer1", "a.layer2", "a.layer3"} <= taught.keys()
    assert distpro.retrain(content(teachers, terms, **several(teachers))).metrics["accuracy"] > 0


def test_features_of_several_teachers_have_to_be_named(teachers):
    with pytest.raises(UserError, match=r"terms.0 \(at\): there are several teachers: say which .*allowed: a, b"):
        distpro.retrain(content(teachers, [{"loss": "at"}], **several(teachers)))
    pathways = {"connect": "same", "transforms": ["conv1x1"]}
    changes = several(teachers, pathways={**pathways, "teacher": "b", "weight": 1.0})
    objective, _, _ = objective_of(teachers, [], **changes)
    assert objective.keys[0] == "b.layer1:pre_relu<-layer1@conv1x1"


@pytest.mark.slow
def test_a_search_over_two_teachers(teachers):
    terms = [{"loss": "kd", "teacher": name} for name in ("a", "b")]
    schedule = distpro.search(content(teachers, terms, **several(teachers)))
    assert schedule.keys == ("kd@a", "kd@b") and schedule.meta["teacher"]["model"] == "resnet14 + resnet14"


def test_a_teacher_with_a_normalisation_of_its_own(teachers):
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    own = {"model": "resnet14", "checkpoint": str(teachers / "5.pt"), "input": {"mean": mean, "std": std}}
    objective, data, train = objective_of(teachers, [{"loss": "kd"}, {"loss": "at"}], teacher=own)
    x = next(iter(train.epoch(0))).inputs
    image = x.double() * torch.tensor(data.std).double().view(3, 1, 1) + torch.tensor(data.mean).double().view(3, 1, 1)
    network = build_model("resnet14", num_classes=10).eval()
    network.load_state_dict(load_safely(teachers / "5.pt"))
    renormalised = (image - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).double().view(3, 1, 1)
    with torch.no_grad():
        expected = network.double()(renormalised)
        found = objective.run_teacher(batch_of(x))
    assert torch.allclose(found["logits"].double(), expected, rtol=1e-4, atol=1e-4)
    assert "model.layer2" in found


# Rotations, and a student that answers through its term


def test_rotations_come_with_the_loss_that_reads_them(teachers):
    terms = [{"loss": "sskd", "weight": 1}, {"loss": "at", "weight": 1}]
    objective, _, train = objective_of(teachers, terms)
    batch = next(iter(train.epoch(0)))
    assert len(batch.inputs) == 4 * len(batch.target) == 80 and batch.rows_per_sample == 4
    for turns in range(4):
        assert torch.equal(batch.inputs[turns::4], torch.rot90(batch.inputs[::4], turns, (2, 3)))
    loss, parts = objective(batch)
    assert torch.isfinite(loss)
    plain, _, _ = objective_of(teachers, [{"loss": "at", "weight": 1}])
    output, seen = objective.run_student(batch)
    # the task loss, and a loss that reads one row per sample, see the plain images only
    assert parts["task"].item() == pytest.approx(torch.nn.functional.cross_entropy(output[::4], batch.target).item())
    features = [f[::4] for f in (seen[f"layer{n}"] for n in (1, 2, 3))]
    taught = [objective.run_teacher(batch)[f"layer{n}"][::4] for n in (1, 2, 3)]
    assert parts["at"].item() == pytest.approx(plain.terms[0].loss(features, taught).item(), rel=1e-4)
    assert distpro.retrain(content(teachers, terms)).metrics["accuracy"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["forward_mode", "finite_difference"])
def test_a_search_over_losses_with_needs_of_all_kinds(teachers, estimator):
    """Rotations, memories, classifiers, margins side by side; the estimators agree about the first step's direction."""
    losses = ["sskd", "crd", "kd", "at", "review", "semckd", "ofd", "srrl"]
    terms = [{"loss": loss, **({"params": {"nce_k": 16}} if loss == "crd" else {})} for loss in losses]
    schedule = distpro.search(content(teachers, terms, search={"estimator": estimator}, training={"max_steps": 3}))
    assert schedule.keys == tuple(losses) and torch.isfinite(schedule.scales).all()
    moved = schedule.alpha_tilde[1] - 1
    assert (moved.abs() > 1e-3).all()
    assert distpro.retrain(content(teachers, terms), schedule=schedule).metrics["accuracy"] > 0


@pytest.mark.parametrize("weight", ["schedule", {"schedule": "total"}])
def test_a_search_has_no_schedule_to_follow(teachers, weight):
    with pytest.raises(UserError, match=r"terms.0.weight: a search has no schedule to follow"):
        distpro.search(content(teachers, [{"loss": "kd", "weight": weight}, {"loss": "at"}]))


def test_simkd_answers_through_the_teacher_s_classifier(teachers, tmp_path):
    terms = [{"loss": "simkd", "weight": 1}]
    result = distpro.retrain(content(teachers, terms, task_weight=0), out=tmp_path / "run")
    (teachers / "5.pt").rename(teachers / "away.pt")  # what is deployed needs no teacher
    try:
        again = distpro.evaluate(tmp_path / "run")
    finally:
        (teachers / "away.pt").rename(teachers / "5.pt")
    assert again["accuracy"] == pytest.approx(result.metrics["accuracy"], abs=1e-3)
    assert again["loss"] == pytest.approx(result.metrics["loss"], rel=1e-4)
    with pytest.raises(UserError, match="answers through its term 'simkd'"):
        from distpro.runs.export import export

        export(tmp_path / "run")
