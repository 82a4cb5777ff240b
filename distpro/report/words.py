"""A schedule in words: what it prefers when, and whether it moves at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distpro.schedule import Schedule
from distpro.schedule_file import LOG
from distpro.search.signal import is_signal

PARTS = ("early", "middle", "late")
CONSTANT = 0.01  # relative movement below which a process is called constant
SHOWN = 5  # terms in a list


def schedule_summary(schedule: Schedule) -> dict[str, Any]:
    """The numbers behind :func:`explain_schedule`, as plain values.

    Keys: ``terms``, ``steps``, ``epochs``, ``steps_per_epoch``; ``weighting`` (the reading where the file says no more),
    ``lambda``, ``warmup``, ``reading``, ``threshold``, ``start``: what a replay makes of it; ``teacher``, ``student``, ``data``,
    ``versions``, ``created`` (``None`` where the file does not say); ``scalars``: each at ``start``, ``middle``, ``end``;
    ``total``: Σw at ``start``, ``middle`` and ``end``; ``strongest``: per third of the training, all terms as
    (key, mean weight, share of the third's Σ|w|), strongest first; ``teacher_levels``: share per level (0: terms
    without a level) and third; ``dropped``: see below; ``computed``: fraction of (step, term) pairs that the
    threshold keeps, of the steps that a replay takes; ``movement``: mean over steps of Σ_j |w_j(t) − w̄_j|, divided by Σ_j |w̄_j| (w̄: mean over time; 0 for
    constant weights).

    ``updates`` and ``gradients``: how many updates a search made, and per term and learned scalar (key, mean gradient, spread,
    share of updates with its sign, whether it is more than noise), largest first; 0 and nothing where the file does not say.
    Gradients are those of the validation loss by α̃, which for ``log`` is what a relative change of the weight does.

    ``dropped`` lists the terms that the threshold drops at some step that a replay takes: ``key``, ``step`` and ``epoch`` of the
    search at which they first are, and ``for_good``, whether they stay there from then on.
    """
    weights = schedule.weights.double()
    meta = schedule.meta
    below = schedule.after().dropped()
    gradients = _gradients(meta.get("gradients"))
    return {
        "terms": len(schedule.keys),
        "steps": len(schedule),
        "epochs": len(schedule) / schedule.steps_per_epoch,
        "steps_per_epoch": schedule.steps_per_epoch,
        "weighting": meta.get("weighting", schedule.reading),
        "lambda": schedule.strength,
        "warmup": schedule.warmup or None,
        **{name: getattr(schedule, name) for name in ("reading", "threshold", "start")},
        **{k: meta.get(k) for k in ("teacher", "student", "data", "versions", "created")},
        "total": _at_moments(weights.sum(1)),
        "scalars": {name: _at_moments(values) for name, values in schedule.scalars.items()},
        "strongest": {part: _ranking(schedule.keys, rows) for part, rows in _thirds(weights).items()},
        "updates": meta["gradients"]["updates"] if gradients else 0,
        "gradients": gradients,
        "teacher_levels": _level_shares(schedule.levels[:, 0], weights),
        "dropped": _dropped(schedule, below),
        "computed": 1 - below.double().mean().item(),
        "movement": _movement(weights),
    }


def explain_schedule(schedule: Schedule) -> str:
    """Several short paragraphs for a person, plain text."""
    summary = schedule_summary(schedule)
    paragraphs = (_size, _origin, _totals, _scalars, _strongest, _signals, _levels, _drops, _moves)
    return "\n\n".join(filter(None, (paragraph(summary) for paragraph in paragraphs)))


# Numbers


def _thirds(rows: Tensor) -> dict[str, Tensor]:
    """Rows of each third of the time; never none, so with fewer than three rows some are used twice."""
    bounds = [len(rows) * n // 3 for n in range(4)]
    return {part: rows[a : max(b, a + 1)] for part, a, b in zip(PARTS, bounds, bounds[1:], strict=False)}


def _at_moments(values: Tensor) -> dict[str, float]:
    last = len(values) - 1
    return {name: values[n].item() for name, n in (("start", 0), ("middle", last // 2), ("end", last))}


def _ranking(keys: tuple[str, ...], rows: Tensor) -> list[tuple[str, float, float]]:
    mean, share = rows.mean(0).tolist(), _shares(rows).tolist()
    order = sorted(range(len(keys)), key=lambda n: -share[n])
    return [(keys[n], mean[n], share[n]) for n in order]


def _shares(rows: Tensor) -> Tensor:
    """Each column's part of Σ|w|, (N,); zeros if all weights are zero."""
    size = rows.abs().mean(0)
    return size / size.sum().clamp(min=torch.finfo(size.dtype).tiny)


def _gradients(found: Any) -> list[tuple[str, float, float, float, bool]]:
    try:
        updates = int(found["updates"])
        rows = [(str(key), float(g["mean"]), float(g["spread"]), float(g["held"])) for key, g in found["of"].items()]
    except (KeyError, TypeError, ValueError, AttributeError):  # a file of before, or not a search's
        return []
    return sorted(
        ((key, mean, spread, held, is_signal(mean, spread, updates)) for key, mean, spread, held in rows),
        key=lambda row: -abs(row[1]),
    )


def _level_shares(level: Tensor, weights: Tensor) -> dict[int, dict[str, float]]:
    return {
        value: {part: _shares(rows)[level == value].sum().item() for part, rows in _thirds(weights).items()}
        for value in level.unique().tolist()
    }


