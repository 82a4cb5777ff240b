"""Data sets of texts: GLUE as it is, tables with every mistake, tokenizers, padding and buckets."""

import io
import json
import lzma
import subprocess
import sys
import tarfile

import pytest
import torch

from distpro.data import load_data, make_loader, split
from distpro.data.tokens import as_trained
from distpro.tasks import Classification
from pathways.registry import UserError
from tests.conftest import ROOT

transformers = pytest.importorskip("transformers")

WORDS = "a the film plot is was good bad dull great not very and but with more less moving story actor".split()
COUNTS = {"train": 40, "dev": 12}


def rows_of(part):
    draw = torch.Generator().manual_seed(len(part))
    found = []
    for n in range(COUNTS[part]):
        length = int(torch.randint(2, 12, (1,), generator=draw))
        words = [WORDS[int(i)] for i in torch.randint(len(WORDS), (length,), generator=draw)]
        found.append((" ".join(words), ["bad", "good"][n % 2]))
    return found


def write(folder):
    folder.mkdir(exist_ok=True)
    for part in COUNTS:
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in rows_of(part))]
        (folder / f"{part}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def table(tmp_path):
    return write(tmp_path / "set")


FILES = {"train": "train.tsv", "test": "dev.tsv"}
SMALL = {"train": {"size": 120}}


def load(root, **options):
    given = {"files": FILES, "text": "sentence", "tokenizer": SMALL, **options}
    return load_data("text", root, **given)


def texts_of(data, part):
    fast = data.tokenizer.fast
    samples = [part[n]["input_ids"] for n in range(len(part))]
    return [fast.decode(ids, skip_special_tokens=True) for ids in samples]


@pytest.mark.parametrize(
    ("name", "train", "test", "ones"),
    [("cola", 8551, 1043, 6023), ("mrpc", 3667, 408, 2473), ("rte", 2490, 277, 1241), ("sst2", 67349, 872, 37569)],
)
@pytest.mark.slow
def test_glue(name, train, test, ones, data_folder, monkeypatch):
    """Sizes as the data's page states them; the labels' counts as GLUE's own readers give them."""
    if not (data_folder / "glue").is_dir():
        pytest.skip(f"no GLUE in {data_folder}")
    monkeypatch.setenv("DISTPRO_DATA", str(data_folder))
    data = load_data("glue", "glue/glue_small.tar.xz", set=name, tokenizer={"train": {"size": 1500}})
    assert (len(data.train), data.validation, len(data.test)) == (train, None, test)
    assert data.num_classes == 2 and data.train.targets.bincount().tolist() == [train - ones, ones]
    batch = data.example(3)
    paired = name in ("mrpc", "rte")
    assert set(batch.inputs) == {"input_ids", "attention_mask"} | ({"token_type_ids"} if paired else set())
    with tarfile.open(data_folder / "glue" / "glue_small.tar.xz") as archive:
        folder = {"cola": "CoLA", "mrpc": "MRPC", "rte": "RTE", "sst2": "SST-2"}[name]
        lines = archive.extractfile(f"{folder}/dev.tsv").read().decode("utf-8-sig").split("\n")
    head = 0 if name == "cola" else 1
    column = {"cola": 3, "mrpc": 3, "rte": 1, "sst2": 0}[name]
    stored = lines[head].rstrip("\r").split("\t")[column].lower()
    shown = texts_of(data, [data.test[0]])[0]
    assert shown.replace(" ", "")[:25] == stored.replace(" ", "")[:25]


def test_what_is_stored_is_read(table):
    data = load(table)
    assert (len(data.train), data.validation, len(data.test)) == (40, None, 12)
    assert data.names == ["bad", "good"] and data.num_classes == 2
    assert data.train.targets.tolist() == [0, 1] * 20
    assert texts_of(data, data.train) == [text for text, _ in rows_of("train")]
    assert data.image_shape is None
    assert data.facts["tokenizer"]["vocabulary"][:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def test_archives_csv_and_jsonl_hold_the_same(table, tmp_path):
    expected = load(table).signature["sha256"]
    with tarfile.open(tmp_path / "a.tar.xz", "w:xz") as archive:
        archive.add(table, "inner")
    assert load(tmp_path / "a.tar.xz").signature["sha256"] == expected
    for part in COUNTS:
        rows = rows_of(part)
        (table / f"{part}.csv").write_text("label,sentence\n" + "".join(f'{label},"{text}"\n' for text, label in rows))
        (table / f"{part}.jsonl").write_text("".join(json.dumps({"sentence": t, "label": c}) + "\n" for t, c in rows))
    for kind in ("csv", "jsonl"):
        assert load(table, files={"train": f"train.{kind}", "test": f"dev.{kind}"}).signature["sha256"] == expected


def test_quotes_are_text_in_tsv_and_a_mark_of_order_is_none(tmp_path):
    """MRPC's: a quote that is never closed, and a byte-order mark before the header."""
    (tmp_path / "train.tsv").write_bytes('\ufefflabel\ta\tb\n0\t"a film\tthe plot\n1\tgood\tgreat "plot\n'.encode())
    data = load(tmp_path, files={"train": "train.tsv", "test": "train.tsv"}, text="a", pair="b")
    assert texts_of(data, data.train) == ['" a film the plot', 'good great " plot']
    assert data.train[0]["token_type_ids"].tolist() == [0] * 5 + [1] * 3


def test_columns_by_number(tmp_path):
    (tmp_path / "train.tsv").write_text("x\t1\t*\tgood film\nx\t0\t\tbad film\n")
    data = load(tmp_path, files={"train": "train.tsv", "test": "train.tsv"}, text=3, label=1, header=False)
    assert texts_of(data, data.train) == ["good film", "bad film"] and data.train.targets.tolist() == [1, 0]


def test_scores(tmp_path):
    """STS-B's form, read by the data set of that name too."""
    (tmp_path / "STS-B").mkdir()
    for part in ("train", "dev"):
        lines = [f"a film\tthe film\t{score}" for score in (5.0, 2.5, 0)]
        (tmp_path / "STS-B" / f"{part}.tsv").write_text("sentence1\tsentence2\tscore\n" + "\n".join(lines) + "\n")
    data = load_data("glue", str(tmp_path), set="stsb", tokenizer=SMALL)
    assert data.regression and data.num_classes is None
    assert data.train.targets.tolist() == [5.0, 2.5, 0.0] and data.train.targets.dtype == torch.float32
    (tmp_path / "STS-B" / "dev.tsv").write_text("sentence1\tsentence2\tscore\na\tb\tmany\n")
    with pytest.raises(UserError, match=r"dev.tsv, line 2: the score 'many' is not a finite number"):
        load_data("glue", str(tmp_path), set="stsb", tokenizer=SMALL)


def test_batches_are_as_long_as_their_longest_text(table):
    data = load(table)
    loader = make_loader(data, data.train, 8, training=True, drop_last=True)
    for batch in loader.epoch(0):
        mask = batch.inputs["attention_mask"]
        assert mask[:, -1].any() and batch.inputs["input_ids"].shape == mask.shape
        assert (batch.inputs["input_ids"][mask == 0] == data.vocabulary.pad).all()
        assert torch.equal(mask.sum(1), data.train.lengths[batch.index])
        assert torch.equal(batch.target, data.train.targets[batch.index])
    assert data.train.lengths.max() == data.vocabulary.longest == max(len(t.split()) for t, _ in rows_of("train")) + 2


def test_buckets_have_less_padding_and_every_sample_once(table):
    def padding(bucket):
        data = load(table, bucket=bucket)
        loader = make_loader(data, data.train, 4, training=True, seed=3)
        epochs = [list(loader.epoch(e)) for e in (0, 1)]
        for batches in epochs:
            assert sorted(torch.cat([b.index for b in batches]).tolist()) == list(range(40))
        assert not torch.equal(*(torch.cat([b.index for b in batches]) for batches in epochs))
        again = torch.cat([b.index for b in loader.epoch(1, start=4)])
        assert torch.equal(again, torch.cat([b.index for b in epochs[1][4:]]))
        return sum(int((b.inputs["attention_mask"] == 0).sum()) for batches in epochs for b in batches)

    assert padding(5) < 0.6 * padding(0)


def test_evaluation_is_in_order_whatever_the_buckets(table):
    data = load(table, bucket=5)
    batches = make_loader(data, data.test, 5, training=False).epoch(0)
    assert torch.cat([b.index for b in batches]).tolist() == list(range(12))


def test_a_seeded_validation_part(table):
    data, again, other = (load(table, validation=0.25, split_seed=s) for s in (0, 0, 1))
    assert (len(data.train), len(data.validation)) == (30, 10)
    assert data.signature == again.signature != other.signature
    both = {*data.train.indices, *data.validation.indices}
    assert len(both) == 40
    few = load(table, samples=10)
    assert len(few.train) == 10 and few.train.dataset.targets[few.train.indices].sum() == 5  # stratified
    assert [len(part) for part in split(data.train, 0.2, 0)] == [6, 24]


def test_longer_texts_are_cut_which_is_said(table, capsys):
    data = load(table, max_length=6)
    said = capsys.readouterr().err
    over = sum(len(text.split()) > 4 for text, _ in rows_of("train"))
    assert f"{over} of the 40 samples of the train part are longer than 6 tokens and are cut" in said
    assert data.vocabulary.longest == 6
    ids = data.train[next(n for n, (t, _) in enumerate(rows_of("train")) if len(t.split()) > 4)]["input_ids"]
    assert len(ids) == 6 and ids[-1] == data.tokenizer.fast.sep_token_id


@pytest.mark.slow
def test_the_vocabulary_is_the_same_in_every_process(table):
    """The trainer's own numbers follow a hash table that is seeded anew in each."""
    code = (
        "import sys; from distpro.data import load_data; "
        f"d = load_data('text', {str(table)!r}, files={FILES!r}, text='sentence', tokenizer={SMALL!r}); "
        "print(d.tokenizer.digest)"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert other.stdout == load(table).tokenizer.digest + "\n"
    assert load(table, samples=4).tokenizer.digest == load(table).tokenizer.digest  # of all training texts


@pytest.mark.slow
def test_a_tokenizer_of_a_folder_and_of_a_run(table, tmp_path):
    own = load(table)
    own.tokenizer.fast.save_pretrained(tmp_path / "saved")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "data.json").write_text(json.dumps(own.facts))
    for folder in ("saved", "run"):
        data = load(table, tokenizer=str(tmp_path / folder))
        assert data.tokenizer.digest == own.tokenizer.digest
        assert data.signature["sha256"] == own.signature["sha256"]
    assert "vocabulary" not in load(table, tokenizer=str(tmp_path / "saved")).facts["tokenizer"]


def test_a_run_s_vocabulary_is_taken_for_one_that_is_asked_for_alike(table):
    facts = json.loads(json.dumps(load(table).facts))
    stored = {key: facts["tokenizer"][key] for key in ("vocabulary", "lowercase", "trained")}
    assert as_trained(SMALL, facts) == stored
    assert as_trained({"train": {"size": 120, "lowercase": True}}, facts) == stored
    for other in ({"train": {"size": 121}}, "folder", None):
        assert as_trained(other, facts) == other
    assert as_trained(SMALL, {}) == SMALL
    assert load(table, tokenizer=stored).facts == facts


def test_it_is_bert_s_tokenizer(table):
    own = load(table).tokenizer
    (table / "vocab.txt").write_text("\n".join(own.facts["vocabulary"]))
    argument = "vocab" if int(transformers.__version__.split(".")[0]) > 4 else "vocab_file"
    theirs = transformers.BertTokenizerFast(**{argument: str(table / "vocab.txt")})
    for text in ("the Film was GOOD!", "naïve plot, unknowable"):
        assert own.fast(text)["input_ids"] == theirs(text)["input_ids"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"text": "sentense"},
            r"train.tsv has no column 'sentense'; did you mean 'sentence'\? \(it has: sentence, label\)",
        ),
        ({"labels": ["bad", "great"]}, r"train.tsv, line 3: unknown label 'good' \(allowed: bad, great\)"),
        ({"files": {"train": "trian.tsv", "test": "dev.tsv"}}, "no file trian.tsv; did you mean 'train.tsv'"),
        ({"files": {"train": "train.tsv"}}, "files must name a train and a test file"),
        ({"files": {**FILES, "dev": "dev.tsv"}}, "files has no part 'dev'"),
        ({"tokenizer": {"train": {"sise": 9}}}, "tokenizer.train has no 'sise'; did you mean 'size'"),
        ({"tokenizer": {"train": {"size": 10}}}, "size is a whole number from 100"),
        ({"tokenizer": 5}, "tokenizer must be a folder"),
        ({"tokenizer": "nowhere"}, "tokenizer: nothing at nowhere"),
        ({"tokenizer": {"vocabulary": ["a"]}}, r"the vocabulary lacks \[PAD\]"),
        ({"max_length": 2}, "max_length must be null or a whole number from 4"),
        ({"bucket": -1}, "bucket must be a whole number from 0"),
        ({"format": "xml"}, "format must be tsv, csv, jsonl"),
        ({"regression": True}, "line 2: the score 'bad' is not a finite number"),
        ({"regression": True, "labels": ["a", "b"]}, "labels are of classes"),
        ({"validation": 1.5}, "between 0 and 1"),
        ({"validation": "x"}, "validation must be null or a fraction between 0 and 1, got 'x'"),
        ({"labels": {"bad": "x", "good": "x"}}, "labels must be a list of at least two, each once"),
        ({"root": None}, "needs 'root'"),
    ],
)
def test_wrong_options(table, options, message):
    with pytest.raises(UserError, match=message):
        load(**{"root": table, **options})


