"""What an `alpha.pt` holds: tensors and plain values of known types, checked where they are read and where they are made.

Version 3 says beside the weights what a replay makes of them: ``strength``, ``warmup``, ``reading``, ``threshold``,
``start``, ``scalars``. Versions 1 and 2 left that to the config in ``meta``, and are read so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pathways.registry import UserError
from pathways.space import parse_spec

if TYPE_CHECKING:
    from distpro.schedule import Schedule

FORMAT = "distpro-schedule"
VERSION = 3  # 2 added scales, 3 what a replay makes of the weights
LOG = "log"  # the reading in which α̃ is log w
THRESHOLD, START = 0.5, 1 / 3  # of a config that says nothing else


def meaning_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a retrain with a search's own config makes of the schedule: ``strength`` (λ), ``warmup``, ``reading``,
    ``threshold`` and ``start``, by the names in `Schedule`."""
    searching, retrain = config.get("training") or {}, config.get("retrain") or {}
    training = {**searching, **(retrain.get("training") or {})}
    warmup = training.get("distill_warmup") or 0.0
    if warmup and "epochs" in searching:  # of the search's epochs, which the schedule counts in, not of the retrain's
        warmup = warmup * searching["epochs"] / training["epochs"]
    weighting = (config.get("search") or {}).get("weighting", "biased_softmax")
    return {
        "strength": training.get("distill_weight", 1.0),
        "warmup": warmup,
        "reading": parse_spec(weighting, "search.weighting")[0],
        "threshold": retrain.get("threshold", THRESHOLD),
        "start": retrain.get("start", START),
    }


def content_of(schedule: Schedule) -> dict[str, Any]:
    """What is written."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "keys": list(schedule.keys),
        "levels": schedule.levels.to(torch.int64),
        "transforms": list(schedule.transforms),
        "alpha_tilde": schedule.alpha_tilde.float().contiguous(),
        "weights": schedule.weights.float().contiguous(),
        "scales": schedule.scales.float().contiguous(),
        "steps_per_epoch": float(schedule.steps_per_epoch),
        "strength": float(schedule.strength),
        "warmup": float(schedule.warmup),
        "reading": schedule.reading,
        "threshold": None if schedule.threshold is None else float(schedule.threshold),
        "start": float(schedule.start),
        "scalars": {name: values.float().contiguous() for name, values in schedule.scalars.items()},
        "meta": dict(schedule.meta),
    }


def fields_of(content: Any) -> dict[str, Any]:
    """The fields of the `Schedule` that a file holds. Raises UserError if it is no schedule, a newer one, or one whose
    tensors are not what they seem; KeyError, TypeError, ... where parts are missing or are of another kind."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError("not a distpro schedule")
    version = content.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise UserError(f"schedule version {version}; this distpro reads up to {VERSION}")
    tensors = ["levels", "alpha_tilde", "weights", *(["scales"] if version > 1 else [])]
    plain = ["keys", "transforms", "steps_per_epoch", "meta"]
    if version > 2:
        plain += ["strength", "warmup", "reading", "threshold", "start", "scalars"]
    fields = {name: content[name] for name in (*tensors, *plain)}
    for name, kind in (("keys", list), ("transforms", list), ("meta", dict), ("scalars", dict)):
        if not isinstance(fields.get(name, kind()), kind):
            raise TypeError(f"{name} is {type(fields[name]).__name__}, expected {kind.__name__}")
    stored = {name: fields[name] for name in tensors} | dict(fields.get("scalars", {}))
    for name, tensor in stored.items():
        _check_stored(name, tensor)
    fields |= {name: fields[name].detach() for name in tensors}
    if version > 2:
        fields["scalars"] = {name: values.detach() for name, values in fields["scalars"].items()}
    elif isinstance(fields["meta"].get("config"), Mapping):
        fields |= meaning_of(fields["meta"]["config"])
    return {**fields, "keys": tuple(fields["keys"]), "transforms": tuple(fields["transforms"])}


def _check_stored(name: str, tensor: Any) -> None:
    """Refuse a tensor that is larger than what the file holds of it, before anything computes with it."""
    _check_kind(name, tensor)
    held = tensor.untyped_storage().nbytes() // tensor.element_size()
    if tensor.numel() > held:
        raise UserError(f"schedule: {name} has {tensor.numel()} numbers, of which the file holds {held}")


