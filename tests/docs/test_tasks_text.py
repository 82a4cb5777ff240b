"""docs/tasks/text.md: its configs train, its commands run, its loop is one."""

from __future__ import annotations

import re
import shlex

import pytest
import torch
import yaml
from torch.utils.data import DataLoader

import distpro
from distpro.cli import main
from distpro.losses import build_loss
from tests.conftest import ROOT
from tests.data.test_text import write

transformers = pytest.importorskip("transformers")

PAGE = (ROOT / "docs" / "tasks" / "text.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "reviews")
    for text in blocks("yaml")[1:]:
        name = text.splitlines()[0].removeprefix("# ")
        (tmp_path / name).write_text(text + "threads: 1\nprecision: float32\ntracking: {tensorboard: false}\n")
    return tmp_path


def test_the_data_of_any_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "reviews")
    for file in folder.iterdir():
        file.write_text(file.read_text().replace("\tgood", "\t1").replace("\tbad", "\t0"))
    stated = yaml.safe_load(blocks("yaml")[0])["data"]
    data = distpro.data.load_data(stated["name"], stated["root"], **stated["params"])
    assert data.names == ["bad", "good"] and data.train.bucket == 16


@pytest.mark.slow
def test_the_commands_run(here, capsys):
    commands = [shlex.split(line)[1:] for line in blocks("sh")[0].splitlines()]
    assert [command[0] for command in commands] == [
        "train", "search", "search", "retrain", "evaluate", "export", "evaluate",
    ]  # fmt: skip
    for command in commands:
        assert main(command) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert said.count('"matthews"') == 2
    results = re.findall(r'"loss": ([\d.]+)', said)
    assert results[-1] == results[-2]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(here / "student", local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(here / "student", local_files_only=True)
    assert model(**tokenizer("the plot was good", return_tensors="pt")).logits.shape == (1, 2)


def test_the_loop_is_one(here):
    accelerate = pytest.importorskip("accelerate")
    data = distpro.data.load_data("text", "reviews", **yaml.safe_load(blocks("yaml")[1])["data"]["params"])
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    teacher, student = (
        transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=data.vocabulary.size, **sizes))
        for _ in range(2)
    )
    before = student.classifier.weight.clone()
    names = {
        "distpro": distpro,
        "accelerator": accelerate.Accelerator(cpu=True),
        "teacher": teacher,
        "student": student,
        "terms": [distpro.Term(build_loss("kd", [(2,)], [(2,)]), "kd", weight=0.5)],
        "inputs": data.example(2).inputs,
        "optimizer": torch.optim.SGD(student.parameters(), 0.1),
        "loader": DataLoader(data.train, 8, collate_fn=data.train.collate_fn),
    }
    exec(blocks("python")[0], names)
    assert names["parts"]["kd"] > 0 and not torch.equal(student.classifier.weight, before)


def test_the_shipped_configs_are_there():
    for path in set(re.findall(r"\b(?:search_configs|retrain_configs)/[\w/]+\.yaml", PAGE)):
        assert (ROOT / path).is_file(), path
