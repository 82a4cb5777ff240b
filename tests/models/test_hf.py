"""Models of transformers by class, config file and folder; tokenizers that do not fit them; nothing downloaded or run."""

from __future__ import annotations

import json
import sys
from typing import NamedTuple

import pytest
import torch

from distpro.build.reading import reading_of
from distpro.config.schema import ModelConfig
from distpro.data.tokens import build_tokenizer, of_folder, of_vocabulary
from distpro.models import accepted, build_model, stage_taps
from pathways import Call
from pathways.registry import UserError
from pathways.tapped import Tapped

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SMALL |= {"max_position_embeddings": 32}
BERT = "hf:BertForSequenceClassification"
TOKENIZER = of_vocabulary({"vocabulary": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film"]}, "test")


class Tokens(NamedTuple):
    size: int = 7
    pad: int = 0
    longest: int = 10
    digest: str = TOKENIZER.digest


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whoever asks for a connection is told that there is none."""

    def refuse(*_args, **_more):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.fixture
def folder(tmp_path):
    """A BERT without a classifier, and its tokenizer."""
    torch.manual_seed(1)
    transformers.BertModel(transformers.BertConfig(vocab_size=7, **SMALL)).save_pretrained(tmp_path / "bert")
    TOKENIZER.fast.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.slow
def test_a_class_with_the_parameters_of_its_config():
    model = build_model(BERT, num_classes=3, tokens=Tokens(), **SMALL)
    config = model.config
    assert type(model) is transformers.BertForSequenceClassification and model.training
    assert (config.num_labels, config.vocab_size, config.pad_token_id, config.hidden_size) == (3, 7, 0, 16)
    assert build_model(BERT, num_classes=3, num_labels=5, vocab_size=9, **SMALL).classifier.out_features == 5
    torch.manual_seed(0)
    first = build_model(BERT, num_classes=3, **SMALL).state_dict()
    torch.manual_seed(0)
    again = build_model(BERT, num_classes=3, **SMALL).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.slow
def test_stages_and_embedding_are_stated():
    model = build_model(BERT, num_classes=3, tokens=Tokens(), **SMALL)
    taps = stage_taps(model)
    assert taps.post == taps.pre == ("bert.encoder.layer.0", "bert.encoder.layer.1")
    assert (taps.stem, taps.embedding) == ("bert.embeddings", "classifier:input")
    call = Call((), {"input_ids": torch.ones(2, 5, dtype=torch.int64)})
    reading = reading_of(ModelConfig(model=BERT), model, call, lambda output: output.logits)
    assert reading.embedding == "classifier:input" and reading.stages == taps.post
    roberta = build_model("hf:RobertaForSequenceClassification", num_classes=2, vocab_size=9, **SMALL)
    assert stage_taps(roberta).embedding == "classifier.out_proj:input"
    distil = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 32, "vocab_size": 9}
    distil_bert = build_model("hf:DistilBertForSequenceClassification", num_classes=2, **distil)
    assert stage_taps(distil_bert).post == ("distilbert.transformer.layer.0", "distilbert.transformer.layer.1")


def test_an_image_model_is_one_as_any():
    name = "hf:ViTForImageClassification"
    sizes = {k: v for k, v in SMALL.items() if k != "max_position_embeddings"}
    model = build_model(name, num_classes=4, image_size=16, patch_size=8, **sizes)
    images = torch.randn(2, 3, 16, 16)
    assert model.eval()(images).logits.shape == (2, 4)
    assert torch.equal(model(images).logits, model(pixel_values=images).logits)
    assert len(stage_taps(model).post) == 2
    with pytest.raises(UserError, match="reads no tokens, but the data are texts"):
        build_model(name, tokens=Tokens(), image_size=16, patch_size=8, **sizes)


@pytest.mark.slow
def test_a_config_file_gives_random_weights(folder):
    model = build_model(f"hf:{folder / 'config.json'}", num_classes=2, tokens=Tokens())
    assert (
        type(model) is transformers.BertForSequenceClassification
    )  # the config names BertModel, which has no classifier
    stored = transformers.BertModel.from_pretrained(folder)
    assert not torch.equal(model.bert.embeddings.word_embeddings.weight, stored.embeddings.word_embeddings.weight)


@pytest.mark.slow
def test_a_folder_gives_its_weights_where_that_is_asked_for(folder, capsys):
    stored = transformers.BertModel.from_pretrained(folder).state_dict()
    capsys.readouterr()
    model = build_model(f"hf:{folder}", num_classes=3, tokens=Tokens(), pretrained=True)
    assert "no weights for classifier.bias, classifier.weight: they start at random" in capsys.readouterr().err
    own = model.bert.state_dict()
    assert stored.keys() == own.keys() and all(torch.equal(own[name], stored[name]) for name in own)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and model.classifier.out_features == 3
    random = build_model(f"hf:{folder}", num_classes=3, tokens=Tokens())
    assert not torch.equal(random.bert.embeddings.word_embeddings.weight, own["embeddings.word_embeddings.weight"])


@pytest.mark.slow
def test_a_whole_classifier_of_a_folder(tmp_path, capsys):
    model = build_model(BERT, num_classes=3, tokens=Tokens(), **SMALL)
    model.save_pretrained(tmp_path / "three")
    capsys.readouterr()
    again = build_model(f"hf:{tmp_path / 'three'}", num_classes=3, pretrained=True)
    assert capsys.readouterr().err == ""
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    with pytest.raises(UserError, match=r"classifier.bias is \[3\] in .*, \[2\] in the model"):
        build_model(f"hf:{tmp_path / 'three'}", num_classes=2, pretrained=True)


def test_a_relative_folder_is_looked_for_among_the_data(folder, monkeypatch):
    monkeypatch.setenv("DISTPRO_DATA", str(folder.parent))
    assert build_model("hf:bert", num_classes=2).config.hidden_size == 16


def test_it_is_no_code_of_the_user_s():
    facts = {"num_classes": 2, "tokens": Tokens()}
    assert accepted(BERT, facts) == accepted("hf:some/folder", facts) == facts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (Tokens(size=8), "the tokenizer has 8 tokens, the model's embedding 7: give the model's own tokenizer"),
        (Tokens(pad=3), "the tokenizer pads with 3, the model's pad_token_id is 0"),
        (Tokens(longest=33), r"texts of 33 tokens, the model takes 32 .*data.params.max_length=32"),
        (Tokens(digest="other"), "the weights were trained with the tokenizer of .*, the data have another"),
    ],
)
def test_a_tokenizer_that_does_not_fit(folder, tokens, message):
    build_model(f"hf:{folder}", tokens=Tokens(), pretrained=True)
    with pytest.raises(UserError, match=message):
        build_model(f"hf:{folder}", tokens=tokens, pretrained=True)


def test_a_vocabulary_of_another_form_is_compared_too(tmp_path, capsys):
    """``vocab.txt``, as older folders have it; with none at all, what cannot be known is said."""
    model = build_model(BERT, num_classes=2, tokens=Tokens(), **SMALL)
    model.save_pretrained(tmp_path)
    capsys.readouterr()
    build_model(f"hf:{tmp_path}", tokens=Tokens(), pretrained=True)
    assert "whether the data have the one that the weights were trained with is not known" in capsys.readouterr().err
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ngood\nbad\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    own = of_folder(tmp_path, "here").digest
    build_model(f"hf:{tmp_path}", tokens=Tokens(digest=own), pretrained=True)
    assert capsys.readouterr().err == ""
    with pytest.raises(UserError, match="the data have another"):
        build_model(f"hf:{tmp_path}", tokens=Tokens(digest="other"), pretrained=True)


def test_roberta_s_positions_begin_behind_its_padding():
    """514 of its table are 512 tokens."""
    given = {**SMALL, "vocab_size": 9, "pad_token_id": 1}
    name = "hf:RobertaForSequenceClassification"
    model = build_model(name, tokens=Tokens(9, 1, 30, ""), **given)
    ids = torch.randint(2, 9, (1, 30))
    assert model.eval()(ids).logits.shape == (1, 2)
    with pytest.raises(UserError, match="texts of 31 tokens, the model takes 30"):
        build_model(name, tokens=Tokens(9, 1, 31, ""), **given)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.randint(2, 9, (1, 31)))


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("hf:BertForSequenceClasification", {}, "did you mean 'BertForSequenceClassification'"),
        ("hf:bert-base-uncased", {}, "nothing at bert-base-uncased.*nothing is downloaded"),
        ("hf:BertTokenizer", {}, "transformers has no model class 'BertTokenizer'"),
        (BERT, {"hiden_size": 8}, "BertConfig has no 'hiden_size'; did you mean 'hidden_size'"),
        (BERT, {**SMALL, "hidden_size": 15}, "15.*multiple"),
        (BERT, {"pretrained": True}, "pretrained needs a folder"),
    ],
)
def test_wrong_names(name, params, message):
    with pytest.raises(UserError, match=message):
        build_model(name, **params)


def change(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_code_of_a_folder_does_not_run(folder, tmp_path):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    change(folder, auto_map={"AutoModelForSequenceClassification": "evil.Model"})
    with pytest.raises(UserError, match="code of its own"):
        build_model(f"hf:{folder}", pretrained=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_damaged_folders(folder, tmp_path):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"hf:{folder}"):
        build_model(f"hf:{folder}", pretrained=True)
    weights.unlink()
    with pytest.raises(UserError, match=f"hf:{folder}"):
        build_model(f"hf:{folder}", pretrained=True)
    change(folder, model_type="brt")
    with pytest.raises(UserError, match="no model_type 'brt'; did you mean 'bert'"):
        build_model(f"hf:{folder}")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not readable"):
        build_model(f"hf:{folder}")
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match="holds no config.json"):
        build_model(f"hf:{folder}")


def test_weights_of_another_model(folder):
    """Of which none would be loaded."""
    transformers.DistilBertModel(
        transformers.DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=8, vocab_size=7)
    ).save_pretrained(folder.parent / "other")
    (folder / "model.safetensors").write_bytes((folder.parent / "other" / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="holds no weights of BertForSequenceClassification"):
        build_model(f"hf:{folder}", pretrained=True)


def test_other_models_are_traced_as_before():
    """With its first model transformers gives `torch.nn.Module` a method of its own, `smart_apply`."""
    if hasattr(torch.nn.Module, "smart_apply"):
        del torch.nn.Module.smart_apply  # which transformers makes again when it needs it
    early = Tapped(build_model("resnet8", num_classes=3), ["layer1"], torch.randn(2, 3, 16, 16))
    build_model(BERT, num_classes=3, tokens=Tokens(), **SMALL)
    assert hasattr(torch.nn.Module, "smart_apply")
    late = Tapped(build_model("resnet8", num_classes=3), ["layer1"], torch.randn(2, 3, 16, 16))
    for tapped in (early, late):
        assert tapped.traced
        tapped(torch.randn(2, 3, 16, 16))
        assert tapped.traced


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs transformers: pip install 'distpro\[text\]'"):
        build_model(BERT)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta-v2"])
def test_a_folder_without_a_vocabulary_has_no_tokenizer(kind, tmp_path):
    """transformers makes one of special tokens alone, by which every word is unknown."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UserError, match="holds no tokenizer"):
        build_tokenizer(str(tmp_path), "data", [])


@pytest.mark.slow
def test_models_without_a_fused_attention_take_their_own():
    model = build_model("hf:DebertaV2ForSequenceClassification", num_classes=3, tokens=Tokens(), **SMALL)
    assert model(torch.tensor([[2, 5, 6, 3]])).logits.shape == (1, 3)
