"""Weights of a file into a model, whoever wrote the file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distpro.console import note, pip_install, warn
from distpro.files import Unread, load_safely
from pathways.registry import UserError

WRAPPERS = ("state_dict", "model", "model_state_dict", "model_state", "net", "network", "student")
AVERAGED = (  # by a moving average
    "state_dict_ema",
    "model_ema",
    "model_ema_state_dict",
    "ema_state_dict",
    "ema_model",
    "ema_model_state_dict",
    "averaged_model",
    "ema",
)
PREFIXES = ("module.", "_orig_mod.", "model.")  # of parallel models and AveragedModel, of torch.compile, of Lightning
COUNTERS = ("n_averaged", "total_ops", "total_params")  # of AveragedModel, and what thop leaves behind

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LoadReport:
    """What did not fit between a checkpoint and a model.

    Attributes:
        missing: the model's names that the checkpoint lacks.
        unexpected: the checkpoint's names that the model lacks.
        mismatched: name, shape in the checkpoint, shape in the model.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, Shape, Shape], ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every tensor fitted."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        shapes = [
            f"{name}: {list(found)} in the file, {list(own)} in the model" for name, found, own in self.mismatched
        ]
        parts = [("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", shapes)]
        return "; ".join(f"{len(names)} {kind} ({_first(names)})" for kind, names in parts if names) or "all fits"


def load_checkpoint(
    model: nn.Module, path: str | Path, strict: bool = True, weights: str | None = None, part: str | None = None
) -> LoadReport:
    """Load the weights in ``path`` into ``model``.

    Reads safetensors files and what ``torch.save`` wrote: a state dict, or a dict that holds one under one of
    `WRAPPERS`, or else of `AVERAGED`. The prefixes of parallel and compiled training are removed. A model class may
    declare ``checkpoint_aliases = {"linear.": "fc."}``: parts of names that other implementations use, and its own.

    Args:
        strict: if False, load what fits and report the rest.
        weights: of a file that holds both, ``model``: those that were trained; ``ema``: their moving average; None: the
            former, which is said on stderr.
        part: what the model is called in a larger one, if it may be a part of the file's model, as an encoder is of a classifier.
            What the file has beside it is left out, and said.

    Raises UserError if the file is missing, cannot be read without running code, holds no state dict, a student's and a
    teacher's, weights that are no finite numbers, sparse or without values, whole numbers for real ones or, if strict, does
    not fit; the model is then unchanged.
    """
    if weights not in (None, "model", "ema"):
        raise UserError(f"weights of a checkpoint: '{weights}' (allowed: model, ema)")
    own = model.state_dict()
    found = _find_state_dict(_read(Path(path)), path, weights)
    state = _own_names(found, own, getattr(model, "checkpoint_aliases", {}))
    state = _below(state, own, part, path) if part else state
    report = _compare(state, own)
    misfit = replace(report, unexpected=()) if part else report
    if strict and not misfit.ok:
        raise UserError(f"{path} does not fit {type(model).__name__}: {misfit}")
    if part and report.unexpected:
        count, names = len(report.unexpected), _first(report.unexpected)
        note(f"{path}: {count} of its weights have no place in {type(model).__name__} and are left out ({names})")
    fitting = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
    _check_numbers(fitting, own, {name for name, _ in model.named_parameters()}, path)
    model.load_state_dict(fitting, strict=False)
    return report


def _below(state: dict[str, Tensor], own: Mapping[str, Tensor], part: str, path: str | Path) -> dict[str, Tensor]:
    """The state dict as the part names it, if the file's model holds all of the part's names behind a prefix: of several such
    prefixes the one that is called as the part is."""
    wanted = [name for name in own if not name.endswith("num_batches_tracked")]
    if not wanted or all(name in state for name in wanted):
        return state
    ends = [name.removesuffix(wanted[0]) for name in state if name.endswith("." + wanted[0])]
    found = [end for end in ends if all(end + name in state for name in wanted)]
    called = [end for end in found if f".{part}.".endswith("." + end) or end.endswith(f"{part}.")]
    chosen = found if len(found) == 1 else called
    if found and len(chosen) != 1:
        places = ", ".join(end.removesuffix(".") for end in found)
        raise UserError(
            f"{path}: several parts of it have the names of '{part}' ({places}): save the one that is meant"
        )
    return {name.removeprefix(chosen[0]): value for name, value in state.items()} if chosen else state