def spoil(table, what):
    file = table / "train.tsv"
    lines = file.read_text().splitlines()
    if what == "empty text":
        lines[3] = " \tgood"
    elif what == "columns":
        lines[5] = "a film\tgood\tmore"
    elif what == "no rows":
        lines = lines[:1]
    elif what == "one label":
        lines = [lines[0], *lines[1::2]]
    file.write_text("\n".join(lines) + "\n")
    if what == "bytes":
        file.write_bytes(b"sentence\tlabel\n\xff\xfe\tgood\n")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("empty text", r"train.tsv, line 4: the text in column 'sentence' is empty"),
        ("columns", "train.tsv, line 6: 3 columns, but the header has 2"),
        ("no rows", "train.tsv holds no row"),
        ("one label", "the training part has one label, 'bad'"),
        ("bytes", "train.tsv is not UTF-8 text"),
    ],
)
def test_spoiled_tables_are_named(table, what, message):
    spoil(table, what)
    with pytest.raises(UserError, match=message):
        load(table)


def test_labels_have_no_blanks_around_them_and_are_not_empty(table):
    files, rows = {"train": "t.jsonl", "test": "dev.tsv"}, '{"sentence": "a", "label": "good "}\n' * 2
    (table / "t.jsonl").write_text(rows + '{"sentence": "b", "label": " bad"}\n')
    for labels in (None, ["bad ", "good"]):
        data = load(table, files=files, labels=labels)
        assert data.names == ["bad", "good"] and data.train.targets.tolist() == [1, 1, 0]
    (table / "t.csv").write_text("sentence,label\na film,good\na film,bad\nthe plot, \n")
    for options in ({}, {"labels": ["bad", "good"]}, {"regression": True}):
        with pytest.raises(UserError, match="t.csv, line 4: the label in column 'label' is empty"):
            load(table, files={**files, "train": "t.csv"}, **options)


