"""What a search takes where its config is silent: space, horizon, trials for a budget, samples to judge by."""

import pytest

from distpro.config.reading import default_space, read_config
from distpro.config.schema import SearchConfig
from pathways.registry import UserError


def test_a_search_without_a_space_takes_the_default_one():
    """One that names pathways, terms, or neither of them in so many words (null) does not."""
    pair = {"teacher": {"model": "resnet20"}, "student": {"model": "resnet8"}}
    config = read_config(pair, space=default_space)
    assert config.pathways.connect == "matched" and len(config.terms) == 6
    assert config.search.horizon == 0.25 and config.search.weighting == "log" and config.retrain.start == 1
    assert read_config(pair).pathways is None and not read_config(pair).terms
    assert not read_config({**pair, "pathways": {"connect": "same"}}, space=default_space).terms
    assert read_config({**pair, "pathways": None, "terms": [{"loss": "kd"}]}, space=default_space).search.horizon == 1
    own = read_config({**pair, "search": {"horizon": 7}}, space=default_space)
    assert own.search.horizon == 7 and len(own.terms) == 6
    for task in ("depth", {"depth": {}}, {"name": "depth"}):  # of a regression nothing compares classes
        config = read_config({**pair, "task": task}, space=default_space)
        assert [term.loss for term in config.terms] == ["l1", "at"] and config.search.horizon == 0.25


@pytest.mark.parametrize(
    ("search", "trials", "rounds"),
    [
        ({"budget": 30}, 9, 0),
        ({"budget": 10.5}, 6, 0),
        ({"budget": 4}, 0, 0),
        ({"budget": 40, "rounds": 9}, 9, 5),  # 5 for the start, 2 to judge it, 6 for each round
        ({"budget": 40, "rounds": 2}, 9, 2),
    ],
)
def test_a_budget_cuts_trials_and_rounds_down(search, trials, rounds):
    found = SearchConfig(**{"horizon": 0.25, **search})
    assert (found.trials, found.rounds) == (trials, rounds)
    assert SearchConfig(**found.model_dump()) == found
    costs = found.most_trials + 4 * max(1, found.rounds)
    assert costs <= found.budget


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"budget": 3}, "a pass alone costs 4"),
        ({"budget": 12, "rounds": 3}, "a round and its judgement cost 6 trainings, after 7"),
        ({"budget": 12, "horizon": 1}, "for a longer search.horizon"),
    ],
)
def test_a_budget_that_is_too_small(search, said):
    with pytest.raises(UserError, match=said):
        read_config({"student": {"model": "resnet8"}, "search": {"horizon": 0.25, **search}})


@pytest.mark.parametrize("horizon", [0, -3, 1.5, 0.0, "all"])
def test_a_horizon_is_steps_a_fraction_or_whole(horizon):
    with pytest.raises(UserError, match="horizon"):
        read_config({"student": {"model": "resnet8"}, "search": {"horizon": horizon}})


def test_a_horizon_in_steps():
    steps = [SearchConfig(horizon=h).steps_back(48) for h in (1, 12, 0.25, "whole", 100, 0.001)]
    assert steps == [1, 12, 12, 48, 48, 1]


@pytest.mark.parametrize(
    ("search", "samples", "share"),
    [
        ({}, 300, 0.2),
        ({"horizon": 10}, 300, 0.5),
        ({"horizon": 10}, 500, 0.4),
        ({"horizon": "whole"}, 5000, 0.2),
        ({"horizon": 10, "validation_fraction": 0.1}, 300, 0.1),
    ],
)
def test_few_samples_leave_more_of_them_to_judge_by(search, samples, share):
    config = read_config({"student": {"model": "resnet8"}, "search": search})
    assert config.search.fraction_of(samples) == share
