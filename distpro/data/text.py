"""Data sets of texts, or pairs of them, with a class or a number for each: GLUE's, and any table."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from distpro.console import warn
from distpro.data.augment import whole_number
from distpro.data.collating import root_of, stored_numbers
from distpro.data.counter import make_generator
from distpro.data.datasets import DATASETS, locate
from distpro.data.foreign import PARTS, ForeignDataset, split
from distpro.data.order import Plan
from distpro.data.tables import KINDS, Column, Columns, Layout, Rows, classes_of, numbers_of, read_rows
from distpro.data.tokens import Tokenizer, Vocabulary, build_tokenizer
from pathways.registry import UserError, nearest

DEFAULT_TOKENIZER: dict[str, Any] = {"train": {}}


class Texts(TorchDataset):
    """Tokenized samples. Each is a mapping of ``input_ids`` (L,) int64, ``token_type_ids`` where there are pairs, and ``labels``:
    a class number, or a float32 score.

    Attributes:
        lengths: (N,) int64, tokens of each sample.
        targets: (N,) int64 or float32.
        classes: names of the classes, None for scores.
        bucket: see `arrange`; 0: batches are drawn whatever their lengths.
    """

    def __init__(
        self,
        encoded: Sequence[tuple[Sequence[int], Sequence[int]]],
        targets: Tensor,
        classes: list[str] | None,
        pad: int,
        typed: bool,
        bucket: int = 0,
    ):
        self.lengths = torch.tensor([len(ids) for ids, _ in encoded])
        self._ends = [0, *self.lengths.cumsum(0).tolist()]
        flat = (np.fromiter((x for part in encoded for x in part[n]), np.int32) for n in range(2 if typed else 1))
        self._flat = [torch.from_numpy(x) for x in flat]
        self.targets, self.classes, self.pad, self.bucket = targets, classes, pad, bucket

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        place = slice(self._ends[row], self._ends[row + 1])
        names = ("input_ids", "token_type_ids")
        tokens = {name: flat[place].long() for name, flat in zip(names, self._flat, strict=False)}
        return {**tokens, "labels": self.targets[row]}

    def collate_fn(self, samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """A batch (N, L) as long as its longest sample; ``attention_mask`` is 1 where there is a token and 0 in the padding."""
        longest = max(len(sample["input_ids"]) for sample in samples)
        shape = (len(samples), longest)
        batch = {"input_ids": torch.full(shape, self.pad), "attention_mask": torch.zeros(shape, dtype=torch.int64)}
        if "token_type_ids" in samples[0]:
            batch["token_type_ids"] = torch.zeros(shape, dtype=torch.int64)
        for row, sample in enumerate(samples):
            length = len(sample["input_ids"])
            batch["attention_mask"][row, :length] = 1
            for name in batch.keys() & sample.keys():
                batch[name][row, :length] = sample[name]
        return {**batch, "labels": torch.stack([sample["labels"] for sample in samples])}

    def arrange(self, numbers: Tensor, plan: Plan, epoch: int) -> Tensor:
        """An epoch's order for batches of samples of like length, which have little padding: the shuffled samples, their
        ``numbers`` (N,), are sorted by length within every ``bucket`` batches, then the batches are shuffled. A function of
        (seed, epoch); positions (N,) in the order that was given."""
        size = plan.global_batch
        places = torch.arange(len(numbers))
        if not self.bucket:
            return places
        lengths = self.lengths[numbers]
        windows = [w[lengths[w].argsort(stable=True)] for w in places.split(size * self.bucket)]
        batches = list(torch.cat(windows).split(size))
        whole = [batch for batch in batches if len(batch) == size]
        shuffled = torch.randperm(len(whole), generator=make_generator(plan.seed, epoch, "buckets")).tolist()
        return torch.cat([*(whole[n] for n in shuffled), *batches[len(whole) :]])

    def digest(self, rows: Tensor) -> str:
        """sha256 of the tokens and targets of some rows."""
        found = hashlib.sha256()
        chosen = torch.zeros(len(self), dtype=torch.bool)
        chosen[rows] = True
        of_token = chosen.repeat_interleave(self.lengths)
        for tensor in (rows, *(flat[of_token] for flat in self._flat), self.lengths[rows], self.targets[rows]):
            found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.contiguous().numpy().tobytes())
        return found.hexdigest()


@dataclass(frozen=True, eq=False)
class TextData(ForeignDataset):
    """A data set of texts. Its parts are `Texts`, or subsets of them.

    Attributes:
        name: in a config.
        tokenizer: made the tokens.
        regression: whether the targets are scores, of which a model gives one.
    """

    name: str = "text"
    tokenizer: Tokenizer = field(default=None, repr=False)  # type: ignore[assignment]
    regression: bool = False

    @property
    def vocabulary(self) -> Vocabulary:
        """What a model has to fit."""
        parts = [part for part in (self.train, self.validation, self.test) if part is not None]
        longest = max(int(root_of(part).lengths.max()) for part in parts)
        fast = self.tokenizer.fast
        return Vocabulary(len(fast), fast.pad_token_id, longest, self.tokenizer.digest)

    @property
    def signature(self) -> dict[str, Any]:
        parts = {part: getattr(self, part) for part in PARTS}
        known = {name: part for name, part in parts.items() if part is not None}
        digests = (digest_of_part(part) for part in known.values())
        return {
            "name": self.name,
            **{name: len(part) for name, part in known.items()},
            "classes": self.num_classes,
            "longest": self.vocabulary.longest,
            "sha256": hashlib.sha256(" ".join(digests).encode()).hexdigest(),
        }

    @property
    def facts(self) -> dict[str, Any]:
        """The signature, and the tokenizer: all of it where it was made of the texts, else where it was."""
        return {**self.signature, "tokenizer": self.tokenizer.facts}


def digest_of_part(part: Any) -> str:
    """sha256 of the samples of a part of a `TextData`."""
    return str(root_of(part).digest(stored_numbers(part)))


@dataclass(frozen=True)
class _Glue:
    """One of GLUE's sets: folder, columns, names of the labels as the file has them (None: scores), and their own names."""

    folder: str
    columns: Columns
    labels: Mapping[str, str] | None
    header: bool = True


