"""`distpro distill`: from names and a folder of photographs to a student, a page and an exported file."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import yaml

import distpro
from distpro.cli import main
from distpro.files import load_safely
from distpro.models import build_model
from distpro.models.pretrained import pretrained
from distpro.runs.composing import Wish, compose, of_both
from distpro.train.tracking import read_metrics
from distpro.train.trainer import Interrupted
from pathways.registry import UserError
from tests.photographs import write_photographs
from tests.runs.test_resume import differences, stop_after

QUICK = ["threads=1", "precision=float32", "tracking.tensorboard=false", "training.batch_size=16"]
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return {"root": tmp_path_factory.mktemp("photographs")}


@pytest.fixture
def photographs(made, data_folder):
    """32x32 photographs of three classes, 16 to train and 8 to test of each."""
    root = made["root"] / "parted"
    return root if root.exists() else write_photographs(data_folder, root, {"train": 16, "test": 8}, classes=3)


@pytest.fixture
def unparted(made, data_folder):
    root = made["root"] / "flat"
    return root if root.exists() else write_photographs(data_folder, root, {"": 20}, classes=3)


def wish(folder, **more):
    return Wish(**{"teacher": "resnet14", "student": "resnet8", "data": folder, "out": folder / "out"} | more)


# Configs


def test_one_class_is_refused(photographs, tmp_path):
    one = sorted((photographs / "train").iterdir())[0]
    shutil.copytree(one, tmp_path / "train" / "cat")
    with pytest.raises(UserError, match=f"^{tmp_path}: only one class: cat$"):
        compose(wish(tmp_path))


def test_a_folder_with_parts_is_taken_as_it_is(photographs):
    plan = compose(wish(photographs, teacher_epochs=3, epochs=20))
    data = plan.student["data"]
    assert (data["name"], data["root"], data["params"]) == ("folder", str(photographs), {})
    assert (data["num_classes"], data["image_shape"]) == (3, [3, 32, 32])
    assert plan.student["terms"] == [{"loss": "kd", "weight": 1.0}]
    assert plan.student["training"]["learning_rate"] == {"name": "cosine", "warmup_epochs": 2.0}
    assert plan.student["teacher"]["checkpoint"] == str(photographs / "out" / "teacher" / "student.pt")
    assert plan.teacher["training"]["epochs"] == 3 and plan.teacher["student"] == {"model": "resnet14"}


def test_a_folder_without_parts_is_split(unparted):
    plan = compose(wish(unparted))
    assert plan.student["data"]["params"] == {"test_fraction": 0.2}
    assert plan.student["training"]["batch_size"] == 8  # 48 samples


@pytest.fixture
def unbuilt(monkeypatch):
    """Configs alone: large models are not built."""
    monkeypatch.setattr("distpro.runs.composing._check_pair", lambda *args: None)


def test_pretrained_weights_bring_their_normalisation_size_and_a_small_rate(photographs, unbuilt):
    pytest.importorskip("timm")
    plan = compose(wish(photographs, teacher="timm:resnet18", teacher_pretrained=True, epochs=5))
    assert plan.teacher["student"] == {"model": "timm:resnet18", "params": {"pretrained": True}}
    assert "params" not in plan.student["teacher"]  # what was trained is not fetched again
    for config in (plan.teacher, plan.student):
        assert (config["data"]["mean"], config["data"]["std"]) == IMAGENET
        assert config["data"]["params"]["image_size"] == 224
    rates = [config["training"]["optimizer"]["lr"] for config in (plan.teacher, plan.student)]
    assert rates[1] == pytest.approx(5 * rates[0], rel=0.01)


def test_a_pair_of_two_normalisations(photographs, unbuilt):
    """The data have the student's; the teacher gets its own."""
    pytest.importorskip("timm")
    pair = {"teacher": "timm:vit_tiny_patch16_224", "student": "torchvision:resnet18", "image_size": 224}
    plan = compose(wish(photographs, **pair, teacher_pretrained=True, student_pretrained=True, teacher_epochs=0))
    assert plan.teacher is None and plan.student["data"]["mean"] == IMAGENET[0]
    assert plan.student["teacher"]["input"] == {"mean": [0.5] * 3, "std": [0.5] * 3}
    assert plan.student["teacher"]["params"] == {"pretrained": True}
    plan = compose(wish(photographs, **pair, teacher_pretrained=True, student_pretrained=True, teacher_epochs=1))
    assert plan.teacher["data"]["mean"] == [0.5] * 3


