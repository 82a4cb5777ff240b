"""The learned weights over time, what a replay makes of them, and the file that carries both (`alpha.pt`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from distpro.files import load_safely, save_atomically
from distpro.schedule_file import FORMAT, LOG, VERSION, check, content_of, fields_of
from pathways.registry import UserError, nearest

__all__ = ["FORMAT", "REDUCTIONS", "VERSION", "Said", "Schedule", "drop", "warmed_up"]

REDUCTIONS = ("total", "teacher_level", "student_level", "connection")
TASK = "task"  # name of the task weight among the scalars
Said = Literal["schedule"]
"""In the place of a number: what the schedule itself says."""


@dataclass(frozen=True)
class Schedule:
    """One weight process per term, sampled at T steps, and what a replay makes of it.

    A replay weights a term's loss by λ · s · w: it leaves the beginning out (``start``), stretches the rest to its
    length, and drops what the threshold drops (`played`).

    Attributes:
        keys: names of the N terms.
        levels: (i, j, k) of each term, (N, 3) int64, counted from 1; zeros where a term has no such place.
        transforms: name of each term's transform, or an empty string.
        alpha_tilde: α̃ per step, (T, N) float32.
        weights: w per step, (T, N) float32.
        steps_per_epoch: of the search, so that a step can be read as an epoch.
        meta: what else the file says: config, signatures, versions, creation time.
        scales: factor on each term's weights, (N,) float32, that made the terms alike in size during the search (see
            `distpro.search.scales`); ones where nothing was normalised.
        strength: λ, the factor on all weights.
        warmup: epochs over which λ grows, as `warmed_up` says; they are stretched with the schedule.
        reading: how w was made of α̃: name of a weighting, or ``log`` where α̃ = log w.
        threshold: None drops nothing. For a weighting it is τ: a term is dropped while its α̃ is at or below it. For
            ``log``, where a common shift of all α̃ is a factor like λ, any number drops what has less than a tenth of an
            equal share: w_j / Σw < 1 / (10 N), the scales having made the terms' units alike.
        start: fraction of the steps that a replay leaves out at the beginning.
        scalars: learned numbers beside the weights, name → (T,) float32: ``task`` is the task loss's weight,
            ``<term key>.<name>`` a scalar of that term's loss, such as ``kd.temperature``.
    """

    keys: tuple[str, ...]
    levels: Tensor
    alpha_tilde: Tensor
    weights: Tensor
    transforms: tuple[str, ...] = ()
    steps_per_epoch: float = 1.0
    meta: Mapping[str, Any] = field(default_factory=dict)
    scales: Tensor = field(default_factory=lambda: torch.ones(0))
    strength: float = 1.0
    warmup: float = 0.0
    reading: str = "biased_softmax"
    threshold: float | None = None
    start: float = 0.0
    scalars: Mapping[str, Tensor] = field(default_factory=dict)
    path: ClassVar[str | None] = None  # of one that `load` has read as it is: the file

    def __post_init__(self) -> None:
        if not self.transforms:
            object.__setattr__(self, "transforms", ("",) * len(self.keys))
        if len(self.scales) == 0:
            object.__setattr__(self, "scales", torch.ones(len(self.keys)))
        check(self)

    def __len__(self) -> int:
        """Number of steps T."""
        return len(self.weights)

    # Files

    def save(self, path: str | Path) -> None:
        """Write atomically: the file is the old one or the new one, never half of each."""
        save_atomically(content_of(self), path)

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Read a schedule file. Executes nothing from it. Raises UserError if it is no schedule or a newer one."""
        content = load_safely(path, wanted="alpha.pt")
        try:
            schedule = cls(**fields_of(content))._in_time(Tensor.float)
            schedule = replace(schedule, levels=schedule.levels.long(), scales=schedule.scales.float())
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (LookupError, AttributeError, TypeError, ArithmeticError) as error:
            raise UserError(f"{path}: damaged schedule ({type(error).__name__}: {error})") from None
        object.__setattr__(schedule, "path", str(path))
        return schedule

    # Replay

    def saying(self, threshold: float | None | Said = "schedule", start: float | Said = "schedule") -> Schedule:
        """The schedule with another threshold or start, where one is given."""
        threshold = self.threshold if threshold == "schedule" else threshold
        return replace(self, threshold=threshold, start=self.start if start == "schedule" else start)

    def played(self, total_steps: int) -> Schedule:
        """What a training of so many steps plays: without the beginning, stretched, and without what is dropped."""
        return self.after().interpolate(total_steps).drop(self.threshold)

    def strengths(self, total_steps: int) -> Callable[[int], float]:
        """λ as a function of the step of a training of so many steps."""
        return warmed_up(self.strength, self.warmup, self.steps_per_epoch * total_steps / len(self))

    # Time

    def _in_time(self, change: Callable[[Tensor], Tensor], **more: Any) -> Schedule:
        """All that has a value per step, changed alike."""
        return replace(
            self,
            weights=change(self.weights),
            alpha_tilde=change(self.alpha_tilde),
            scalars={name: change(values) for name, values in self.scalars.items()},
            **more,
        )

    def interpolate(self, total_steps: int) -> Schedule:
        """The schedule stretched linearly to ``total_steps`` steps; end points map to end points (Section 3.4)."""
        if not isinstance(total_steps, Integral) or total_steps < 1:
            raise UserError(
                f"schedule: cannot be interpolated to {total_steps!r} steps (allowed: whole numbers from 1 on)"
            )
        position = torch.linspace(0, len(self) - 1, total_steps, dtype=torch.float64)
        left = position.floor().long().clamp(max=max(len(self) - 2, 0))
        right = (left + 1).clamp(max=len(self) - 1)
        fraction = position - left

        def stretch(x: Tensor) -> Tensor:
            part = fraction[:, None] if x.dim() == 2 else fraction
            return torch.lerp(x[left].double(), x[right].double(), part).float()

        return self._in_time(stretch, steps_per_epoch=self.steps_per_epoch * total_steps / len(self))

    def after(self, fraction: float | None = None) -> Schedule:
        """The schedule from a fraction of its steps on, by default from its ``start``: what came before is left out, at
        least one step stays. What is left counts as the same number of epochs, which a replay stretches it to."""
        first = min(int((self.start if fraction is None else fraction) * len(self)), len(self) - 1)
        per_epoch = self.steps_per_epoch * (len(self) - first) / len(self)
        return self._in_time(lambda x: x[first:], steps_per_epoch=per_epoch, start=0.0)

    def dropped(self) -> Tensor:
        """Where the threshold drops a term, (T, N) bool."""
        if self.threshold is None:
            return torch.zeros_like(self.weights, dtype=torch.bool)
        if self.reading == LOG:
            w = self.weights.double()
            return 10 * len(self.keys) * w < w.sum(1, keepdim=True)
        return self.alpha_tilde <= self.threshold

    def drop(self, threshold: float | None) -> Schedule:
        """Zero weight wherever ``threshold`` drops a term. There is nothing left to drop then."""
        gone = replace(self, threshold=threshold).dropped()
        return replace(self, weights=self.weights.masked_fill(gone, 0.0), threshold=None)

    # Controls: of what a replay plays, so after `start`. λ and scales stay; threshold and scalars where nothing else is said.

    def final(self) -> Schedule:
        """The last step's weights at every step (control of Table 1)."""
        return self._in_time(lambda x: x[-1:].expand_as(x).clone())

    def mean(self) -> Schedule:
        """The mean of each weight over time at every step (control: does the order in time matter?)."""
        return self.after()._in_time(lambda x: x.mean(0, keepdim=True).expand_as(x).clone())

    def shuffled(self, seed: int = 0) -> Schedule:
        """The steps in random order (control: does the order in time matter?)."""
        played = self.after()
        order = torch.randperm(len(played), generator=torch.Generator().manual_seed(seed))
        return played._in_time(lambda x: x[order])

    def permuted(self, seed: int = 0) -> Schedule:
        """Each term with the process of another one, at random (control: does it matter which term gets which?).
        Scales and scalars stay with their terms."""
        order = torch.randperm(len(self.keys), generator=torch.Generator().manual_seed(seed))
        return replace(self, weights=self.weights[:, order], alpha_tilde=self.alpha_tilde[:, order])

    def random(self, seed: int = 0, knots: int = 5) -> Schedule:
        """Random processes (control): log weights are normal at ``knots`` equally spaced steps, as far apart from term
        to term as this schedule's last ones, linear in between; the sum over the terms is this schedule's at each step.
        The threshold is left out: there is no α̃ for it."""
        played = self.after()
        generator = torch.Generator().manual_seed(seed)
        spread = played.weights[-1].clamp(min=1e-12).log().std() if len(self.keys) > 1 else torch.tensor(0.0)
        drawn = (spread * torch.randn(knots, len(self.keys), generator=generator)).exp()
        at_knots = replace(played, weights=drawn, alpha_tilde=torch.ones_like(drawn), scalars={})
        random = at_knots.interpolate(len(played)).weights
        return replace(
            played,
            weights=random / random.sum(1, keepdim=True) * played.weights.sum(1, keepdim=True),
            alpha_tilde=torch.ones_like(played.alpha_tilde),
            threshold=None,
        )

    def equal(self) -> Schedule:
        """1/N for every term at every step (control of Table 1). Threshold and scalars are left out: nothing here is
        learned but the terms' scales."""
        return replace(
            self,
            weights=torch.full_like(self.weights, 1 / len(self.keys)),
            alpha_tilde=torch.ones_like(self.alpha_tilde),
            threshold=None,
            scalars={},
        )

    # Terms

    def reduce(self, how: str) -> Schedule:
        """Sum weights for a loss that wants fewer of them: ``total`` (one column), ``teacher_level``,
        ``student_level`` (one column per level, keys such as ``teacher_level.2``) or ``connection`` (one per pair of
        levels, ``connection.2.3``). α̃ of a sum is the log of the summed exp(α̃), so what the threshold drops is dropped
        first. λ and the task's weight stay. The single terms' scales and scalars mean nothing to the sum's loss and are
        left out. Raises UserError for another word."""
        if how not in REDUCTIONS:
            raise UserError(f"unknown reduction '{how}'{nearest(how, REDUCTIONS)} (allowed: {', '.join(REDUCTIONS)})")
        sides = {"total": [], "teacher_level": [0], "student_level": [1], "connection": [0, 1]}[how]
        places = [tuple(level[side] for side in sides) for level in self.levels.tolist()]
        groups = sorted(set(places))
        members = [torch.tensor([place == group for place in places]) for group in groups]
        kept = self.drop(self.threshold)
        levels = torch.zeros(len(groups), 3, dtype=torch.int64)
        levels[:, sides] = torch.tensor(groups, dtype=torch.int64)
        return replace(
            kept,
            keys=tuple(".".join([how, *map(str, group)]) for group in groups),
            levels=levels,
            transforms=("",) * len(groups),
            scales=torch.ones(len(groups)),
            weights=torch.stack([kept.weights[:, m].sum(1) for m in members], 1),
            alpha_tilde=torch.stack([self.alpha_tilde[:, m].logsumexp(1) for m in members], 1),
            scalars={name: values for name, values in self.scalars.items() if name == TASK},
        )

    def columns(self, terms: Sequence[Any], mapping: Mapping[str, str] | None = None) -> Schedule:
        """The columns that drive ``terms``, in their order, under their keys: by key, else by level (i, j, transform).

        Terms may share a column, such as two losses that both follow ``total``.

        Args:
            terms: anything with ``key`` and ``level`` (and ``transform_name``).
            mapping: term key → schedule key, for terms that neither rule finds.

        Raises UserError if a term finds no column, or if columns are left over without a mapping that says so.
        """
        mapping = mapping or {}
        by_key = {k: n for n, k in enumerate(self.keys)}
        by_level: dict[tuple[Any, ...], int] = {}
        for n, (level, transform) in enumerate(zip(self.levels.tolist(), self.transforms, strict=True)):
            if any(level):
                by_level.setdefault((*level[:2], transform), n)
        chosen = []
        for term in terms:
            key = mapping.get(term.key, term.key)
            if key not in by_key and term.key in mapping:
                raise UserError(f"schedule: mapping of '{term.key}': no column '{key}'{nearest(key, self.keys)}")
            level = tuple(getattr(term, "level", None) or (0, 0, 0))
            place = (*level[:2], getattr(term, "transform_name", ""))
            column = by_key.get(key, by_level.get(place))
            if column is None:
                raise UserError(
                    f"schedule: no column for term '{term.key}' (level {place}){nearest(key, self.keys)}. "
                    f"The schedule has {self._summary()}; a mapping {{term key: schedule key}} can join them."
                )
            chosen.append(column)
        left_over = set(range(len(self.keys))) - set(chosen)
        if left_over and not mapping:
            raise UserError(
                f"schedule: {len(left_over)} of {len(self.keys)} columns fit no term, for instance "
                f"'{self.keys[min(left_over)]}'; the schedule has {self._summary()}, the objective {len(chosen)} terms"
            )
        return self.take(chosen, [term.key for term in terms])

    def take(self, columns: Sequence[int], keys: Sequence[str] | None = None) -> Schedule:
        """The given columns, in that order, under new ``keys`` if there are any. Their terms' scalars go with them."""
        index = list(columns)
        names = tuple(keys or (self.keys[n] for n in index))
        scalars: dict[str, Tensor] = {}
        for name, values in self.scalars.items():
            owner = owner_of(name, self.keys)
            new = [key for n, key in zip(index, names, strict=True) if self.keys[n] == owner]
            scalars |= {name: values} if owner is None else {key + name[len(owner) :]: values for key in new}
        whole = self.drop(self.threshold) if self.reading == LOG else self  # shares are of all terms
        return replace(
            whole,
            keys=names,
            transforms=tuple(self.transforms[n] for n in index),
            levels=self.levels[index],
            scales=self.scales[index],
            weights=whole.weights[:, index],
            alpha_tilde=self.alpha_tilde[:, index],
            scalars=scalars,
        )

    def _summary(self) -> str:
        t, s = (int(self.levels[:, side].max()) if len(self.keys) else 0 for side in (0, 1))
        return f"{len(self.keys)} terms over {t} teacher and {s} student levels"


def drop(weights: Tensor, alpha_tilde: Tensor, threshold: float | None) -> Tensor:
    """Weights with zeros where α̃ is at or below the threshold τ (Section 3.2). Dropped terms have taken part in the
    normalisation, so the others keep their weights. ``None`` drops nothing. Shapes (..., N)."""
    if threshold is None:
        return weights
    return torch.where(alpha_tilde > threshold, weights, torch.zeros_like(weights))


def warmed_up(strength: float, warmup: float, steps_per_epoch: float) -> Callable[[int], float]:
    """λ as a function of the step: ``strength``, after ReviewKD's warm-up min(epoch / W, 1), epochs from 1."""

    def at(step: int) -> float:
        epoch = math.floor(step / steps_per_epoch + 1e-9) + 1  # an epoch may be 390.99999999 steps after a division
        return strength * (min(1.0, epoch / warmup) if warmup else 1.0)

    return at


def owner_of(scalar: str, keys: Sequence[str]) -> str | None:
    """Which of the terms' ``keys`` a scalar's name begins with; None for the task's weight and those of other terms."""
    return max((key for key in keys if scalar.startswith(f"{key}.")), key=len, default=None)
