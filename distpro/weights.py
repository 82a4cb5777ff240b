"""Who says what the weights of the terms are at a step: the protocol, and the replay of a schedule or a control."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distpro.batch import Batch
from distpro.features import TrainingPass
from distpro.schedule import TASK, Said, Schedule, owner_of
from distpro.term import Entry, Term, at_step, entries_of
from pathways.registry import UserError, nearest

Scale = float | Callable[[int], float]
"""λ, or a function of the step that gives it."""


class Weights(Protocol):
    """Who says what the weights are: `Searcher` or `Replay`."""

    def weights(self, step: int) -> Sequence[float] | Tensor:
        """λ·w of every entry of the vector of term losses. Asked before every pass, also those of one step: a backward pass
        uses up the graph of weights that are trained."""

    def watches(self, step: int) -> bool:
        """Whether `before_update` and `after_update` are to be called for this step."""

    needs_views: bool
    """Whether watched steps need each term's own gradient."""
    repeats: bool
    """Whether a step is taken again after the weights have moved (a literal Algorithm 1)."""

    def before_update(self, step: int, batch: Batch, state: dict[str, Tensor], done: TrainingPass) -> None:
        """After the backward pass of a watched step; ``state`` is the random state before it."""

    def after_update(self, step: int) -> bool:
        """After the parameters have moved in a watched step; says whether the weights have moved too."""

    def resumable(self, steps: int) -> bool:
        """Whether a run that is left after so many steps can be gone on with to the same numbers."""

    def scalars(self) -> Mapping[str, float | Tensor]:
        """What to log, beside the weights."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


NOTHING_TO_WEIGH = (
    "retrain.weights is '{}', but no term's weight is free: give pathways or terms without a constant weight, or --schedule alpha.pt, "
    "which knows those of its search"
)


class Followed(Protocol):
    """What a replay needs of an objective."""

    uncertainty: Uncertainty | None

    @property
    def keys(self) -> list[str]: ...

    def weights_at(self, step: int) -> Sequence[float] | Tensor: ...

    def keep(self, terms: Sequence[nn.Module]) -> None: ...

    def follow(
        self,
        schedule: Schedule,
        total_steps: int,
        *,
        scale: Scale | Said = "schedule",
        mapping: Mapping[str, str] | None = None,
    ) -> None: ...

    def follow_equal(self, scale: Scale = 1.0, scales: Mapping[str, float] | None = None) -> None: ...

    def follow_uncertainty(self, scale: Scale = 1.0, scales: Mapping[str, float] | None = None) -> None: ...


CONTROLS: dict[str, Callable[[Schedule, int], Schedule]] = {
    "searched": lambda schedule, seed: schedule,
    "final": lambda schedule, seed: schedule.final(),
    "mean": lambda schedule, seed: schedule.mean(),
    "shuffled": Schedule.shuffled,
    "permuted": Schedule.permuted,
    "random": Schedule.random,
}
"""What a retrain does with a schedule, by the name in ``retrain.weights``."""

OF_TIME = ("final", "mean", "shuffled")
"""Those that change nothing where the weights are constant."""


class Replay:
    """The weights that an objective says itself: constants, the schedule that it follows, or those that are trained with it.
    ``dropped``: keys of the terms that the schedule has taken out, which the log shows with a weight of 0."""

    needs_views = repeats = False

    def __init__(self, objective: Followed, dropped: Iterable[str] = ()):
        self.objective, self.dropped = objective, tuple(dropped)

    def weights(self, step: int) -> Sequence[float] | Tensor:
        return self.objective.weights_at(step)

    def watches(self, step: int) -> bool:
        return False

    def resumable(self, steps: int) -> bool:
        return True

    def before_update(self, step: int, batch: Batch, state: dict[str, Tensor], done: TrainingPass) -> None:
        raise AssertionError("a replay watches no step")

    def after_update(self, step: int) -> bool:
        return False

    def scalars(self) -> Mapping[str, float | Tensor]:
        trained = self.objective.uncertainty
        return {f"weight/{key}": 0.0 for key in self.dropped} if trained is None else trained.scalars()

    def state_dict(self) -> dict[str, Any]:
        trained = self.objective.uncertainty
        return {} if trained is None else trained.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.objective.uncertainty is not None:
            self.objective.uncertainty.load_state_dict(state)


class Uncertainty(nn.Module):
    """Weights that are trained with the student: uncertainty weighting (Kendall, Gal & Cipolla, *Multi-task learning using
    uncertainty to weigh losses for scene geometry and semantics*, CVPR 2018). Each loss has a number s = log σ², 0 at first:

        L = w_task (exp(-s_task) L_task + ½ s_task) + λ Σ_j (½ exp(-s_j) c_j ℓ_j + ½ s_j)

    c_j is a term's scale. With all of w_task, λ and c_j 1 this is the paper's Eq. 10, the task a classification, 1/σ², and each
    term a regression on what the teacher says, 1/(2σ²). At its own minimum over s every loss ℓ weighs 1/(2ℓ).

    Args:
        terms: of the objective. A term with a constant weight keeps it and has no s.
        scale: λ, or a function of the step. scales: entry's key → c; 1 where there is none.

    Raises UserError where no term's weight is to be learned, and for a loss that may be negative: its s would fall for ever.
    """

    # The task has an s of its own, as every task has in the paper. Without one, the terms' weights would grow while their
    # losses fall and the task's would not. That its factor is 1/σ² for a task that is no classification too only moves the
    # start: with ½ everything is the same at s + log 2. The same holds for a term that compares classes.

    def __init__(self, terms: Sequence[Any], scale: Scale = 1.0, scales: Mapping[str, float] | None = None):
        super().__init__()
        free = [term for term in terms if term.weight is None]
        if not free:
            raise UserError(NOTHING_TO_WEIGH.format("uncertainty"))
        for term in free:
            if getattr(getattr(term, "loss", None), "signed", False):
                raise UserError(
                    f"retrain.weights is 'uncertainty', but the loss of term '{term.key}' may be negative, and its weight would "
                    "grow for ever: give it a constant weight, or leave it out"
                )
        self.keys = [entry.key for term in free for entry in entries_of(term)]
        self._all, self._scale = tuple(terms), scale
        self.scales: Tensor
        self.register_buffer(
            "scales", torch.tensor([(scales or {}).get(key, 1.0) for key in self.keys]), persistent=False
        )
        self.task, self.terms = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(len(self.keys)))

    def weights(self, step: int) -> Tensor:
        """Weight of every entry (N,), λ ½ exp(-s) c or its constant, with a graph to s."""
        learned = iter((self._strength(step) / 2 * self.scales * self.terms.neg().exp()).unbind())
        fixed = constants_of(self._all, step)
        return torch.stack([next(learned) if w is None else self.terms.new_tensor(w) for w in fixed])

    def of_task(self, loss: Tensor, weight: float, step: int) -> Tensor:
        """The sum without the terms' losses, scalar: w_task (exp(-s_task) L_task + ½ s_task) + λ Σ ½ s."""
        return weight * (self.task.neg().exp() * loss + self.task / 2) + self._strength(step) / 2 * self.terms.sum()

    def scalars(self) -> dict[str, Tensor]:
        """exp(-s) of every loss, under the tags that a search has for its weights."""
        values = self.terms.detach().neg().exp().cpu()
        named = {f"alpha/{key}": value for key, value in zip(self.keys, values, strict=True)}
        return {"scalar/task": self.task.detach().neg().exp().cpu(), **named}

    def _strength(self, step: int) -> float:
        return self._scale(step) if callable(self._scale) else self._scale