def test_a_teacher_s_known_normalisation_is_stated_whatever_the_data_s_becomes(photographs, unbuilt):
    pytest.importorskip("timm")
    say = ["data.mean=[0.1, 0.1, 0.1]", "data.std=[0.1, 0.1, 0.1]", "seed=1"]
    for epochs in (0, 1):
        plan = compose(wish(photographs, teacher="timm:resnet18", teacher_pretrained=True, teacher_epochs=epochs), say)
        assert plan.student["teacher"]["input"] == {"mean": IMAGENET[0], "std": IMAGENET[1]}
        assert plan.of_teacher == ["seed=1"]  # its own training is on what it knows
    plan = compose(wish(photographs), say)
    assert "input" not in plan.student["teacher"] and plan.of_teacher == say


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"teacher_epochs": 0}, "a teacher with random weights teaches nothing: teacher_weights"),
        ({"teacher_pretrained": True}, "model 'resnet14' has no pretrained weights"),
        ({"teacher_weights": "gone.pt"}, "teacher_weights: nothing at gone.pt"),
        ({"epochs": 0}, "epochs is 0: expected 1 or more"),
        ({"teacher": "resnet15"}, "unknown model 'resnet15'; did you mean"),
        ({"student": "torchvision:resnet19"}, "torchvision has no model 'resnet19'; did you mean"),
        ({"losses": ("kdd",)}, "unknown loss 'kdd'; did you mean"),
        ({"losses": ()}, "losses: expected one or more"),
        ({"data": "photoes"}, "data: nothing at photoes"),
        ({"data": "cifr10"}, "did you mean 'cifar10'"),
        ({"teacher": torch.nn.Identity(), "teacher_weights": "x.pt"}, "those of a file, not both"),
        (
            {"student": torch.nn.Identity(), "student_pretrained": True},
            "the student is a module, which has its weights",
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(photographs, more, said):
    with pytest.raises(UserError, match=re.escape(said)):
        compose(wish(photographs, **more))


@pytest.mark.parametrize(
    ("more", "overrides", "said"),
    [
        ({}, ["training.keep=best"], "training.keep: chooses by validation data, never by test data"),
        ({}, ["training.patience=3"], "training.patience: chooses by validation data"),
        ({"search": True}, ["training.ema={}"], "training.ema: a search keeps a schedule and no student"),
        ({"search": True}, ["training.optimizer.name=rmsprop"], "the step of rmsprop has no known derivative"),
        ({"search": True, "losses": ["kd"]}, [], "say search or losses, not both"),
    ],
)
def test_what_a_later_training_cannot_do_is_refused_before_the_first(
    photographs, tmp_path, monkeypatch, more, overrides, said
):
    monkeypatch.setattr("distpro.runs.commands.train", None)
    with pytest.raises(UserError, match=re.escape(said)):
        distpro.distill("resnet8", "resnet8", photographs, tmp_path, [*QUICK, *overrides], baseline=True, **more)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_folder_that_is_taken_and_weights_that_do_not_fit_are_said_first(photographs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("distpro.runs.commands.train", None)
    torch.save(build_model("resnet8", num_classes=3).state_dict(), tmp_path / "fit.pt")
    torch.save(build_model("resnet8", num_classes=4).state_dict(), tmp_path / "other.pt")
    command = ["distill", "--teacher", "resnet8", "--student", "resnet8", "--data", str(photographs), "--baseline"]
    for more in ([], ["--dry-run"], ["--teacher-epochs", "1"]):
        weights = ["--teacher-weights", str(tmp_path / "other.pt"), "--out", str(tmp_path / "out"), *more]
        assert main([*command, *weights]) == 2
        assert "other.pt does not fit ResNet: 2 of another shape" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").touch()  # of a run that has ended
    assert main([*command, "--teacher-weights", str(tmp_path / "fit.pt"), "--out", str(tmp_path / "out")]) == 2
    assert "out: holds a run already" in capsys.readouterr().err
    assert main([*command, "--teacher-weights", str(tmp_path / "fit.pt"), "--search", "--loss", "kd"]) == 2
    assert "say --search or --loss, not both" in capsys.readouterr().err


def test_a_folder_without_images_is_said(tmp_path):
    with pytest.raises(UserError, match="no image files in train/<class>/ or <class>/"):
        compose(wish(tmp_path))


def test_overrides_of_the_data_and_the_device_are_the_teacher_s_too():
    said = ["seed=1", "data.samples=3", "training.epochs=9", "training.max_steps=1", "terms=[]", "teacher.params.a=1"]
    assert of_both(said) == ["seed=1", "data.samples=3", "training.max_steps=1", "student.params.a=1"]


def test_a_mistake_on_the_command_line_is_one_message(photographs, capsys):
    pair = ["distill", "--student", "resnet8", "--data", str(photographs)]
    assert main([*pair, "--teacher", "resnt20"]) == 2
    assert capsys.readouterr().err.startswith("distpro: unknown model 'resnt20'; did you mean 'resnet20'?")
    assert main(pair) == 2
    assert "--teacher" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_writes_nothing(photographs, tmp_path, capsys):
    out = tmp_path / "out"
    command = [
        "distill",
        "--teacher",
        "resnet14",
        "--student",
        "resnet8",
        "--data",
        str(photographs),
        "--out",
        str(out),
    ]
    assert main([*command, "--dry-run", "--search", "--baseline"]) == 0
    shown = capsys.readouterr().out
    parts = re.findall(r"^# (.*)$", shown, re.MULTILINE)
    assert parts[1:] == ["student without its teacher", "search", "student, with what the search learns"]
    assert len(re.findall("^recipe", shown, re.MULTILINE)) == 4  # with what each of them costs
    assert "# teacher, trained first" in shown and "student  resnet8: 77,587 parameters" in shown and not out.exists()


# Pretrained weights, without a network


def test_a_torchvision_teacher_keeps_all_but_its_head(tmp_path, monkeypatch):
    """Weights of 1000 classes into a model of three: from the cache, where a download would have put them."""
    from torchvision import models

    learned = models.get_model("squeezenet1_1", weights=None)
    file = models.SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2]
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(learned.state_dict(), tmp_path / "hub" / "checkpoints" / file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    own = build_model("torchvision:squeezenet1_1", num_classes=3, **pretrained("torchvision:squeezenet1_1").params)
    assert own.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 3)
    theirs, ours = learned.state_dict(), own.state_dict()
    assert {name for name in ours if ours[name].shape != theirs[name].shape} == {
        "classifier.1.weight",
        "classifier.1.bias",
    }
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if not name.startswith("classifier"))
    whole = build_model("torchvision:squeezenet1_1", num_classes=1000, weights="DEFAULT")
    assert torch.equal(whole.classifier[1].weight, learned.classifier[1].weight)
    with pytest.raises(UserError, match="no weights 'IMAGENET'; did you mean"):
        build_model("torchvision:squeezenet1_1", weights="IMAGENET")


