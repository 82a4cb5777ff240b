"""The command line as a user meets it: what it answers to mistakes, and a whole chain on scikit-learn's digits."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
import yaml

from distpro.cli import KINDS, main
from distpro.config.reading import presets
from distpro.data import AUGMENTATIONS
from distpro.losses import available_losses
from distpro.models import MODELS, build_model, load_checkpoint
from distpro.runs.doctor import EXTRAS
from distpro.schedule import Schedule
from tests.conftest import ROOT

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a teacher of one epoch, a search of four steps, and a retrain by its schedule alone."""
    folder = tmp_path_factory.mktemp("cli")
    common = {
        "precision": "float32",
        "data": {"name": "digits", "samples": 300},
        "student": {"model": "resnet8"},
        "training": {"epochs": 1, "batch_size": 60, "optimizer": {"lr": 0.05}},
        "tracking": {"tensorboard": False},
    }
    searched = {
        "base": "teacher.yaml",
        "teacher": {"model": "resnet8", "checkpoint": str(folder / "teacher" / "student.pt")},
        "pathways": {"connect": "all", "transforms": ["conv1x1"]},
        "training": {"max_steps": 4},
    }
    (folder / "teacher.yaml").write_text(yaml.safe_dump(common))
    (folder / "search.yaml").write_text(yaml.safe_dump(searched))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "teacher.yaml", "--out", "teacher"]) == 0
        assert main(["search", "search.yaml", "--out", "search", "seed=3"]) == 0
        assert main(["retrain", "--schedule", "search/alpha.pt", "--out", "retrain"]) == 0
    return folder


@pytest.fixture
def here(runs, monkeypatch):
    monkeypatch.chdir(runs)
    return runs


def metrics_in(text):
    return json.loads(text[text.index("{") :])