GLUE = {
    "cola": _Glue("CoLA", Columns(3, None, 1), {"0": "unacceptable", "1": "acceptable"}, header=False),
    "sst2": _Glue("SST-2", Columns("sentence", None, "label"), {"0": "negative", "1": "positive"}),
    "mrpc": _Glue("MRPC", Columns("#1 String", "#2 String", "Quality"), {"0": "different", "1": "equivalent"}),
    "rte": _Glue(
        "RTE",
        Columns("sentence1", "sentence2", "label"),
        {"entailment": "entailment", "not_entailment": "not_entailment"},
    ),
    "stsb": _Glue("STS-B", Columns("sentence1", "sentence2", "score"), None),
}


@DATASETS.register("glue")
def glue(
    root: str | None = None,
    set: str = "sst2",
    tokenizer: Any = None,
    max_length: int | None = 128,
    bucket: int = 0,
    validation: float | None = None,
    split_seed: int = 0,
) -> TextData:
    """GLUE's CoLA, SST-2, MRPC, RTE and STS-B as its authors lay them out, ``SST-2/train.tsv`` and ``dev.tsv``, in a folder or an
    archive. Its dev part, whose labels are public, is the test part here. The arguments are those of ``text``."""
    if set not in GLUE:
        raise UserError(f"dataset 'glue': set '{set}'{nearest(set, GLUE)} (allowed: {', '.join(GLUE)})")
    of = GLUE[set]
    return _load(
        "glue",
        locate("dataset 'glue'", root),
        {"train": f"{of.folder}/train.tsv", "test": f"{of.folder}/dev.tsv"},
        Layout("tsv", of.header),
        of.columns,
        of.labels,
        _Options(tokenizer, max_length, bucket, validation, split_seed),
    )


