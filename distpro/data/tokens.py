"""Tokenizers of Hugging Face's fast kind: read from a local folder, or a WordPiece vocabulary made of the training texts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distpro.console import pip_install
from distpro.data.augment import whole_number
from distpro.data.datasets import locate
from distpro.data.statistics import stored_facts
from pathways.registry import UserError, nearest

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TRAIN = {"size": 4000, "lowercase": True}
SMALLEST = 100
CHUNK = 4096  # texts that are tokenized at a time


class Vocabulary(NamedTuple):
    """What a model has to fit: the number of tokens, the padding's number, the tokens of the longest sample, and a digest of
    the tokens with their numbers."""

    size: int
    pad: int
    longest: int
    digest: str


class Encoded(NamedTuple):
    """Token numbers of a sample, and 0 or 1 for the text that each belongs to."""

    ids: Sequence[int]
    types: Sequence[int]


class Tokenizer:
    """A fast tokenizer and what of it goes into a run's facts.

    Attributes:
        fast: transformers' ``PreTrainedTokenizerFast``.
        facts: plain values; with ``vocabulary`` and ``trained`` where it was made of the training texts.
    """

    def __init__(self, fast: Any, what: str, facts: Mapping[str, Any] | None = None):
        if fast.pad_token_id is None:
            raise UserError(f"{what}: the tokenizer has no padding token")
        self.fast, self.what = fast, what
        self.digest = digest_of(fast.get_vocab())
        self.facts = {"sha256": self.digest, "size": len(fast), **(facts or {})}

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None) -> Iterator[Encoded]:
        """Every text, or pair of texts, in full length."""
        backend = self.fast.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        for start in range(0, len(texts), CHUNK):
            part = slice(start, start + CHUNK)
            both = texts[part] if pairs is None else list(zip(texts[part], pairs[part], strict=True))
            for found in backend.encode_batch(both):
                yield Encoded(found.ids, found.type_ids)

    def cut(self, text: str, pair: str | None, length: int) -> Encoded:
        """A text, or a pair of which the longer one gives way, of at most ``length`` tokens."""
        found = self.fast(text, pair, truncation=True, max_length=length, return_token_type_ids=True, verbose=False)
        return Encoded(found["input_ids"], found["token_type_ids"])


def digest_of(vocabulary: Mapping[str, int]) -> str:
    """sha256 of tokens in the order of their numbers."""
    ordered = sorted(vocabulary.items(), key=lambda item: item[1])
    return hashlib.sha256("\n".join(f"{number} {token}" for token, number in ordered).encode()).hexdigest()


def build_tokenizer(spec: Any, what: str, texts: Sequence[str]) -> Tokenizer:
    """The tokenizer that a config asks for.

    spec: ``{train: {size, lowercase}}``, a WordPiece vocabulary of the training ``texts``, the same on every machine; a
    folder with a fast tokenizer, or the folder of a run whose tokenizer was trained; ``{vocabulary, lowercase}``, the tokens
    themselves.

    Raises UserError for anything else, and for a folder without one.
    """
    if isinstance(spec, str):
        folder = locate(f"{what}: tokenizer", spec)
        stored = stored_facts(folder).get("tokenizer") if folder.is_dir() else None
        return of_vocabulary(stored, what) if isinstance(stored, Mapping) else of_folder(folder, what)
    if isinstance(spec, Mapping) and "vocabulary" in spec:
        return of_vocabulary(spec, what)
    if isinstance(spec, Mapping) and list(spec) == ["train"] and isinstance(spec["train"] or {}, Mapping):
        wanted = {**TRAIN, **(spec["train"] or {})}
        for key in wanted:
            if key not in TRAIN:
                raise UserError(
                    f"{what}: tokenizer.train has no '{key}'{nearest(key, TRAIN)} (allowed: {', '.join(TRAIN)})"
                )
        if not whole_number(wanted["size"], SMALLEST) or not isinstance(wanted["lowercase"], bool):
            raise UserError(f"{what}: tokenizer.train: size is a whole number from {SMALLEST}, lowercase true or false")
        vocabulary = _wordpieces(texts, wanted["size"], wanted["lowercase"], what)
        return of_vocabulary({"vocabulary": vocabulary, "lowercase": wanted["lowercase"], "trained": wanted}, what)
    raise UserError(f"{what}: tokenizer must be a folder or {{train: {{size: {TRAIN['size']}}}}}, got {spec!r}")


def as_trained(spec: Any, facts: Mapping[str, Any]) -> Any:
    """What a config says of its tokenizer; where it asks for a vocabulary of the training texts, and a run's ``facts`` hold one
    that was made alike, that one itself: its numbers are those of the run's student, whatever version makes them today."""
    stored = facts.get("tokenizer")
    if not isinstance(stored, Mapping) or "vocabulary" not in stored or "trained" not in stored:
        return spec
    asked = {} if spec is None else spec.get("train") if isinstance(spec, Mapping) and "train" in spec else None
    same = isinstance(asked or {}, Mapping) and asked is not None and {**TRAIN, **(asked or {})} == stored["trained"]
    return {key: stored[key] for key in ("vocabulary", "lowercase", "trained")} if same else spec