# Mistakes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("", ("required: COMMAND", "--help")),
        ("serch search.yaml", ("unknown command 'serch'; did you mean 'search'?", "retrain")),
        ("search", ("required: CFG",)),
        ("search seed=1", ("config file is missing",)),
        ("search serch.yaml", ("serch.yaml: no such config file; did you mean 'search.yaml'?",)),
        ("search search.yaml training.epoch=1", ("search.yaml: unknown key 'training.epoch'; did you mean 'epochs'?",)),
        ("search search.yaml training.epochs", ("unknown argument 'training.epochs'", "key=value")),
        ("search search.yaml --dry-rum", ("unknown argument '--dry-rum'",)),
        ("search search.yaml student.model=resnet21", ("unknown model 'resnet21'; did you mean 'resnet", "allowed")),
        ("search search.yaml pathways.transforms=[conv3x4]", ("unknown transform 'conv3x4'; did you mean 'conv3x3'?",)),
        ("search search.yaml search.estimator=foward", ("estimator 'foward'; did you mean 'forward_mode'?",)),
        ("search search.yaml data.name=digts", ("unknown dataset 'digts'; did you mean 'digits'?",)),
        ("search search.yaml device=gpu", ("device: 'gpu' is not a device", "cuda")),
        ("search search.yaml precision=float16", ("precision", "float32 or bfloat16")),
        ("search search.yaml teacher.checkpoint=none.pt", ("checkpoint: nothing at none.pt",)),
        ("search search.yaml teacher.checkpoint=null", ("teacher.checkpoint is missing",)),
        ("search teacher.yaml", ("a search needs a teacher",)),
        ("search search.yaml data.samples=99999", ("samples must be between 1 and", "99999")),
        ("search search.yaml --out teacher.yaml", ("teacher.yaml: is a file, a run needs a folder",)),
        ("search search.yaml --dry-run search.estimator=foward", ("did you mean 'forward_mode'?",)),
        ("search search.yaml --dry-run data.augment=[flop]", ("unknown augmentation 'flop'; did you mean 'flip'?",)),
        ("search teacher.yaml --dry-run", ("a search needs a teacher",)),
        ("search search.yaml --dry-run training.accumulate=2", ("training.accumulate: a search's step is one batch",)),
        ("search search.yaml --dry-run precision=float16", ("precision: a search runs in float32 or bfloat16",)),
        (
            "search search.yaml --dry-run training.distill_weight=0",
            ("training.distill_weight: at 0 no term has an effect",),
        ),
        ("search search.yaml --dry-run pathways.weight=1", ("no term whose weight is to be",)),
        ("search search.yaml --dry-run search.horizon=4 search.estimator=forward_mode", ("looks one step back",)),
        ("search search.yaml --dry-run task_weight=learned", ("by a search over a horizon alone",)),
        ("search search.yaml --dry-run search.validation_fraction=0.9999", ("leaves one part empty",)),
        ("retrain search.yaml --dry-run retrain.weights=none training.accumulate=999", ("no step could take more",)),
        ("retrain", ("needs a config, a schedule, or both",)),
        ("retrain search.yaml", ("retrain.weights is 'searched'", "--schedule")),
        ("retrain --schedule alfa.pt", ("alfa.pt",)),
        ("retrain --schedule teacher/student.pt", ("teacher/student.pt: not a distpro schedule",)),
        ("retrain search.yaml --schedule search/alpha.pt pathways.transforms=[conv3x3]", ("no column for term",)),
        (
            "retrain search.yaml --dry-run --schedule search/alpha.pt pathways.weight=1",
            ("schedule: it drives nothing, every term",),
        ),
        ("retrain search.yaml --resume --out nowhere", ("nowhere: no checkpoint.pt to resume from",)),
        ("evaluate nothing.pt", ("--config",)),
        ("evaluate nothing.pt --config search.yaml", ("checkpoint: nothing at nothing.pt",)),
        ("evaluate search/alpha.pt --config search.yaml", ("alpha.pt",)),
        ("evaluate retrain --config other.yaml", ("retrain: has a config already, --config other.yaml", "data.root=")),
        ("evaluate search.yaml --config other.yaml", ("search.yaml: has a config already", "data.root=")),
        (
            "evaluate search",
            (
                "search: is a search, which leaves a schedule and no student: distpro retrain --schedule search/alpha.pt",
            ),
        ),
        ("evaluate .", (".: is not a run's folder: no student.pt and no config.yaml",)),
        ("export nowhere", ("nowhere: no such run",)),
        ("search search.yaml --rezume", ("unknown argument '--rezume'; did you mean '--resume'?",)),
        ("search search.yaml preset=papr", ("unknown preset 'papr'; did you mean 'paper'?",)),
        ("evaluate teacher.yaml", ("teacher has no checkpoint",)),
        ("inspect search.yml", ("search.yml: no such config file; did you mean 'search.yaml'?",)),
        ("inspect nothing.pt", ("nothing.pt",)),
        ("plot teacher.yaml", ("teacher.yaml",)),
        ("plot search/alpha.pt --format gif", ("--format", "'gif'", "png")),
        ("plot search/alpha.pt --out teacher.yaml", ("teacher.yaml: no figure ends in '.yaml'", ".png")),
        ("plot search/alpha.pt --out a.svg --format png", ("--out a.svg is one svg file, which --format png is not",)),
        ("plot search/alpha.pt seed=1", ("unknown argument 'seed=1'",)),
        (
            "export search",
            (
                "search: is a search, which leaves a schedule and no student: distpro retrain --schedule search/alpha.pt",
            ),
        ),
        ("list loses", ("unknown kind 'loses'; did you mean 'losses'?", "presets")),
        ("list", ("required: KIND",)),
    ],
)
def test_a_mistake_ends_with_status_2_one_message_and_no_folder(here, tmp_path, capsys, arguments, parts):
    given = arguments.split()
    runs = given[:1] in (["search"], ["retrain"]) and "--out" not in given
    status = main([*given, "--out", str(tmp_path / "out")] if runs else given)
    out, err = capsys.readouterr()
    assert status == 2
    assert err.startswith("distpro: ") and err.count("\n") == 1, err
    assert all(part in err for part in parts), err
    assert out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_installed_command_keeps_tracebacks_to_itself(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "distpro.cli", "search", "nothing.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "distpro: nothing.yaml: no such config file\n"


# Looking


@pytest.mark.parametrize("kind", KINDS)
def test_list_names_everything_of_a_kind(kind, capsys):
    known = {"augmentations": list(AUGMENTATIONS), "optimizers": ["adam", "adamw", "sgd", "rmsprop", "lion", "adan"]}
    known |= {"losses": available_losses(), "models": list(MODELS), "presets": presets(), "tasks": ["classification"]}
    assert main(["list", kind]) == 0
    words = re.split(r"\s+", capsys.readouterr().out)
    assert len(words) > 1
    assert set(known.get(kind, [])) <= set(words)


@pytest.mark.parametrize("columns", [80, 120])
def test_the_table_of_losses_fits_the_terminal(monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["list", "losses"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    assert {line.split()[0] for line in lines if line.split()} > set(available_losses())


def test_doctor_says_what_there_is_in_one_screen(monkeypatch, capsys):
    monkeypatch.setenv("DISTPRO_DATA", "/no/such/folder")
    monkeypatch.setattr("distpro.runs.doctor.find_spec", lambda name: None if name == "timm" else True)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    said = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert len(said) <= 24 and max(map(len, out.splitlines())) <= 120
    assert said["torch"] in torch.__version__ and "float32" in said["precision"]
    assert said["data"] == "$DISTPRO_DATA = /no/such/folder: no such folder"
    assert (said["tune"], said["timm"][:8]) == ("yes", "no timm:") and "pip install -e '.[timm]'" in said["timm"]


def test_doctor_knows_every_extra():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    assert {*re.findall(r"^(\w+) = ", extras, re.MULTILINE)} == {*EXTRAS, "docs", "dev"}


def test_the_help_says_how_keys_are_given(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "training.epochs=10" in capsys.readouterr().out


def test_inspect_a_schedule(here, capsys):
    assert main(["inspect", "search/alpha.pt"]) == 0
    out = capsys.readouterr().out
    assert "9 terms over 4 steps" in out and "resnet8" in out and "layer3:pre_relu<-layer3@conv1x1" in out


@pytest.mark.slow
def test_inspect_a_config_says_shapes_and_parameters(here, capsys):
    assert main(["inspect", "search.yaml"]) == 0
    out = capsys.readouterr().out
    assert "78,042 parameters" in out and "64×4×4" in out
    assert re.search(r"^terms    9: ", out, re.MULTILINE)


@pytest.mark.slow
def test_inspect_a_config_of_a_retrain(here, capsys):
    """It says what a retrain amounts to, also where a search would refuse the config."""
    assert (
        main(["inspect", "search.yaml", "pathways.weight=1", "retrain.weights=constant", "training.accumulate=2"]) == 0
    )
    assert re.search(r"^terms    9: ", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "terms"),
    [("search search.yaml", 9), ("retrain search.yaml", 9), ("train search.yaml", 0), ("train teacher.yaml", 0)],
)
def test_a_dry_run_writes_nothing(here, capsys, command, terms):
    before = sorted(here.rglob("*"))
    assert main([*command.split(), "--dry-run", "training.max_steps=null", "training.epochs=2"]) == 0
    out = capsys.readouterr().out
    steps = 2 * (4 if command.startswith("search") else 5)  # of 300 images, 240 in a search, in batches of 60
    assert f"terms    {terms}: " in out and f"run      {steps} steps" in out
    assert sorted(here.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "magic"), [("png", b"\x89PNG\r\n"), ("svg", b"<?xml")])
def test_plot_writes_figures_of_the_format(here, tmp_path, capsys, kind, magic):
    assert main(["plot", "search/alpha.pt", "--out", str(tmp_path), "--format", kind]) == 0
    written = sorted(tmp_path.iterdir())
    assert sorted(capsys.readouterr().out.split()) == [str(path) for path in written] != []
    assert all(path.suffix == f".{kind}" and path.read_bytes().startswith(magic) for path in written)


# From the teacher to the exported student


def test_the_search_leaves_a_schedule_that_says_where_it_comes_from(runs):
    schedule = Schedule.load(runs / "search" / "alpha.pt")
    assert schedule.weights.shape == (4, 9)
    assert schedule.weights[0].tolist() == pytest.approx([1 / 10] * 9)
    assert schedule.meta["config"]["seed"] == 3 and schedule.meta["data"]["name"] == "digits"


def test_a_run_folder_says_how_to_repeat_the_run(runs):
    for name in ("search", "retrain"):
        config = yaml.safe_load((runs / name / "config.yaml").read_text())
        assert (config["seed"], config["training"]["optimizer"]["lr"]) == (3, 0.05)
        assert json.loads((runs / name / "environment.json").read_text())["packages"]["torch"] in torch.__version__


def test_evaluate_repeats_the_run_s_result(here, capsys):
    result = json.loads((here / "retrain" / "result.json").read_text())
    for arguments in (["retrain"], ["retrain/student.pt", "--config", "search.yaml", "seed=3"]):
        assert main(["evaluate", *arguments]) == 0
        found = metrics_in(capsys.readouterr().out)
        assert found == {name: pytest.approx(result[name], rel=1e-6) for name in ("accuracy", "top5", "loss")}


def test_evaluate_a_config_evaluates_its_teacher(here, capsys):
    result = json.loads((here / "teacher" / "result.json").read_text())
    assert main(["evaluate", "search.yaml"]) == 0
    assert metrics_in(capsys.readouterr().out)["loss"] == pytest.approx(result["loss"], rel=1e-6)


def test_export_safetensors_holds_the_student_s_weights(here, tmp_path, capsys):
    safetensors = pytest.importorskip("safetensors.torch")
    path = tmp_path / "s.safetensors"
    assert main(["export", "retrain", "--out", str(path)]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    written, trained = safetensors.load_file(path), torch.load(here / "retrain" / "student.pt", weights_only=True)
    assert written.keys() == trained.keys()
    assert all(torch.equal(written[name], trained[name]) for name in trained)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"), [("s.PT2", "pt2"), ("s.safetensors", "safetensors"), ("plain", "safetensors"), ("s.onnx", "onnx")]
)
def test_export_writes_what_the_suffix_says(here, tmp_path, name, kind):
    """By what each format's own reader makes of the file."""
    if kind == "onnx":
        pytest.importorskip("onnxscript")
    path = tmp_path / "new" / name
    assert main(["export", "retrain", "--out", str(path)]) == 0
    if kind == "pt2":
        torch.export.load(path)
    elif kind == "onnx":
        pytest.importorskip("onnx").checker.check_model(str(path))
    else:
        assert pytest.importorskip("safetensors.torch").load_file(path)


@pytest.mark.slow
def test_export_pt2_computes_what_the_student_computes(here, tmp_path):
    path = tmp_path / "s.pt2"
    assert main(["export", "retrain", "--format", "pt2", "--out", str(path)]) == 0
    student = build_model("resnet8", num_classes=10).eval()
    load_checkpoint(student, here / "retrain" / "student.pt")
    x = torch.linspace(-1, 1, 5 * 3 * 16 * 16).view(5, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(path).module()(x), student(x))


# Going on


def test_a_folder_with_a_run_is_not_written_to(here, capsys):
    before = (here / "retrain" / "student.pt").read_bytes()
    assert main(["retrain", "--schedule", "search/alpha.pt", "--out", "retrain"]) == 2
    assert "retrain: holds a run already; continue it with --resume or choose another --out" in capsys.readouterr().err
    assert (here / "retrain" / "student.pt").read_bytes() == before


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(here, tmp_path, capsys):
    (tmp_path / "config.yaml").write_bytes((here / "retrain" / "config.yaml").read_bytes())
    again = ["retrain", "--schedule", "search/alpha.pt", "--out", str(tmp_path)]
    assert main(again) == 2
    assert "holds a run already; continue it with --resume" in capsys.readouterr().err
    assert main([*again, "--resume"]) == 0
    ours, theirs = (torch.load(f / "student.pt", weights_only=True) for f in (tmp_path, here / "retrain"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_damaged_record_of_the_config_is_named(tmp_path, here, capsys):
    (tmp_path / "config.yaml").write_text("[seed")
    assert main(["search", "search.yaml", "--out", str(tmp_path), "--resume"]) == 2
    assert "config.yaml: damaged" in capsys.readouterr().err


def test_resume_of_a_finished_run_gives_its_result_again(here):
    before = torch.load(here / "retrain" / "student.pt", weights_only=True)
    assert main(["retrain", "--schedule", "search/alpha.pt", "--out", "retrain", "--resume"]) == 0
    after = torch.load(here / "retrain" / "student.pt", weights_only=True)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_seeds_are_runs_of_their_own(here, tmp_path, capsys):
    """Each as it is alone, and their spread; an interrupted series goes on."""
    out = tmp_path / "many"
    assert main(["train", "teacher.yaml", "--seeds", "2", "--out", str(out), "seed=3"]) == 0
    assert main(["train", "teacher.yaml", "--out", str(tmp_path / "one"), "seed=4"]) == 0
    ours, alone = (torch.load(f / "student.pt", weights_only=True) for f in (out / "seed4", tmp_path / "one"))
    assert all(torch.equal(value, ours[name]) for name, value in alone.items())
    result = json.loads((out / "result.json").read_text())
    printed = capsys.readouterr().out
    assert printed.count("\ntrain  100%  5/5 steps") == 3 and "retrain" not in printed
    shown = re.search(r"accuracy +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)", printed)
    first, second = (result[seed]["accuracy"] for seed in ("3", "4"))
    expected = [(first + second) / 2, abs(first - second) / 2**0.5, first, second]
    assert [float(v) for v in shown.groups()] == pytest.approx(expected, rel=1e-2)
    (out / "result.json").unlink()
    assert main(["train", "teacher.yaml", "--seeds", "3", "--out", str(out), "seed=3", "--resume"]) == 0
    assert json.loads((out / "result.json").read_text()).keys() == {"3", "4", "5"}
    assert main(["train", "teacher.yaml", "--seeds", "0"]) == 2


@pytest.mark.slow
def test_seeds_of_a_search_are_schedules_of_their_own(here, tmp_path, capsys):
    out = tmp_path / "many"
    assert main(["search", "search.yaml", "--seeds", "2", "--out", str(out), "seed=3"]) == 0
    schedules = [Schedule.load(out / f"seed{seed}" / "alpha.pt") for seed in (3, 4)]
    assert not torch.equal(schedules[0].weights, schedules[1].weights)
    printed, result = capsys.readouterr().out, json.loads((out / "result.json").read_text())
    assert "last weight" in printed and all(key in printed for key in schedules[0].keys)
    for seed, schedule in zip("34", schedules, strict=True):
        expected = [schedule.strength * s * w for s, w in zip(schedule.scales, schedule.weights[-1], strict=True)]
        assert list(result[seed].values()) == pytest.approx([float(x) for x in expected], rel=1e-6)


@pytest.mark.slow
def test_a_shell_completes_commands_and_options(tmp_path):
    pytest.importorskip("argcomplete")
    for line, wanted in (("distpro retr", "retrain "), ("distpro search x.yaml --dr", "--dry-run ")):
        asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "|"}
        environment = {**os.environ, **asked, "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "words")}
        subprocess.run([sys.executable, "-m", "distpro"], env=environment, check=True, cwd=ROOT)
        assert (tmp_path / "words").read_text() == wanted


def test_resume_with_another_config_is_refused_with_the_keys_that_differ(here, capsys):
    changed = ["training.batch_size=30", "retrain.threshold=null"]
    assert main(["retrain", "--schedule", "search/alpha.pt", "--out", "retrain", "--resume", *changed]) == 2
    err = capsys.readouterr().err
    assert "training.batch_size was 60, is 30" in err and "retrain.threshold was 0.5, is None" in err
    assert err.count(" was ") == 2


# Code that a schedule names


@pytest.mark.slow
def test_a_schedule_file_runs_no_code_by_itself(here, tmp_path, monkeypatch, capsys):
    """…:make is imported only when the command line repeats it."""
    learned = Schedule.load("search/alpha.pt")
    learned.meta["config"]["student"]["model"] = "model_in_a_schedule:make"
    learned.save(tmp_path / "alpha.pt")
    (tmp_path / "model_in_a_schedule.py").write_text(
        "from distpro.models import build_model\n"
        "open('imported', 'w').close()\n"
        "def make(num_classes): return build_model('resnet8', num_classes=num_classes)\n"
    )
    monkeypatch.chdir(tmp_path)
    for looking in (
        ["retrain", "--schedule", "alpha.pt", "--out", "r"],
        ["retrain", "--schedule", "alpha.pt", "--dry-run"],
    ):
        assert main(looking) == 2
        assert "repeat it as student.model=model_in_a_schedule:make" in capsys.readouterr().err
    assert main(["inspect", "alpha.pt"]) == 0 and main(["plot", "alpha.pt"]) == 0
    assert not (tmp_path / "imported").exists() and not (tmp_path / "r").exists()

    assert main(["retrain", "--schedule", "alpha.pt", "--out", "r", "student.model=model_in_a_schedule:make"]) == 0
    assert (tmp_path / "imported").exists() and (tmp_path / "r" / "student.pt").exists()


@pytest.mark.slow
def test_a_schedule_may_lie_under_any_path(here, tmp_path, monkeypatch, capsys):
    place = tmp_path / "my 🎓 runs: é"
    place.mkdir()
    (place / "alpha.pt").write_bytes((here / "search" / "alpha.pt").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LANG", "C")
    schedule = str(place / "alpha.pt")
    assert main(["retrain", "--schedule", schedule, "--out", str(place / "out"), "training.max_steps=1"]) == 0
    recorded = yaml.safe_load((place / "out" / "config.yaml").read_text())
    assert recorded["retrain"]["schedule"] == schedule
    assert (
        main(["retrain", "--schedule", schedule, "--out", str(place / "out"), "--resume", "training.max_steps=1"]) == 0
    )
    assert main(["evaluate", str(place / "out")]) == 0


@pytest.mark.slow
def test_the_next_command_that_a_search_prints_can_be_pasted(here, tmp_path, capsys):
    out = tmp_path / "a b"
    assert main(["search", "search.yaml", "--out", str(out), "training.max_steps=1"]) == 0
    said = capsys.readouterr().out.strip().splitlines()[-1]
    assert shlex.split(said)[-1] == str(out / "alpha.pt")


def test_evaluate_of_what_is_not_there(here, capsys):
    assert main(["evaluate", "nowhere"]) == 2
    assert capsys.readouterr().err == "distpro: nowhere: no such run or config (and a checkpoint needs --config CFG)\n"
    assert main(["search", "retrain"]) == 2
    assert capsys.readouterr().err == "distpro: retrain: is a folder; a config is one YAML file\n"


@pytest.mark.slow
def test_a_reader_that_goes_away_does_not_end_a_training(tmp_path):
    config = {"data": {"name": "digits", "samples": 40, "params": {"image_size": 8}}, "student": {"model": "resnet8"}}
    config |= {"training": {"epochs": 3, "batch_size": 20}, "tracking": {"tensorboard": False}, "threads": 1}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    command = f"{sys.executable} -m distpro train c.yaml --out run 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "result.json").is_file() and len(done.stdout.splitlines()) == 1