def test_what_the_libraries_say_of_their_weights():
    found = pretrained("torchvision:resnet50")
    assert (list(found.mean), list(found.std)) == IMAGENET and (found.size, found.classes) == (224, 1000)
    for name in ("resnet20", "smp:Unet"):
        with pytest.raises(UserError, match="has no pretrained weights"):
            pretrained(name)


# Trainings


@pytest.mark.slow
def test_three_commands_give_a_student_a_page_and_an_exported_file(photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = [
        "distill",
        "--teacher",
        "torchvision:shufflenet_v2_x0_5",
        "--student",
        "resnet8",
        "--data",
        str(photographs),
    ]
    monkeypatch.setattr("sys.argv", ["distpro", *command])
    assert main([*command, "--teacher-epochs", "1", "--epochs", "2", "--baseline", "--out", "out", *QUICK]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["step"] == 6
    for inner in ("teacher", "alone"):
        assert (tmp_path / "out" / inner / "student.pt").is_file()
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(tmp_path / "out" / "student.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["distpro"])
        assert set(file.keys()) == set(build_model("resnet8", num_classes=3).state_dict())  # the library's own names
    assert len(facts["mean"]) == 3 and facts["classes"] == 3
    assert main(["report", "out"]) == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert f"{result['accuracy']:.2f}" in page and "distpro distill --teacher torchvision:shufflenet_v2_x0_5" in page
    assert main(["evaluate", "out"]) == 0
    capsys.readouterr()
    assert main(["retrain", "out/config.yaml", "--out", "again"]) == 0  # to the same student, bit by bit
    assert differences(load_safely("out/student.pt"), load_safely("again/student.pt")) == []
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    assert main(["export", "out", "--format", "onnx"]) == 0
    assert {e.key: json.loads(e.value) for e in onnx.load("out/student.onnx").metadata_props} == {"distpro": facts}


@pytest.mark.slow
def test_a_teacher_s_file_and_what_it_knows(photographs, data_folder, tmp_path, capsys):
    """A plain state dict of ten classes, three of which the photographs have: its answers do not fit, which is refused; weights
    that know nothing are said to."""
    checkpoint = data_folder / "checkpoints" / "resnet20-12fca82f.th"
    with pytest.raises(UserError, match=r"resnet20-12fca82f.th does not fit"):
        distpro.distill("resnet20", "resnet8", photographs, tmp_path / "a", QUICK, epochs=1, teacher_weights=checkpoint)
    torch.manual_seed(0)
    torch.save(build_model("resnet8", num_classes=3).state_dict(), tmp_path / "random.pt")
    known = {"epochs": 1, "teacher_weights": tmp_path / "random.pt"}
    result = distpro.distill("resnet8", "resnet8", photographs, tmp_path / "b", QUICK, **known)
    assert result.metrics["step"] == 3 and not (tmp_path / "b" / "teacher").exists()
    assert re.search(r"the teacher is right in [\d.]+% of 24 test samples", capsys.readouterr().err)


@pytest.mark.slow
def test_a_teacher_of_distpro_s_own_export_has_its_normalisation_in_the_file(photographs, tmp_path):
    pytest.importorskip("safetensors")
    mean = "data.mean=[0.3, 0.4, 0.5]"
    trained = {"teacher_epochs": 1, "epochs": 1}
    distpro.distill(
        "resnet8", "resnet8", photographs, tmp_path / "a", [*QUICK, mean, "data.std=[0.2, 0.2, 0.2]"], **trained
    )
    plan = compose(wish(photographs, teacher="resnet8", teacher_weights=tmp_path / "a" / "student.safetensors"))
    assert plan.student["data"]["mean"] == [0.3, 0.4, 0.5]


@pytest.mark.slow
def test_modules_and_a_resumed_run(photographs, tmp_path, monkeypatch):
    """A teacher and a student as objects; and a run that was stopped comes to the same student."""

    def run(out, resume=False):
        torch.manual_seed(0)
        teacher, student = build_model("resnet8", num_classes=3), build_model("resnet8", num_classes=3)
        teacher.train()
        teacher.fc.eval()
        teacher.fc.bias.requires_grad_(False)
        try:
            return distpro.distill(teacher, student, photographs, out, QUICK, resume, teacher_epochs=1, epochs=2)
        finally:  # what the caller's own teacher was, it is
            assert teacher.training and not teacher.fc.training
            assert [name for name, p in teacher.named_parameters() if not p.requires_grad] == ["fc.bias"]

    whole = run(tmp_path / "whole")
    config = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())
    assert config["teacher"]["model"] == "object:ResNet"
    stop_after(monkeypatch, [2, 4])  # in the teacher's training, and in the student's
    for resume in (False, True):
        with pytest.raises(Interrupted):
            run(tmp_path / "parts", resume)
    monkeypatch.undo()
    again = run(tmp_path / "parts", True)
    assert again.metrics["accuracy"] == whole.metrics["accuracy"]
    assert differences(*(load_safely(tmp_path / name / "student.pt") for name in ("whole", "parts"))) == []


@pytest.mark.slow
def test_a_search_first(unparted, tmp_path):
    more = [*QUICK, "search.trials=0", "search.horizon=1", "training.max_steps=4"]
    distpro.distill("resnet8", "resnet8", unparted, tmp_path / "out", more, teacher_epochs=1, epochs=2, search=True)
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["retrain"]["schedule"] == str(tmp_path / "out" / "search" / "alpha.pt")
    assert {term["loss"] for term in config["terms"]} >= {"kd", "dkd", "dist"}
    assert read_metrics(tmp_path / "out")