def test_numbers_are_labels_and_other_ends_of_lines_are_text(table):
    rows = [
        '{"sentence": "a film\u2028of two lines", "label": 1}',
        '{"sentence": "b", "label": 1.0}',
        '{"sentence": "c", "label": 0}',
    ]
    (table / "t.jsonl").write_text("\n".join(rows), encoding="utf-8")
    data = load(table, files={"train": "t.jsonl", "test": "t.jsonl"}, labels={0: "bad", 1: "good"})
    assert data.names == ["bad", "good"] and [int(data.train[n]["labels"]) for n in range(3)] == [1, 1, 0]


def test_what_is_doubtful_of_labels_and_words_is_said(table, capsys):
    rows = '{"sentence": "a film", "label": 1}\n{"sentence": "the plot", "label": 0}\n'
    (table / "t.jsonl").write_text(rows)
    files = {"train": "t.jsonl", "test": "t.jsonl"}
    load(table, files=files, labels={0: "bad", 1: "good"})
    assert capsys.readouterr().err == ""
    load(table, files=files, labels={1: "good", 0: "bad"})
    assert "labels: '1' of the file is class 0, for the order says" in capsys.readouterr().err
    load(
        table,
        files=files,
        tokenizer={"vocabulary": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "PLOT"], "lowercase": False},
    )
    assert "the tokenizer does not know 100% of the words" in capsys.readouterr().err
    (table / "s.jsonl").write_text('{"sentence": "a", "label": 0.5}\n{"sentence": "b", "label": 1.5}\n')
    (table / "t.jsonl").write_text('{"sentence": "a", "label": 4.1}\n')
    with pytest.raises(
        UserError, match="'4.1' is no label of the training part: of scores, data.params.regression: true"
    ):
        load(table, files={"train": "s.jsonl", "test": "t.jsonl"})