def of_vocabulary(stated: Mapping[str, Any], what: str) -> Tokenizer:
    """BERT's tokenizer of a list of WordPieces. Raises UserError for what is no such list."""
    vocabulary, lowercase = stated.get("vocabulary"), stated.get("lowercase", True)
    if not isinstance(vocabulary, list) or not all(isinstance(token, str) for token in vocabulary):
        raise UserError(f"{what}: the vocabulary must be a list of tokens; give the tokenizer's own folder")
    missing = [token for token in SPECIAL if token not in vocabulary]
    if missing or len(set(vocabulary)) < len(vocabulary):
        raise UserError(f"{what}: the vocabulary {f'lacks {missing[0]}' if missing else 'names a token twice'}")
    from tokenizers import processors

    core = _bert({token: number for number, token in enumerate(vocabulary)}, lowercase)
    first, separator = (("[CLS]", vocabulary.index("[CLS]")), ("[SEP]", vocabulary.index("[SEP]")))
    core.post_processor = processors.BertProcessing(separator, first)
    named = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    fast = transformers(what).PreTrainedTokenizerFast(tokenizer_object=core, model_input_names=inputs, **named)
    kept = {"vocabulary": vocabulary, "lowercase": lowercase}
    return Tokenizer(fast, what, {**kept, **({"trained": stated["trained"]} if "trained" in stated else {})})


def transformers(what: str) -> Any:
    """The package. Raises UserError where it is missing."""
    try:
        import transformers
    except ImportError:
        raise UserError(f"{what} needs transformers: {pip_install('text')}") from None
    return transformers


def of_folder(folder: Path, what: str) -> Tokenizer:
    """The fast tokenizer in a local folder. Raises UserError where there is none, or only one of another kind."""
    if not folder.is_dir():
        raise UserError(f"{what}: tokenizer: {folder} is not a folder")
    try:
        fast = transformers(what).AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_fast=True
        )
    except UserError:
        raise
    except Exception as error:  # transformers raises whatever a missing or damaged file makes it trip over
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{what}: {folder} holds no tokenizer that can be read ({reason})") from None
    if not getattr(fast, "is_fast", False):
        raise UserError(f"{what}: the tokenizer in {folder} is not a fast one (it has no tokenizer.json)")
    if set(fast.get_vocab()) <= {
        *fast.all_special_tokens,
        *fast.get_added_vocab(),
    }:  # transformers makes one of nothing
        raise UserError(
            f"{what}: {folder} holds no tokenizer: no word is in it (no tokenizer.json, vocab.txt or the like)"
        )
    return Tokenizer(fast, what, {"folder": str(folder)})


def _bert(vocabulary: Mapping[str, int] | None, lowercase: bool) -> Any:
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    core = Core(models.WordPiece(vocab=dict(vocabulary or {}), unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return core


def _wordpieces(texts: Sequence[str], size: int, lowercase: bool, what: str) -> list[str]:
    """WordPieces of texts, by their merges. The trainer numbers letters in the order of a hash table and breaks ties by these
    numbers, so that it gives another vocabulary each time; letters that are named beforehand have theirs."""
    transformers(what)
    from tokenizers import trainers

    core = _bert(None, lowercase)
    letters = sorted(c for c in set(core.normalizer.normalize_str("\n".join(texts))) if not c.isspace())
    named = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    if size < len(named):
        raise UserError(f"{what}: tokenizer.train.size is {size}, but the texts' letters alone are {len(named)} tokens")
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=named, show_progress=False)
    core.train_from_iterator(texts, trainer, length=len(texts))
    vocabulary = core.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)