def replay(
    objective: Followed,
    how: str,
    total_steps: int,
    schedule: Schedule | None = None,
    threshold: float | None | Said = "schedule",
    scale: Scale | Said = "schedule",
    mapping: Mapping[str, str] | None = None,
    start: float | Said = "schedule",
    seed: int = 0,
) -> Replay:
    """Let ``objective`` follow a schedule or a control.

    Args:
        how: ``searched`` (the schedule), one of its controls ``final`` (its last weights at every step), ``mean``,
            ``shuffled``, ``permuted`` and ``random`` (see `Schedule`), ``equal`` (1/L for each of the L terms without a
            constant weight, times its scale and λ if there is a schedule), ``uncertainty`` (weights that are trained with
            the student, times the same: `Uncertainty`), ``constant`` (every term's own weight) or ``none`` (no term at
            all). The last four leave the objective's scalars alone.
        threshold, scale, mapping, start: see `Objective.follow`.
        seed: of the random controls.

    Raises UserError if there is no schedule where one is needed, or one that does not fit.
    """
    before = [] if how == "none" else objective.keys
    if how == "none":
        objective.keep([])
    elif how in ("equal", "uncertainty"):
        scales = {} if schedule is None else dict(zip(schedule.keys, schedule.scales.tolist(), strict=True))
        strength = strength_of(schedule, total_steps, scale)
        if how == "uncertainty":
            objective.follow_uncertainty(strength, scales)
        else:
            objective.follow_equal(strength, scales)
    elif how in CONTROLS:
        if schedule is None:
            raise UserError(f"retrain.weights is '{how}', which needs a schedule: give --schedule alpha.pt")
        control = CONTROLS[how](schedule.saying(threshold, start), seed)
        objective.follow(control, total_steps, scale=scale, mapping=mapping)
    left = set(objective.keys)
    return Replay(objective, [key for key in before if key not in left])