def _check_kind(name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}, expected a tensor")
    kind = "quantised" if tensor.is_quantized else "nested" if tensor.is_nested else str(tensor.layout)
    if kind != "torch.strided" or tensor.is_meta:
        found = kind.removeprefix("torch.") if kind != "torch.strided" else "without numbers"
        raise UserError(f"schedule: {name} is {found} (allowed: a plain tensor)")


def check(schedule: Schedule) -> None:
    """Raise UserError for a schedule whose parts do not fit together, or are not what they have to be."""
    n = len(schedule.keys)
    for name, words in (("keys", schedule.keys), ("transforms", schedule.transforms), ("scalars", schedule.scalars)):
        for word in words:
            if not isinstance(word, str) or (not word and name != "transforms"):
                raise UserError(f"schedule: {name} must be names, found {word!r}")
    if len(set(schedule.keys)) != n:
        raise UserError("schedule: two terms have one key")
    tensors = {name: getattr(schedule, name) for name in ("levels", "weights", "alpha_tilde", "scales")}
    for name, tensor in {**tensors, **schedule.scalars}.items():
        _check_kind(name, tensor)
    _check_shapes(schedule, n)
    if schedule.levels.is_floating_point() or schedule.levels.is_complex() or schedule.levels.dtype == torch.bool:
        raise UserError(f"schedule: levels are {_type(schedule.levels)} (allowed: whole numbers)")
    if (schedule.levels < 0).any():
        raise UserError("schedule: levels are below 0 (allowed: 1 and more, 0 for none)")
    del tensors["levels"]
    for name, tensor in {**tensors, **schedule.scalars}.items():
        if not tensor.is_floating_point():
            raise UserError(f"schedule: {name} are {_type(tensor)} (allowed: floating point)")
        if not torch.isfinite(tensor.float()).all():
            raise UserError(f"schedule: {name} are not all finite")
    _check_numbers(schedule)
    if schedule.reading == LOG and (schedule.weights < 0).any():
        raise UserError("schedule: weights are below 0, which no log is (reading: log)")


def _check_shapes(schedule: Schedule, n: int) -> None:
    for name, tensor, width in (("levels", schedule.levels, 3), ("weights", schedule.weights, None)):
        turned = tensor.T if name == "weights" and tensor.dim() == 2 else tensor
        if turned.dim() != 2 or len(turned) != n or (width and turned.shape[1] != width):
            raise UserError(f"schedule: {name} of shape {tuple(turned.shape)} do not fit {n} keys")
    if schedule.alpha_tilde.shape != schedule.weights.shape or len(schedule.weights) == 0:
        found = f"alpha_tilde {tuple(schedule.alpha_tilde.shape)} and weights {tuple(schedule.weights.shape)}"
        raise UserError(f"schedule: {found} must be equal, (T, N) with T > 0")
    if schedule.scales.shape != (n,):
        raise UserError(f"schedule: scales of shape {tuple(schedule.scales.shape)} do not fit {n} keys")
    if len(schedule.transforms) != n:
        raise UserError(f"schedule: {len(schedule.transforms)} transforms do not fit {n} keys")
    for name, values in schedule.scalars.items():
        if values.shape != (len(schedule.weights),):
            steps = len(schedule.weights)
            raise UserError(f"schedule: scalar '{name}' of shape {tuple(values.shape)} does not fit {steps} steps")


def _check_numbers(schedule: Schedule) -> None:
    if not isinstance(schedule.meta, Mapping):
        raise UserError(f"schedule: meta is {type(schedule.meta).__name__} (allowed: a mapping)")
    if not isinstance(schedule.reading, str) or not schedule.reading:
        raise UserError(f"schedule: reading is {schedule.reading!r} (allowed: the name of a weighting, or {LOG})")
    if schedule.threshold is not None and not _finite(schedule.threshold):
        raise UserError(f"schedule: threshold is {schedule.threshold!r} (allowed: a number, or None)")
    for name, allowed, fits in (
        ("steps_per_epoch", "above 0", lambda x: x > 0),
        ("strength", "0 and more", lambda x: x >= 0),
        ("warmup", "0 and more", lambda x: x >= 0),
        ("start", "from 0 to below 1", lambda x: 0 <= x < 1),
    ):
        value = getattr(schedule, name)
        if not _finite(value) or not fits(value):
            raise UserError(f"schedule: {name} is {value!r} (allowed: a number {allowed})")


def _finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
