"""The configs of texts as they are shipped, on few sentences and for a few steps: teacher, search, resume, retrains, exports."""

from __future__ import annotations

import json
import math

import pytest
import torch

import distpro
from distpro.cli import main
from distpro.config.reading import read_config
from distpro.data import load_data
from distpro.files import load_safely
from distpro.runs.export import export
from distpro.schedule import Schedule
from distpro.train.trainer import Interrupted, Trainer
from pathways.registry import UserError
from tests.conftest import ROOT
from tests.glue import archive, cut
from tests.onnx_files import ROUNDING
from tests.onnx_files import answers as onnx_answers
from tests.runs.test_resume import differences, stop_after

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

SMALL = [
    "threads=1",
    "precision=float32",
    "data.samples=32",
    "data.params.tokenizer={train: {size: 1500}}",
    "data.params.bucket=2",
    "training.batch_size=8",
    "tracking={tensorboard: false, log_every: 1}",
]
SEARCH = ROOT / "search_configs" / "sst2_bert_bert.yaml"
RETRAINS = sorted((ROOT / "retrain_configs").glob("sst2_*.yaml"))
OTHERS = ["cola", "mrpc", "rte"]
HEADLINES = {"cola": "matthews", "mrpc": "f1", "rte": "accuracy"}


@pytest.fixture(scope="module", autouse=True)
def short(tmp_path_factory):
    """The sets of which every run reads all."""
    if not archive().is_file():
        pytest.skip(f"no {archive()}")
    SMALL.append(f"data.root={cut(tmp_path_factory.mktemp('glue'))}")
    yield
    SMALL.pop()


def teacher_of(made, tmp_path_factory, set):
    """The teacher's config, trained for two steps."""
    if set not in made:
        made[set] = tmp_path_factory.mktemp(set) / "teacher"
        headline = HEADLINES.get(set, "accuracy")
        overrides = [
            *SMALL,
            "training.max_steps=2",
            f"data.params.set={set}",
            f"task.headline={headline}",
        ]
        result = distpro.train(ROOT / "search_configs" / "sst2_teacher.yaml", made[set], overrides)
        assert result.metrics["step"] == 2 and headline in result.metrics
    return made[set]


@pytest.fixture
def teacher(made, tmp_path_factory):
    return teacher_of(made, tmp_path_factory, "sst2")


def overrides_of(teacher, steps):
    return [*SMALL, f"teacher.checkpoint={teacher / 'student.pt'}", f"training.max_steps={steps}"]


def searched(teacher, out, resume=False):
    """Seven steps, four of them an epoch."""
    return distpro.search(SEARCH, out, [*overrides_of(teacher, 7), "training.epochs=2", "data.samples=40"], resume)


@pytest.fixture
def search(made, teacher):
    if "search" not in made:
        made["search"] = teacher.parent / "search"
        searched(teacher, made["search"])
    return made["search"]


@pytest.mark.parametrize("trials", [0, 2])
def test_a_search_over_a_whole_training(trials, teacher, tmp_path):
    """Second derivatives through attention. With trials the best of what has been tried is kept, equal weights among it."""
    overrides = [*overrides_of(teacher, 4), "training.epochs=1", "search.horizon=whole", f"search.trials={trials}"]
    schedule = distpro.search(SEARCH, tmp_path / "run", [*overrides, "data.samples=60"])
    assert schedule.reading == "log" and schedule.weights.isfinite().all() and (schedule.weights > 0).all()
    if not trials:
        assert schedule.weights[-1].std() > 0
    found = [json.loads(p.read_text()) for p in (tmp_path / "run" / "trials").glob("*/result.json")]
    assert len(found) == trials and all(0 <= result["accuracy"] <= 100 and result["loss"] > 0 for result in found)


def test_the_search_learns_weights_of_its_terms(search):
    schedule = Schedule.load(search / "alpha.pt")
    assert len(schedule) == 7 and schedule.weights.isfinite().all()
    assert {"kd", "tinybert", "minilm"} <= set(schedule.keys) and sum("<-" in key for key in schedule.keys) == 4
    assert (schedule.alpha_tilde[0] != schedule.alpha_tilde[-1]).all()
    facts = json.loads((search / "data.json").read_text())
    assert schedule.meta["data"]["tokenizer"]["vocabulary"] == facts["tokenizer"]["vocabulary"]


def test_a_schedule_in_words_shows_no_whole_vocabulary(search, capsys):
    assert main(["inspect", str(search / "alpha.pt")]) == 0
    said = capsys.readouterr().out
    assert "vocabulary [[PAD], [UNK], [CLS], [SEP], [MASK]" in said and "... 1,500 in all]" in said
    assert max(map(len, said.splitlines())) < 1200