def strength_of(schedule: Schedule | None, total_steps: int, scale: Scale | Said) -> Scale:
    """λ: the one given, or the schedule's in a training of so many steps; 1 without a schedule."""
    if not isinstance(scale, str):
        return scale
    if scale != "schedule":
        raise UserError(f"scale is '{scale}' (allowed: a number, a function of the step, schedule)")
    return 1.0 if schedule is None else schedule.strengths(total_steps)


def constants_of(terms: Iterable[Any], step: int) -> list[float | None]:
    """Weight of each entry of the terms that is fixed, a process at its step; None for the others. Raises UserError where a process
    gives no finite number."""
    weights: list[float | None] = []
    for term in terms:
        value = None if term.weight is None else float(at_step(f"term '{term.key}': weight", term.weight, step))
        weights += [value] * len(entries_of(term))
    return weights


def weights_of(
    terms: Iterable[Any],
    columns: Mapping[str, Tensor],
    total_steps: int = 1,
    scale: Scale = 1.0,
) -> Callable[[int], Sequence[float] | Tensor]:
    """step → weight of each entry of the terms: ``scale`` times its row of ``columns`` (T,), else its constant, else 1.
    The last row stands for all later steps."""
    terms = list(terms)
    keys = [entry.key for term in terms for entry in entries_of(term)]
    factor = scale if callable(scale) else lambda step: scale

    def weights_at(step: int) -> list[float]:
        row, by = min(step, total_steps - 1), factor(step)
        constants = [1.0 if weight is None else weight for weight in constants_of(terms, step)]
        return [by * columns[k][row].item() if k in columns else c for k, c in zip(keys, constants, strict=True)]

    return weights_at