def test_a_column_twice(table):
    (table / "t.tsv").write_text("sentence\tlabel\tlabel\na\t1\t0\n")
    with pytest.raises(UserError, match="t.tsv has 2 columns 'label'"):
        load(table, files={"train": "t.tsv", "test": "t.tsv"})


def test_texts_want_their_task(table):
    with pytest.raises(UserError, match="the data are texts, whose padding it would not leave out: task: text"):
        Classification().model_arguments(load(table))


def test_spoiled_json(table):
    files = {"train": "t.jsonl", "test": "t.jsonl"}
    for content, message in (
        ('{"sentence": "a", "label": 1}\n{"sentence"\n', "t.jsonl, line 2: no JSON"),
        ("[1]\n", "t.jsonl, line 1: expected an object, found list"),
        ('{"sentence": "a", "lable": 1}\n', r"t.jsonl, line 1 has no 'label'; did you mean 'lable'\?"),
        ('{"sentence": "a", "label": null}\n', "t.jsonl, line 1: 'label' must be a text or a number, got null"),
        ("[" * 100_000, "t.jsonl, line 1: no JSON"),
    ):
        (table / "t.jsonl").write_text(content)
        with pytest.raises(UserError, match=message):
            load(table, files=files)


def test_damaged_archives(table, tmp_path):
    with tarfile.open(tmp_path / "whole.tar.xz", "w:xz") as archive:
        archive.add(table, "set")
    whole = (tmp_path / "whole.tar.xz").read_bytes()
    for name, content in (
        ("cut.tar.xz", whole[: len(whole) // 2]),
        ("bits.tar.xz", whole[:200] + bytes(40) + whole[240:]),
        ("none.tar.xz", b"no archive"),
        ("inner.tar.xz", lzma.compress(b"no tar in it")),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: not a readable .tar.xz archive"):
            load(tmp_path / name)


def test_no_path_leads_out_of_an_archive(table, tmp_path):
    """Members are read by the names that the archive lists, links are none of them, and nothing is written to disk."""
    (tmp_path / "secret.tsv").write_text("sentence\tlabel\na\tb\n")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(table, "set")
        link = tarfile.TarInfo("set/link.tsv")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.tsv")
        archive.addfile(link)
        content = (table / "dev.tsv").read_bytes()
        outside = tarfile.TarInfo("../outside.tsv")
        outside.size = len(content)
        archive.addfile(outside, io.BytesIO(content))
    before = {p for p in tmp_path.rglob("*")}
    for file in ("link.tsv", "../secret.tsv", str(tmp_path / "secret.tsv")):
        with pytest.raises(UserError, match="no file"):
            load(tmp_path / "a.tar.gz", files={"train": file, "test": "dev.tsv"})
    assert {p for p in tmp_path.rglob("*")} == before and not (tmp_path.parent / "outside.tsv").exists()


def test_without_transformers(table, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs transformers: pip install 'distpro\[text\]'"):
        load(table)
