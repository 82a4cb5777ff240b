"""What a tuning would try, and what that costs, without data or weights."""

from __future__ import annotations

from typing import Any

import torch

from distpro.config.reading import for_retrain
from distpro.report.cost import describe
from distpro.runs.candidates import Candidate, candidates_of
from distpro.runs.tuning import Request, check_trials
from distpro.schedule import Schedule
from pathways.registry import UserError


def plan_of(request: Request) -> tuple[list[str], list[list[Any]], str]:
    """Columns and rows of a table of the candidates, and a line of what the budget costs. Raises UserError as a run would."""
    config, tune = request.config, request.config.tune
    short = config.training.model_copy(update={"epochs": tune.epochs or config.training.epochs})
    whole = describe(config.model_copy(update={"training": short}), searching=True)
    space = _space(config, [key for key, *_ in whole.terms])
    rows: list[list[Any]] = []
    costs: dict[str, float] = {}
    for candidate in candidates_of(config, space, request.learned, request.schedule):
        first, _ = candidate.at(candidate.centres)
        try:
            macs = describe(for_retrain(first), searching=False).step_macs * (whole.steps or 0)
        except UserError as error:
            if candidate.stated:
                raise UserError(f"candidate '{candidate.name}': {error}") from None
            rows.append([candidate.name, f"left out: {error}", "-"])
            continue
        costs[candidate.name] = macs
        rows.append([candidate.name, _free(candidate, tune.span), f"{macs / 1e12:.4g}" if whole.steps else "unknown"])
    check_trials(config, list(costs))
    mean = sum(costs.values()) / max(1, len(costs))
    total = f"about {tune.trials * mean / 1e12:.4g} TMAC" if whole.steps else "a cost that the data set's size decides"
    line = (
        f"budget: {tune.trials} trainings of {short.epochs} epochs ({total}), of which the first {len(costs)} are each "
        f"candidate's where its range begins; pruner: {tune.pruner}"
    )
    return ["candidate", "free", "TMAC a training"], rows, line


def _space(config: Any, keys: list[str]) -> Schedule | None:
    """The terms whose weights are free, as far as they can be told without measuring."""
    constant = {term.key or term.loss for term in config.terms if term.weight != "learned"}
    free = [key for key in keys if key.partition(":")[0] not in constant]
    if not free:
        return None
    levels, equal = torch.zeros(len(free), 3, dtype=torch.int64), torch.full((1, len(free)), 1 / len(free))
    return Schedule(tuple(free), levels, equal.log(), equal)


def _free(candidate: Candidate, span: tuple[float, float]) -> str:
    if not candidate.centres:
        return "nothing"
    if candidate.family == "static":
        return f"{len(candidate.centres)} weights, each from {span[0]:g} to {span[1]:g} times an equal share"
    name, centre = next(iter(candidate.centres.items()))
    return f"{name} from {span[0] * centre:.3g} to {span[1] * centre:.3g}, first {centre:.3g}"