@DATASETS.register("text")
def text(
    root: str | None = None,
    files: Mapping[str, str | None] | None = None,
    text: str | int = "text",
    pair: str | int | None = None,
    label: str | int = "label",
    labels: Sequence[str] | Mapping[str, str] | None = None,
    regression: bool = False,
    format: str | None = None,
    header: bool = True,
    quotes: bool | None = None,
    tokenizer: Any = None,
    max_length: int | None = 128,
    bucket: int = 0,
    validation: float | None = None,
    split_seed: int = 0,
) -> TextData:
    """Texts in tables: .tsv, .csv or .jsonl files in a folder, a .zip or a .tar, which may be compressed.

    files: ``{train: train.tsv, test: test.tsv}``, and ``validation`` where there is such a file.
    text, pair, label: the columns, by name, or by number from 0 where there is no ``header``. pair: of a second text.
    labels: the labels in the order of their numbers, or {label in the file: its name}; by default those of the training
    part, sorted. regression: the labels are scores.
    quotes: whether quote characters enclose fields; by default in .csv files. In .tsv files they are part of the text.
    tokenizer: ``{train: {size: 4000, lowercase: true}}`` makes a WordPiece vocabulary of all training texts; or a folder with
    a fast tokenizer, or a run's folder with such a vocabulary.
    max_length: tokens that are kept of a sample, which is said; null: all.
    bucket: batches whose samples are put together by length; 0: none.
    validation: a fraction of the training part that is kept for validation, drawn with ``split_seed``; without one a search
    takes its own.

    Raises UserError for what is missing, damaged, empty, or no label.
    """
    what = "dataset 'text'"
    named = {"train": "train.tsv", "test": "test.tsv"} if files is None else files
    if not isinstance(named, Mapping) or not {"train", "test"} <= {k for k, v in named.items() if isinstance(v, str)}:
        raise UserError(f"{what}: files must name a train and a test file, got {files!r}")
    for part in named:
        if part not in PARTS:
            raise UserError(f"{what}: files has no part '{part}'{nearest(part, PARTS)} (allowed: {', '.join(PARTS)})")
    if format is not None and format not in KINDS.values():
        raise UserError(f"{what}: format must be {', '.join(KINDS.values())}, got '{format}'")
    if regression and labels is not None:
        raise UserError(f"{what}: labels are of classes; with regression the label is a number")
    pairs = labels.items() if isinstance(labels, Mapping) else [(x, x) for x in labels or ()]
    names = None if labels is None else {str(found).strip(): str(name).strip() for found, name in pairs}
    if names is not None and (isinstance(labels, str) or len(names) < 2 or len(set(names.values())) < len(list(pairs))):
        raise UserError(f"{what}: labels must be a list of at least two, each once, got {labels!r}")
    said = list(names or ())
    moved = next((n for n, key in enumerate(said) if key != str(n)), None)
    if moved is not None and sorted(said) == sorted(str(n) for n in range(len(said))):
        warn(
            f"{what}: labels: '{said[moved]}' of the file is class {moved}, for the order says which number a label has"
        )
    layouts = {
        part: Layout(format, header, format == "csv" or file.lower().endswith(".csv") if quotes is None else quotes)
        for part, file in named.items()
        if file is not None
    }
    return _load(
        "text",
        locate(what, root),
        {part: file for part, file in named.items() if file is not None},
        layouts,
        Columns(text, pair, label),
        None if regression else names or {},
        _Options(tokenizer, max_length, bucket, validation, split_seed),
    )


@dataclass(frozen=True)
class _Options:
    tokenizer: Any
    max_length: int | None
    bucket: int
    validation: float | None
    split_seed: int