def test_a_search_that_is_stopped_and_one_that_dies_come_to_the_same(search, teacher, tmp_path, monkeypatch):
    """Stopped after step 3; resumed, it fails after 6 and goes on from the checkpoint of the epoch's end, 4. Dropout included."""
    stop_after(monkeypatch, [3])
    with pytest.raises(Interrupted):
        searched(teacher, tmp_path)
    original = Trainer.train_step

    def die(self, batch):
        if self.step == 6:
            raise MemoryError
        original(self, batch)

    monkeypatch.setattr(Trainer, "train_step", die)
    with pytest.raises(MemoryError):
        searched(teacher, tmp_path, resume=True)
    assert load_safely(tmp_path / "checkpoint.pt")["step"] == 4
    monkeypatch.setattr(Trainer, "train_step", original)
    searched(teacher, tmp_path, resume=True)
    ours, theirs = (Schedule.load(folder / "alpha.pt") for folder in (tmp_path, search))
    assert torch.equal(ours.alpha_tilde, theirs.alpha_tilde) and torch.equal(ours.weights, theirs.weights)
    states = [load_safely(folder / "checkpoint.pt") for folder in (tmp_path, search)]
    for state in states:
        del state["seconds"]
    assert differences(*states) == []


@pytest.mark.parametrize("config", RETRAINS, ids=lambda path: path.stem)
def test_a_retrain(config, search, teacher, tmp_path):
    schedule = search / "alpha.pt" if config.stem == "sst2_searched" else None
    result = distpro.retrain(config, schedule, tmp_path / "run", overrides_of(teacher, 2))
    assert result.metrics["step"] == 2 and 0 <= result.metrics["accuracy"] <= 100
    assert all(math.isfinite(value) for value in result.metrics.values())
    found = distpro.evaluate(tmp_path / "run")
    assert found == pytest.approx({name: result.metrics[name] for name in found}, rel=1e-5)


@pytest.mark.parametrize("set", OTHERS)
def test_the_other_sets(set, made, tmp_path_factory, tmp_path):
    config = ROOT / "retrain_configs" / f"{set}_kd.yaml"
    teacher = teacher_of(made, tmp_path_factory, set)
    result = distpro.retrain(config, None, tmp_path / "run", overrides_of(teacher, 2))
    assert f"best_{HEADLINES[set]}" in result.metrics


def test_the_constants_are_torchdistill_s():
    """Its sample configs for GLUE: temperature, share of the labels, batch size, epochs."""
    stated = {"cola": (7, 16, 3), "sst2": (3, 32, 3), "mrpc": (11, 16, 5), "rte": (5, 32, 3)}
    for set, (temperature, batch_size, epochs) in stated.items():
        config = read_config(ROOT / "retrain_configs" / f"{set}_kd.yaml")
        (term,), training = config.terms, config.training
        assert (term.params["temperature"], term.weight, config.task_weight) == (temperature, 0.1, 0.9)
        assert (training.batch_size, training.epochs, training.clip_norm) == (batch_size, epochs, 1)
        rate = training.learning_rate
        assert (training.optimizer.name, training.optimizer.lr, training.optimizer.weight_decay) == ("adamw", 1e-4, 0)
        assert (rate.name, rate.warmup_epochs) == ("linear", 0)


@pytest.fixture
def student(made, search, tmp_path_factory):
    """A run whose student is exported."""
    if "student" not in made:
        made["student"] = tmp_path_factory.mktemp("student") / "run"
        made["metrics"] = distpro.train(
            ROOT / "retrain_configs" / "sst2_none.yaml", made["student"], [*SMALL, "training.max_steps=3"]
        ).metrics
    return made["student"]


def answers(student):
    """The student's logits of texts of other numbers than what it was exported with, by plain transformers."""
    config = read_config(student / "config.yaml")
    data = load_data("glue", config.data.root, **config.data.params)
    batch = data.example(5).inputs
    assert batch["input_ids"].shape != data.example(2).inputs["input_ids"].shape
    own = {**config.student.params, "vocab_size": 1500, "num_labels": 2}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**own)).eval()
    model.load_state_dict(load_safely(student / "student.pt"))
    with torch.no_grad():
        return model(**batch).logits, batch, model


def test_the_exported_program_gives_the_same_numbers(student):
    logits, batch, _ = answers(student)
    program = torch.export.load(export(student, "pt2")).module()
    torch.testing.assert_close(program(**batch).logits, logits, rtol=1e-4, atol=1e-6)


def test_onnx_gives_the_same_numbers(student):
    pytest.importorskip("onnxscript")
    logits, batch, _ = answers(student)
    found = onnx_answers(export(student, "onnx"), batch)
    assert list(found) == ["logits"]
    torch.testing.assert_close(found["logits"], logits, **ROUNDING)


