"""Models of Hugging Face's transformers, by the name of a class, a config file, or a local folder. Nothing is downloaded, and no
code of a folder runs.

``hf:BertForSequenceClassification`` is that class with the parameters of its config, ``hf:path/config.json`` the model that a
config file describes, with random weights, and ``hf:path`` that of a folder, with the folder's weights where ``pretrained`` says so.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distpro.console import warn
from distpro.data.datasets import locate
from distpro.data.tokens import digest_of, of_folder, transformers
from distpro.models.base import LIBRARIES, StageTaps
from pathways.registry import UserError, nearest

HEADS = ("ForSequenceClassification", "ForImageClassification")
OPTIONS = ("pretrained", "architecture", "attn_implementation")


def from_hf(what: str, name: str) -> Callable[..., nn.Module]:
    """A builder of the model ``hf:NAME``. Raises UserError where there is no such class, file or folder, or no transformers."""
    library = transformers(what)
    if name.isidentifier() and hasattr(library, name):
        kind = _class_of(library, what, name)

        def build_class(**params: Any) -> nn.Module:
            return _build(library, what, kind, {}, None, params)

        return build_class
    classes = [other for other in dir(library) if other.endswith(HEADS)]
    hint = nearest(name, classes) if name.isidentifier() else ""
    place = locate(
        what, name, hint=f"{hint} (a class of transformers, a config file, or a local folder: nothing is downloaded)"
    )
    file = place / "config.json" if place.is_dir() else place
    if not file.is_file():
        raise UserError(f"{what}: {place} holds no config.json")
    stated = _read_config(what, file)

    def build(architecture: str | None = None, **params: Any) -> nn.Module:
        kind = _class_of(library, what, architecture or _architecture(library, what, file, stated))
        return _build(library, what, kind, stated, place if place.is_dir() else None, params)

    return build


LIBRARIES["hf"] = from_hf


def _class_of(library: Any, what: str, name: str) -> Any:
    kind: Any = getattr(library, name, None)
    known = isinstance(kind, type) and issubclass(kind, library.PreTrainedModel)
    if not known or kind.config_class is None:
        classes = [other for other in dir(library) if other.endswith(HEADS)]
        raise UserError(f"{what}: transformers has no model class '{name}'{nearest(name, classes)}")
    return kind


def _read_config(what: str, file: Path) -> dict[str, Any]:
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{what}: {file} is not readable ({error})") from None
    if not isinstance(stated, dict) or not isinstance(stated.get("model_type"), str):
        raise UserError(f"{what}: {file} is not a config of transformers: it has no model_type")
    if stated.get("auto_map"):
        raise UserError(
            f"{what}: {file} wants code of its own (auto_map), which is not run: name an architecture of transformers"
        )
    return stated


def _architecture(library: Any, what: str, file: Path, stated: Mapping[str, Any]) -> str:
    """The class that a config names, or of its type the one with a classifier."""
    for name in stated.get("architectures") or []:
        if name.endswith(HEADS):
            return str(name)
    known = library.CONFIG_MAPPING
    if stated["model_type"] not in known:
        raise UserError(
            f"{what}: {file}: transformers has no model_type '{stated['model_type']}'{nearest(stated['model_type'], known)}"
        )
    for auto in (library.AutoModelForSequenceClassification, library.AutoModelForImageClassification):
        kind = auto._model_mapping.get(known[stated["model_type"]], None)
        if kind is not None:
            return str(kind.__name__)
    raise UserError(
        f"{what}: transformers has no classifier of model_type '{stated['model_type']}': name an architecture"
    )


def _build(
    library: Any,
    what: str,
    kind: Any,
    stated: Mapping[str, Any],
    folder: Path | None,
    params: dict[str, Any],
) -> nn.Module:
    """``params``: of the config, with the facts ``num_classes`` and ``tokens`` and the options of `OPTIONS`."""
    classes, tokens = params.pop("num_classes", None), params.pop("tokens", None)
    pretrained, attention = params.pop("pretrained", False), params.pop("attn_implementation", None)
    if pretrained and folder is None:
        raise UserError(f"{what}: pretrained needs a folder with the weights, hf:FOLDER")
    try:
        known = kind.config_class()
        _check_names(what, known, params)
        given = {k: v for k, v in stated.items() if k not in ("torch_dtype", "dtype", "architectures")}
        if classes is not None and "num_labels" not in params:
            params["num_labels"] = classes
        if "num_labels" in params and len(stated.get("id2label") or {}) != params["num_labels"]:
            given = {k: v for k, v in given.items() if k not in ("id2label", "label2id", "num_labels")}
        if tokens is not None and not stated:
            given = {"vocab_size": tokens.size, "pad_token_id": tokens.pad}
        config = kind.config_class(**{**given, **params})
        config._attn_implementation = attention or ("sdpa" if getattr(kind, "_supports_sdpa", True) else "eager")
        if pretrained:
            model, missing = _with_weights(what, kind, config, folder)
        else:
            model, missing = kind(config), []
    except UserError:
        raise
    except Exception as error:  # transformers checks its numbers where it uses them, by whatever Python raises
        reason = " ".join(str(error).split())[:240]
        raise UserError(f"{what}: {type(error).__name__}: {reason}") from error
    if missing:
        warn(
            f"{what}: the folder has no weights for {', '.join(missing[:4])}{' ...' * (len(missing) > 4)}: they start at random"
        )
    if tokens is not None:
        _check_tokens(what, model, tokens, folder if pretrained else None)
    setattr(model, "stage_taps", _places(model))  # noqa: B010  # a plain attribute, whatever a module's are
    return model.train()


def _check_names(what: str, config: Any, params: Mapping[str, Any]) -> None:
    """Configs take any keyword and keep it for nobody."""
    known = {*config.to_dict(), *getattr(config, "attribute_map", {}), "num_labels"} | set(
        inspect.signature(type(config)).parameters
    )
    for name in params:
        if name not in known:
            allowed = sorted({*known, *OPTIONS})
            raise UserError(f"{what}: {type(config).__name__} has no '{name}'{nearest(name, allowed)}")


def _with_weights(what: str, kind: Any, config: Any, folder: Path | None) -> tuple[nn.Module, list[str]]:
    assert folder is not None
    log = transformers(what).utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()  # what is missing is said once, here
    log.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by their names
        )
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
    missing = sorted(report["missing_keys"])
    body = [name for name in missing if model.base_model_prefix and name.startswith(f"{model.base_model_prefix}.")]
    body = [name for name in body if ".pooler." not in name]
    if body:
        raise UserError(
            f"{what}: {folder} holds no weights of {kind.__name__}: {len(body)} are missing ({body[0]}, ...)"
        )
    if report["mismatched_keys"]:
        name, *shapes = sorted(report["mismatched_keys"])[0]
        found, own = (list(shape) for shape in shapes)
        raise UserError(f"{what}: {name} is {found} in {folder}, {own} in the model (num_labels, or another config?)")
    return model, missing


def _check_tokens(what: str, model: Any, tokens: Any, folder: Path | None) -> None:
    """Raise UserError where a tokenizer does not fit a model: too many tokens, another padding, too long samples, or another
    vocabulary than the one that weights were trained with."""
    config = model.config
    try:
        held = model.get_input_embeddings().num_embeddings
    except (NotImplementedError, AttributeError):
        raise UserError(f"{what}: reads no tokens, but the data are texts") from None
    advice = "give the model's own tokenizer (data.params.tokenizer)"
    if tokens.size > held:
        raise UserError(f"{what}: the tokenizer has {tokens.size:,} tokens, the model's embedding {held:,}: {advice}")
    if config.pad_token_id is not None and config.pad_token_id != tokens.pad:
        raise UserError(
            f"{what}: the tokenizer pads with {tokens.pad}, the model's pad_token_id is {config.pad_token_id}: {advice}"
        )
    if folder is not None and _vocabulary(what, folder) not in (None, tokens.digest):
        raise UserError(
            f"{what}: the weights were trained with the tokenizer of {folder}, the data have another: {advice}"
        )
    most = _positions(model)
    if most is not None and tokens.longest > most:
        raise UserError(
            f"{what}: there are texts of {tokens.longest} tokens, the model takes {most} "
            f"(max_position_embeddings): data.params.max_length={most} cuts them"
        )


def _vocabulary(what: str, folder: Path) -> str | None:
    """The digest of the vocabulary that stands beside weights, None with a warning where there is none to be read."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        try:
            return of_folder(folder, what).digest  # vocab.txt and the like
        except UserError as error:
            warn(f"{error}; whether the data have the one that the weights were trained with is not known")
            return None
    from tokenizers import Tokenizer

    try:
        return digest_of(Tokenizer.from_file(str(file)).get_vocab())
    except Exception as error:  # the package raises bare exceptions
        raise UserError(f"{what}: {file} is not readable ({error})") from None


def _positions(model: Any) -> int | None:
    """The most tokens that a model's positions are made for. RoBERTa and its like count from behind the padding's number."""
    most = getattr(model.config, "max_position_embeddings", None)
    tables = (
        m for name, m in model.named_modules() if name.endswith("position_embeddings") and isinstance(m, nn.Embedding)
    )
    table = next(tables, None)
    shift = 0 if table is None or table.padding_idx is None else table.padding_idx + 1
    return None if not isinstance(most, int) or most <= 0 else most - shift


def _places(model: Any) -> StageTaps | None:
    """The blocks of a transformer as its stages, and what enters its classifier; None where they are not clear."""
    config = model.config
    count = getattr(config, "num_hidden_layers", 0)
    stacks = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    embeddings = [n for n, _ in model.named_modules() if n.endswith("embeddings") and n.count(".") == 1]
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == config.num_labels]
    if len(stacks) != 1 or not embeddings or not linear:
        return None
    stages = tuple(f"{stacks[0]}.{n}" for n in range(count))
    return StageTaps(stages, stages, embeddings[0], f"{linear[-1]}:input")
