"""The learned weights over time, and the file that carries them (`alpha.pt`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from distpro.files import load_safely, save_atomically
from pathways.registry import UserError, nearest

FORMAT = "distpro-schedule"
VERSION = 2  # 2 added scales
REDUCTIONS = ("total", "teacher_level", "student_level", "connection")


@dataclass(frozen=True)
class Schedule:
    """One weight process per term, sampled at T steps.

    Attributes:
        keys: names of the N terms.
        levels: (i, j, k) of each term, (N, 3) int64, counted from 1; zeros where a term has no such place.
        transforms: name of each term's transform, or an empty string.
        alpha_tilde: α̃ per step, (T, N) float32.
        weights: w per step, (T, N) float32.
        steps_per_epoch: of the search, so that a step can be read as an epoch.
        meta: what else the file says: weighting, threshold, config, signatures, versions, creation time.
        scales: factor on each term's weights, (N,) float32, that made the terms alike in size during the search (see
            `distpro.search.scales`); ones where nothing was normalised.
    """

    keys: tuple[str, ...]
    levels: Tensor
    alpha_tilde: Tensor
    weights: Tensor
    transforms: tuple[str, ...] = ()
    steps_per_epoch: float = 1.0
    meta: Mapping[str, Any] = field(default_factory=dict)
    scales: Tensor = field(default_factory=lambda: torch.ones(0))
    path: ClassVar[str | None] = None  # of one that `load` has read as it is: the file

    def __post_init__(self) -> None:
        n = len(self.keys)
        if len(set(self.keys)) != n:
            raise UserError("schedule: two terms have one key")
        if not self.transforms:
            object.__setattr__(self, "transforms", ("",) * n)
        if len(self.scales) == 0:
            object.__setattr__(self, "scales", torch.ones(n))
        for name, tensor, width in (("levels", self.levels, 3), ("weights", self.weights.T, None)):
            if tensor.dim() != 2 or len(tensor) != n or (width and tensor.shape[1] != width):
                raise UserError(f"schedule: {name} of shape {tuple(tensor.shape)} do not fit {n} keys")
        if self.alpha_tilde.shape != self.weights.shape or len(self.weights) == 0:
            raise UserError(
                f"schedule: alpha_tilde {tuple(self.alpha_tilde.shape)} and weights {tuple(self.weights.shape)} must be equal, (T, N) with T > 0"
            )
        if self.scales.shape != (n,) or not torch.isfinite(self.scales).all():
            raise UserError(
                f"schedule: scales of shape {tuple(self.scales.shape)} do not fit {n} keys, or are not finite"
            )
        if not torch.isfinite(self.weights).all():
            raise UserError("schedule: weights are not all finite")

    def __len__(self) -> int:
        """Number of steps T."""
        return len(self.weights)

    # Files

    def save(self, path: str | Path) -> None:
        """Write atomically: the file is the old one or the new one, never half of each."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "keys": list(self.keys),
            "levels": self.levels.to(torch.int64),
            "transforms": list(self.transforms),
            "alpha_tilde": self.alpha_tilde.float().contiguous(),
            "weights": self.weights.float().contiguous(),
            "scales": self.scales.float().contiguous(),
            "steps_per_epoch": float(self.steps_per_epoch),
            "meta": dict(self.meta),
        }
        save_atomically(content, path)

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Read a schedule file. Executes nothing from it. Raises UserError if it is no schedule or a newer one."""
        content = load_safely(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{path}: not a distpro schedule")
        version = content.get("version")
        if not isinstance(version, int) or version > VERSION:
            raise UserError(f"{path}: schedule version {version}; this distpro reads up to {VERSION}")
        try:
            schedule = cls(
                keys=tuple(content["keys"]),
                levels=content["levels"],
                transforms=tuple(content["transforms"]),
                alpha_tilde=content["alpha_tilde"],
                weights=content["weights"],
                scales=content["scales"] if version > 1 else torch.ones(len(content["keys"])),
                steps_per_epoch=content["steps_per_epoch"],
                meta=content["meta"],
            )
            object.__setattr__(schedule, "path", str(path))
            return schedule
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{path}: damaged schedule ({type(error).__name__}: {error})") from None

    # Time

    def interpolate(self, total_steps: int) -> Schedule:
        """The schedule stretched linearly to ``total_steps`` steps; end points map to end points (Section 3.4)."""
        if total_steps < 1:
            raise UserError(f"schedule: cannot be interpolated to {total_steps} steps")
        position = torch.linspace(0, len(self) - 1, total_steps, dtype=torch.float64)
        left = position.floor().long().clamp(max=max(len(self) - 2, 0))
        right = (left + 1).clamp(max=len(self) - 1)
        fraction = (position - left)[:, None]

        def stretch(x: Tensor) -> Tensor:
            return torch.lerp(x[left].double(), x[right].double(), fraction).float()

        return replace(
            self,
            alpha_tilde=stretch(self.alpha_tilde),
            weights=stretch(self.weights),
            steps_per_epoch=self.steps_per_epoch * total_steps / len(self),
        )

    def final(self) -> Schedule:
        """The last step's weights at every step (control of Table 1)."""
        return replace(
            self,
            weights=self.weights[-1:].expand_as(self.weights).clone(),
            alpha_tilde=self.alpha_tilde[-1:].expand_as(self.alpha_tilde).clone(),
        )

    def after(self, fraction: float) -> Schedule:
        """The schedule from a fraction of its steps on: what came before is left out, at least one step stays."""
        first = min(int(fraction * len(self)), len(self) - 1)
        return replace(self, weights=self.weights[first:], alpha_tilde=self.alpha_tilde[first:])

    def mean(self) -> Schedule:
        """The mean of each weight over time at every step (control: does the order in time matter?)."""
        return replace(
            self,
            weights=self.weights.mean(0, keepdim=True).expand_as(self.weights).clone(),
            alpha_tilde=self.alpha_tilde.mean(0, keepdim=True).expand_as(self.alpha_tilde).clone(),
        )

    def shuffled(self, seed: int = 0) -> Schedule:
        """The steps in random order (control: does the order in time matter?)."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return replace(self, weights=self.weights[order], alpha_tilde=self.alpha_tilde[order])

    def permuted(self, seed: int = 0) -> Schedule:
        """Each term with the process of another one, at random (control: does it matter which term gets which?)."""
        order = torch.randperm(len(self.keys), generator=torch.Generator().manual_seed(seed))
        return replace(self, weights=self.weights[:, order], alpha_tilde=self.alpha_tilde[:, order])

    def random(self, seed: int = 0, knots: int = 5) -> Schedule:
        """Random processes (control): log weights are normal at ``knots`` equally spaced steps, as far apart from term
        to term as this schedule's last ones, linear in between; the sum over the terms is this schedule's at each step."""
        generator = torch.Generator().manual_seed(seed)
        spread = self.weights[-1].clamp(min=1e-12).log().std() if len(self.keys) > 1 else torch.tensor(0.0)
        drawn = (spread * torch.randn(knots, len(self.keys), generator=generator)).exp()
        at_knots = replace(self, weights=drawn, alpha_tilde=torch.ones_like(drawn))
        random = at_knots.interpolate(len(self)).weights
        return replace(
            self,
            weights=random / random.sum(1, keepdim=True) * self.weights.sum(1, keepdim=True),
            alpha_tilde=torch.ones_like(self.alpha_tilde),
        )

    def equal(self) -> Schedule:
        """1/N for every term at every step (control of Table 1)."""
        return replace(
            self,
            weights=torch.full_like(self.weights, 1 / len(self.keys)),
            alpha_tilde=torch.ones_like(self.alpha_tilde),
        )

    def drop(self, threshold: float | None) -> Schedule:
        """Zero weight wherever α̃ is at or below ``threshold`` (τ, Section 3.2)."""
        return replace(self, weights=drop(self.weights, self.alpha_tilde, threshold))

    # Terms

    def reduce(self, how: str) -> Schedule:
        """Sum weights for a loss that wants fewer of them: ``total`` (one column), ``teacher_level``,
        ``student_level`` (one column per level, keys such as ``teacher_level.2``) or ``connection`` (one per pair of
        levels, ``connection.2.3``). α̃ of a sum is the log of the summed exp(α̃). The scales of the single terms mean nothing
        to the sum's loss and are left out. Raises UserError for another word."""
        if how not in REDUCTIONS:
            raise UserError(f"unknown reduction '{how}'{nearest(how, REDUCTIONS)} (allowed: {', '.join(REDUCTIONS)})")
        sides = {"total": [], "teacher_level": [0], "student_level": [1], "connection": [0, 1]}[how]
        places = [tuple(level[side] for side in sides) for level in self.levels.tolist()]
        groups = sorted(set(places))
        members = [torch.tensor([place == group for place in places]) for group in groups]
        levels = torch.zeros(len(groups), 3, dtype=torch.int64)
        levels[:, sides] = torch.tensor(groups, dtype=torch.int64)
        return replace(
            self,
            keys=tuple(".".join([how, *map(str, group)]) for group in groups),
            levels=levels,
            transforms=("",) * len(groups),
            scales=torch.ones(len(groups)),
            weights=torch.stack([self.weights[:, m].sum(1) for m in members], 1),
            alpha_tilde=torch.stack([self.alpha_tilde[:, m].logsumexp(1) for m in members], 1),
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
        """The given columns, in that order, under new ``keys`` if there are any."""
        index = list(columns)
        return replace(
            self,
            keys=tuple(keys or (self.keys[n] for n in index)),
            transforms=tuple(self.transforms[n] for n in index),
            levels=self.levels[index],
            scales=self.scales[index],
            weights=self.weights[:, index],
            alpha_tilde=self.alpha_tilde[:, index],
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