def test_a_folder_of_transformers_is_written_and_evaluated(student, made, tmp_path):
    logits, batch, plain = answers(student)
    folder = export(student, "transformers", tmp_path / "folder")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True).eval()
    assert {file.stat().st_mode for file in folder.iterdir() if file.is_file()} == {
        (folder / "config.json").stat().st_mode
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
    sentence = tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True)
    with torch.no_grad():
        found = model(**tokenizer(sentence, return_tensors="pt")).logits
    torch.testing.assert_close(found, logits[:1], rtol=1e-4, atol=1e-6)
    metrics = distpro.evaluate(folder, SMALL, ROOT / "retrain_configs" / "sst2_none.yaml")
    assert metrics == pytest.approx({name: made["metrics"][name] for name in metrics}, rel=1e-6)
    weights = distpro.evaluate(folder / "model.safetensors", SMALL, ROOT / "retrain_configs" / "sst2_none.yaml")
    assert weights == metrics


def test_the_run_s_own_vocabulary_is_evaluated(student, made, monkeypatch):
    """Not one that another version of the trainer would make of the texts."""
    monkeypatch.setattr("distpro.data.tokens._wordpieces", lambda *_: pytest.fail("a vocabulary was made anew"))
    found = distpro.evaluate(student)
    assert found == pytest.approx({name: made["metrics"][name] for name in found}, rel=1e-6)


def test_a_teacher_of_another_tokenizer_is_refused(teacher, tmp_path):
    given = [*overrides_of(teacher, 2), "data.params.tokenizer={train: {size: 1400}}"]
    with pytest.raises(UserError, match=r"its run had another tokenizer \(1500 tokens\) than these data \(1400\)"):
        distpro.retrain(ROOT / "retrain_configs" / "sst2_kd.yaml", None, tmp_path / "run", given)
    run = [*overrides_of(teacher, 2), f"data.params.tokenizer={teacher}"]
    assert distpro.retrain(ROOT / "retrain_configs" / "sst2_kd.yaml", None, tmp_path / "run", run).metrics["step"] == 2


def test_the_teacher_s_answers_are_cached_and_its_tokens_are_not(teacher, tmp_path):
    given = [*overrides_of(teacher, 12), f"cache={{folder: {tmp_path / 'cache'}}}"]
    config = ROOT / "retrain_configs" / "sst2_kd.yaml"
    cached = distpro.retrain(config, None, tmp_path / "run", given).metrics
    plain = distpro.retrain(config, None, tmp_path / "plain", overrides_of(teacher, 12)).metrics
    assert cached["loss"] == pytest.approx(plain["loss"], rel=1e-4)
    again = distpro.retrain(config, None, tmp_path / "again", [*given, "data.params.bucket=0"])  # in another order
    assert math.isfinite(again.metrics["loss"])
    with pytest.raises(UserError, match="'bert.embeddings' of the teacher are tokens"):
        other = [*overrides_of(teacher, 2), f"cache={{folder: {tmp_path / 'other'}}}"]
        distpro.retrain(ROOT / "retrain_configs" / "sst2_tinybert.yaml", None, tmp_path / "tiny", other)


def test_scores(tmp_path):
    """STS-B's form: a training, its metrics, and a distillation of embeddings, as a score has no classes to soften."""
    (tmp_path / "STS-B").mkdir()
    rows = [f"a film of plot {n}\tthe film {n % 7}\t{n % 6}" for n in range(40)]
    for part in ("train", "dev"):
        (tmp_path / "STS-B" / f"{part}.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *rows]) + "\n")
    given = [*SMALL[:-1], f"data.root={tmp_path}", "data.params={set: stsb, tokenizer: {train: {size: 200}}}"]
    given += ["task={name: text_regression, headline: spearman}", "training.max_steps=2"]
    result = distpro.train(ROOT / "search_configs" / "sst2_teacher.yaml", tmp_path / "teacher", given)
    assert "best_spearman" in result.metrics and -100 <= result.metrics["pearson"] <= 100
    l2 = "terms=[{loss: l2, weight: 1, student_taps: ['classifier:input'], teacher_taps: ['classifier:input']}]"
    config, given = (
        ROOT / "retrain_configs" / "sst2_kd.yaml",
        [*given, f"teacher.checkpoint={tmp_path}/teacher/student.pt"],
    )
    assert distpro.retrain(config, None, tmp_path / "run", [*given, l2]).metrics["step"] == 2
    with pytest.raises(UserError, match="the task gives none of the model's output"):
        distpro.retrain(config, None, tmp_path / "kd", given)