def _load(
    name: str,
    root: Path,
    files: Mapping[str, str],
    layouts: Layout | Mapping[str, Layout],
    columns: Columns,
    labels: Mapping[str, str] | None,
    options: _Options,
) -> TextData:
    """``labels``: None for scores, {} for those of the training part."""
    what = f"dataset '{name}'"
    if options.max_length is not None and not whole_number(options.max_length, 4):
        raise UserError(f"{what}: max_length must be null or a whole number from 4, got {options.max_length!r}")
    part = options.validation
    if part is not None and (not isinstance(part, int | float) or isinstance(part, bool) or not 0 < part < 1):
        raise UserError(f"{what}: validation must be null or a fraction between 0 and 1, got {part!r}")
    if not whole_number(options.bucket, 0):
        raise UserError(f"{what}: bucket must be a whole number from 0, got {options.bucket!r}")
    rows = {
        part: read_rows(root, file, layouts if isinstance(layouts, Layout) else layouts[part], columns)
        for part, file in files.items()
    }
    train = rows["train"]
    found = labels if labels or labels is None else {label: label for label in sorted(set(train.labels))}
    if found is not None and len(found) < 2:
        raise UserError(f"{what}: the training part has one label, '{next(iter(found))}': nothing to learn")
    tokenizer = build_tokenizer(
        DEFAULT_TOKENIZER if options.tokenizer is None else options.tokenizer,
        what,
        [*train.texts, *(train.pairs or [])],
    )
    parts: dict[str, Any] = {part: _encoded(what, part, r, found, tokenizer, options) for part, r in rows.items()}
    if options.validation is not None:
        if "validation" in parts:
            raise UserError(f"{what}: validation is a fraction of the training part, but files names such a part")
        parts["validation"], parts["train"] = split(parts["train"], options.validation, options.split_seed)
    names = None if found is None else list(found.values())
    return TextData(
        parts["train"],
        parts.get("validation"),
        parts["test"],
        names,
        name=name,
        tokenizer=tokenizer,
        regression=found is None,
    )


def _encoded(
    what: str, part: str, rows: Rows, labels: Mapping[str, str] | None, tokenizer: Tokenizer, options: _Options
) -> Texts:
    targets = (
        torch.tensor(numbers_of(rows), dtype=torch.float32)
        if labels is None
        else torch.tensor(classes_of(rows, list(labels)))
    )
    encoded = list(tokenizer.encode(rows.texts, rows.pairs))
    length = options.max_length
    over = [n for n, sample in enumerate(encoded) if length is not None and len(sample.ids) > length]
    for n in over:
        assert length is not None
        encoded[n] = tokenizer.cut(rows.texts[n], None if rows.pairs is None else rows.pairs[n], length)
    if over:
        warn(
            f"{what}: {len(over):,} of the {len(rows.texts):,} samples of the {part} part are longer than {length} tokens and "
            "are cut (data.params.max_length)"
        )
    if part == "train":
        _say_unknown(what, encoded, tokenizer)
    typed = rows.pairs is not None and "token_type_ids" in tokenizer.fast.model_input_names
    classes = None if labels is None else list(labels.values())
    return Texts(encoded, targets, classes, tokenizer.fast.pad_token_id, typed, options.bucket)


def _say_unknown(what: str, encoded: Sequence[Any], tokenizer: Tokenizer) -> None:
    """Say it where a tokenizer does not know most of the words."""
    special = set(tokenizer.fast.all_special_ids) - {tokenizer.fast.unk_token_id}
    words = [number for sample in encoded for number in sample.ids if number not in special]
    unknown = words.count(tokenizer.fast.unk_token_id)
    if unknown > len(words) / 2:
        warn(
            f"{what}: the tokenizer does not know {unknown / len(words):.0%} of the words: lower case, or another language's?"
        )


__all__ = ["GLUE", "Column", "TextData", "Texts", "glue", "text"]