def _dropped(schedule: Schedule, below: Tensor) -> list[dict[str, Any]]:
    found, before = [], len(schedule) - len(below)
    for n in below.any(0).nonzero().flatten().tolist():
        first = int(below[:, n].int().argmax())
        step, for_good = before + first, bool(below[first:, n].all())
        epoch = step / schedule.steps_per_epoch
        found.append({"key": schedule.keys[n], "step": step, "epoch": epoch, "for_good": for_good})
    return sorted(found, key=lambda entry: entry["step"])


def _movement(weights: Tensor) -> float:
    mean = weights.mean(0)
    moved = (weights - mean).abs().sum(1).mean()
    return (moved / mean.abs().sum().clamp(min=torch.finfo(mean.dtype).tiny)).item()


# Words


def _size(s: Mapping[str, Any]) -> str:
    return (
        f"A schedule of {_count(s['terms'], 'term')} over {_count(s['steps'], 'step')}: "
        f"{s['epochs']:.4g} epochs of {s['steps_per_epoch']:.6g} steps."
    )


def _origin(s: Mapping[str, Any]) -> str:
    names = ("teacher", "student", "data", "weighting", "lambda", "warmup", "threshold", "start", "created", "versions")
    return "\n".join(f"{name + ':':<11}{_words(s[name])}" for name in names if s[name] is not None)


def _totals(s: Mapping[str, Any]) -> str:
    total = s["total"]
    return (
        f"The weights sum to {total['start']:.4g} at the start, {total['middle']:.4g} in the middle "
        f"and {total['end']:.4g} at the end."
    )


def _scalars(s: Mapping[str, Any]) -> str:
    lines = ["Beside the weights a replay moves (start, middle, end):"]
    lines += [f"  {name}: " + ", ".join(f"{x:.4g}" for x in at.values()) for name, at in s["scalars"].items()]
    return "\n".join(lines) if s["scalars"] else ""


def _strongest(s: Mapping[str, Any]) -> str:
    lines = ["The strongest terms (mean weight, share of all) in each third of the training:"]
    width = max(len(key) for ranking in s["strongest"].values() for key, _, _ in ranking[:SHOWN])
    for part, ranking in s["strongest"].items():
        for n, (key, weight, share) in enumerate(ranking[:SHOWN]):
            lines.append(f"  {part if n == 0 else '':<7} {key:<{width}} {weight:>9.4g} {share:>7.1%}")
    return "\n".join(lines)


def _signals(s: Mapping[str, Any]) -> str:
    if s["updates"] < 2:
        return ""
    clear = [row for row in s["gradients"] if row[4]]
    noise = [row[0] for row in s["gradients"] if not row[4]]
    unit = "log w" if s["reading"] == LOG else "α̃"
    lines = [
        f"Gradient of the validation loss by {unit}, mean ± spread over {s['updates']:,} updates (negative: more of it helps):"
    ]
    lines += [
        f"  {key}  {mean:+.2g} ± {spread:.2g}, its sign held in {held:.0%}"
        for key, mean, spread, held, _ in clear[:SHOWN]
    ]
    if len(clear) > SHOWN:
        lines.append(f"  and {len(clear) - SHOWN} more that are above their noise")
    if noise:
        shown = ", ".join(noise[:SHOWN]) + (", ..." if len(noise) > SHOWN else "")
        lines.append(f"  no signal (within two standard errors of 0): {_count(len(noise), 'term')}: {shown}")
    return "\n".join(lines)


def _levels(s: Mapping[str, Any]) -> str:
    if set(s["teacher_levels"]) == {0}:
        return ""
    lines = [f"{'Share of all weight':<24}" + "".join(f"{part:>8}" for part in PARTS)]
    for level, shares in s["teacher_levels"].items():
        name = f"teacher level {level}" if level else "terms without a level"
        lines.append(f"  {name:<22}" + "".join(f"{shares[part]:>8.1%}" for part in PARTS))
    return "\n".join(lines)


def _drops(s: Mapping[str, Any]) -> str:
    threshold, dropped = s["threshold"], s["dropped"]
    if threshold is None:
        return "No threshold: every term is computed at every step."
    name = "A tenth of an equal share" if s["reading"] == LOG else f"The threshold {threshold:g}"
    if not dropped:
        return f"{name} drops no term."
    lasting = sum(entry["for_good"] for entry in dropped)
    saved = f"{1 - s['computed']:.1%} of the terms' computation is saved"
    some = f"{name} drops {len(dropped)} of {_count(s['terms'], 'term')}"
    if s["start"] == 1:
        return "\n".join([f"{some}; {saved}.", *(f"  {entry['key']}" for entry in dropped)])
    lines = [f"{some} at some time, {lasting} of them for good; {saved}."]
    for entry in dropped:
        lines.append(
            f"  from epoch {entry['epoch']:.1f}{'' if entry['for_good'] else ', not to the end'}: {entry['key']}"
        )
    return "\n".join(lines)


def _moves(s: Mapping[str, Any]) -> str:
    if s["start"] == 1:
        return "A replay takes the last weights alone, constant (start 1)."
    distance = f"on average the weights are {s['movement']:.2%} away from their mean over time"
    if s["movement"] < CONSTANT:
        return f"The process hardly differs from constant weights: {distance}."
    return f"The process moves: {distance}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


LONG = 20  # items of a list, beyond which it is shown in part: a tokenizer's vocabulary


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{'' if name == 'name' else f'{name} '}{_words(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        more = [f"... {len(value):,} in all"] if len(value) > LONG else []
        return "[" + ", ".join([*map(_words, value[: LONG // 2 if more else LONG]), *more]) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