def columns_of(
    schedule: Schedule, terms: Sequence[Any], mapping: Mapping[str, str] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The schedule's scaled weights per step (T,) of each entry of the terms, by key: matched by key or level
    (`Schedule.columns`), reduced first for terms with a ``reduction``; and its scalars under the names that the terms
    have here. Raises UserError where they do not fit."""
    columns: dict[str, Tensor] = {}
    scalars: dict[str, Tensor] = {} if terms else dict(schedule.scalars)
    if not terms and not scalars:
        raise UserError(
            "schedule: it drives nothing, every term states a weight: leave out the weights, or the schedule"
        )
    for reduction in dict.fromkeys(term.reduction for term in terms):
        members = [term for term in terms if term.reduction == reduction]
        entries = [_reduced(entry, reduction) for term in members for entry in entries_of(term)]
        joined = {entry.key: "total" for entry in entries} if reduction == "total" else mapping
        fitting = (schedule.reduce(reduction) if reduction else schedule).columns(entries, joined)
        scaled = fitting.weights * fitting.scales
        columns |= {entry.key: scaled[:, n] for n, entry in enumerate(entries)}
        scalars |= fitting.scalars
    return columns, scalars


class Scalars:
    """Learned numbers beside the weights that an objective follows: the task's weight, and scalars of its losses.

    Args:
        values: name → value per step (T,), see `Schedule.scalars`; the last one stands for all later steps.
        terms: of the objective.

    Raises UserError for a name that is no scalar of a term's loss, for values that the loss refuses, and where there are none
    for a scalar that a term says is learned.
    """

    def __init__(self, values: Mapping[str, Tensor], terms: Sequence[Any]):
        numbers = {name: tensor.double().tolist() for name, tensor in values.items()}
        self.task: list[float] | None = numbers.pop(TASK, None)
        self._moving: list[tuple[Term, str, list[float], Any]] = []  # term, scalar, values, what was there before
        by_key = {term.key: term for term in terms if isinstance(term, Term)}
        for name in (f"{key}.{path}" for key, term in by_key.items() for path in term.learned):
            if name not in numbers:
                raise UserError(f"schedule: it has no scalar '{name}', which the term says is learned: state a number")
        for name, steps in numbers.items():
            owner = owner_of(name, list(by_key))
            if owner is None:
                near = nearest(name.rpartition(".")[0], by_key)
                raise UserError(
                    f"schedule: scalar '{name}' is of no term{near} (there are: {', '.join(by_key) or 'none'})"
                )
            term, path = by_key[owner], name[len(owner) + 1 :]
            attribute = path.partition(".")[0]
            allowed = getattr(term.loss, "scalars", None)
            if not hasattr(term.loss, attribute) or (allowed is not None and attribute not in allowed):
                raise UserError(
                    f"schedule: '{path}' of term '{owner}' cannot move (allowed: {', '.join(allowed or ()) or 'none'})"
                )
            self._moving.append((term, path, steps, getattr(term.loss, attribute)))
            try:
                for value in (min(steps), max(steps)):
                    term.move(path, value)
            except UserError as error:
                raise UserError(f"schedule: scalar '{name}': {error}") from None
            except (IndexError, ValueError, TypeError):
                raise UserError(f"schedule: scalar '{name}': there is no such item") from None
            finally:
                setattr(term.loss, attribute, self._moving[-1][3])

    def at(self, step: int) -> None:
        """Give the losses' scalars the values of a training step. Raises UserError for a step below 0."""
        if step < 0:
            raise UserError(f"step is {step}: the training steps are counted from 0")
        for term, path, values, _ in self._moving:
            term.move(path, values[min(step, len(values) - 1)])

    def task_weight(self, step: int, own: Scale) -> float:
        """The task's weight at a training step: the objective's ``own`` where the schedule says nothing of it."""
        if self.task is not None:
            return self.task[min(step, len(self.task) - 1)]
        return at_step("objective: task_weight", own, step)  # type: ignore[no-any-return]

    def then(self, values: Mapping[str, Tensor], terms: Sequence[Any]) -> Scalars:
        """Others in the place of these, the losses' scalars as they were before."""
        for term, path, _, before in self._moving:
            setattr(term.loss, path.partition(".")[0], before)
        return Scalars(values, terms)


def _reduced(entry: Entry, reduction: str | None) -> Entry:
    """The entry as it looks to a reduced schedule: with the levels that are left there, and without a transform."""
    sides = {"teacher_level": (0,), "student_level": (1,), "connection": (0, 1)}.get(reduction or "")
    if sides is None or entry.level is None:
        return entry
    i, j, _ = (level if side in sides else 0 for side, level in enumerate(entry.level))
    return Entry(entry.key, (i, j, 0))