def _check_numbers(state: Mapping[str, Tensor], own: Mapping[str, Tensor], trained: set[str], path: str | Path) -> None:
    """A mask among the buffers may be infinite."""
    for name, value in state.items():
        if value.is_meta:
            raise UserError(f"{path}: {name} has no values, only a shape (device meta): save the weights themselves")
        if value.layout is not torch.strided:
            kind = str(value.layout).removeprefix("torch.")
            raise UserError(f"{path}: {name} is stored as {kind}: save it with .to_dense()")
        if value.is_floating_point() != own[name].is_floating_point():
            kinds = (str(t.dtype).removeprefix("torch.") for t in (value, own[name]))
            raise UserError(f"{path}: {name} is {' in the file, '.join(kinds)} in the model (quantised weights?)")
        if name in trained and value.is_floating_point() and not value.float().isfinite().all():
            raise UserError(f"{path}: {name} is not finite: a training that had diverged?")


def _read(path: Path) -> Any:
    if path.suffix.lower() == ".safetensors" and path.is_file():
        return _read_safetensors(path)
    return load_safely(path, weights=True)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path}: safetensors files need safetensors: {pip_install('export')}") from None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _find_state_dict(content: Any, path: str | Path, weights: str | None) -> dict[str, Tensor]:
    """The state dict in a file. Says where there is another one beside it."""
    while isinstance(content, Mapping):
        if all(isinstance(content.get(role), Mapping) for role in ("student", "teacher")):
            raise UserError(
                f"{path}: holds a student's weights and a teacher's; save those that are meant by themselves"
            )
        plain, averaged = (_inner(content, keys) for keys in (WRAPPERS, AVERAGED))
        if plain and averaged and weights is None:
            warn(f"{path}: '{plain}' is taken; it also holds a moving average, '{averaged}' (weights: ema takes that)")
            weights = "model"
        if averaged and weights == "model" and not plain:
            raise UserError(f"{path}: holds a moving average only, '{averaged}' (weights: ema takes it)")
        key = averaged if averaged and weights != "model" else plain
        if key is None:
            break
        weights = None if key == averaged else weights
        content = content[key]
    whole = content if isinstance(content, Unread) else _inner(content, WRAPPERS, Unread)
    if whole is not None:
        raise UserError(
            f"{path}: holds a whole object in place of a state dict, which only its own code can read; save it again "
            "where it was made: torch.save(model.state_dict(), FILE)"
        )
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds no state dict but {type(content).__name__}")
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(
            f"{path}: holds no state dict (its keys: {_first([str(key) for key in content]) or 'none'}); "
            f"expected one by itself, or under one of {', '.join(WRAPPERS)}"
        )
    if weights == "ema":
        raise UserError(f"{path}: holds no moving average (its key would be one of {', '.join(AVERAGED)})")
    return dict(content)


def _inner(content: Any, keys: Sequence[str], kind: type = Mapping) -> str | None:
    """The first of some keys under which a mapping holds a ``kind``."""
    return next((k for k in keys if isinstance(content, Mapping) and isinstance(content.get(k), kind)), None)


def _own_names(state: dict[str, Tensor], own: Mapping[str, Tensor], aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """The state dict under the model's own names, as far as prefixes and aliases lead there."""
    state = {name: value for name, value in state.items() if name in own or not _is_counter(name, value)}
    while prefix := next((p for p in PREFIXES if _all_start(state, p) and not _all_start(own, p)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return {name if name in own else _translate(name, aliases): value for name, value in state.items()}


def _is_counter(name: str, value: Tensor) -> bool:
    return name.rpartition(".")[2] in COUNTERS and value.numel() == 1


def _all_start(names: Iterable[str], prefix: str) -> bool:
    return all(name.startswith(prefix) for name in names)


def _translate(name: str, aliases: Mapping[str, str]) -> str:
    for theirs, ours in aliases.items():
        name = name.replace(theirs, ours)
    return name


def _compare(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> LoadReport:
    # BatchNorm's counter came with PyTorch 0.4.1; older files lack it, and nothing but cumulative averages reads it.
    # A tied weight has several names in the model, of which some writers store one.
    loaded = {_place(own[name]) for name in state if name in own}
    missing = (
        name
        for name, value in own.items()
        if name not in state and not name.endswith("num_batches_tracked") and _place(value) not in loaded
    )
    shapes = ((name, tuple(value.shape), tuple(own[name].shape)) for name, value in state.items() if name in own)
    return LoadReport(
        missing=tuple(missing),
        unexpected=tuple(name for name in state if name not in own),
        mismatched=tuple(entry for entry in shapes if entry[1] != entry[2]),
    )


def _place(tensor: Tensor) -> Any:
    """The same for two names of one tensor, and for no two others."""
    known = tensor.device.type != "meta" and tensor.numel() > 0
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if known else id(tensor)


def _first(names: Sequence[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")


def stored_metadata(path: Path) -> dict[str, Any]:
    """What `distpro export` writes beside the weights in a safetensors file, the facts of the data; {} of other files."""
    if path.suffix.lower() != ".safetensors" or not path.is_file():
        return {}
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        return {}
    try:
        with safe_open(path, "pt") as file:
            found = json.loads((file.metadata() or {}).get("distpro", "{}"))
    except (SafetensorError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
