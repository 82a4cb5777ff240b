"""Weights of a file into a model, whoever wrote the file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distpro.files import load_safely
from pathways.registry import UserError

WRAPPERS = ("state_dict", "model", "net", "student")
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and DistributedDataParallel, and of torch.compile

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


def load_checkpoint(model: nn.Module, path: str | Path, strict: bool = True) -> LoadReport:
    """Load the weights in ``path`` into ``model``.

    Reads safetensors files and what ``torch.save`` wrote: a state dict, or a dict that holds one under one of
    `WRAPPERS`. The prefixes of parallel and compiled training are removed. A model class may declare
    ``checkpoint_aliases = {"linear.": "fc."}``: parts of names that other implementations use, and its own.

    Args:
        strict: if False, load what fits and report the rest.

    Raises UserError if the file is missing, cannot be read without running code, holds no state dict or, if strict,
    does not fit; the model is then unchanged.
    """
    own = model.state_dict()
    state = _own_names(_find_state_dict(_read(Path(path)), path), own, getattr(model, "checkpoint_aliases", {}))
    report = _compare(state, own)
    if strict and not report.ok:
        raise UserError(f"{path} does not fit {type(model).__name__}: {report}")
    fitting = {name: value for name, value in state.items() if name in own and value.shape == own[name].shape}
    model.load_state_dict(fitting, strict=False)
    return report


def _read(path: Path) -> Any:
    if path.suffix == ".safetensors" and path.is_file():
        return _read_safetensors(path)
    return load_safely(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path}: safetensors files need safetensors: pip install 'distpro[export]'") from None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def _find_state_dict(content: Any, path: str | Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds no state dict but {type(content).__name__}")
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: holds no state dict (its keys: {_first([str(key) for key in content]) or 'none'})")
    return dict(content)


def _own_names(state: dict[str, Tensor], own: Mapping[str, Tensor], aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """The state dict under the model's own names, as far as prefixes and aliases lead there."""
    while prefix := next((p for p in PREFIXES if _all_start(state, p) and not _all_start(own, p)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return {name if name in own else _translate(name, aliases): value for name, value in state.items()}


def _all_start(names: Iterable[str], prefix: str) -> bool:
    return all(name.startswith(prefix) for name in names)


def _translate(name: str, aliases: Mapping[str, str]) -> str:
    for theirs, ours in aliases.items():
        name = name.replace(theirs, ours)
    return name


def _compare(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> LoadReport:
    # BatchNorm's counter came with PyTorch 0.4.1; older files lack it, and nothing but cumulative averages reads it.
    missing = (name for name in own if name not in state and not name.endswith("num_batches_tracked"))
    shapes = ((name, tuple(value.shape), tuple(own[name].shape)) for name, value in state.items() if name in own)
    return LoadReport(
        missing=tuple(missing),
        unexpected=tuple(name for name in state if name not in own),
        mismatched=tuple(entry for entry in shapes if entry[1] != entry[2]),
    )


def _first(names: Sequence[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (", ..." if len(names) > shown else "")
