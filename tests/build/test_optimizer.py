"""Optimisers that a training can use, and those that it cannot."""

from __future__ import annotations

import pytest
import torch
import yaml

import distpro
from distpro.build.optimizer import build_optimizer
from distpro.cli import main
from distpro.config.reading import read_config
from tests.digits import settings


class Sharpness(torch.optim.SGD):
    """Says only when it is called that it wants a closure."""

    def step(self, closure=None):
        assert closure is not None, "this optimiser requires a closure"
        return super().step(closure)


class Plain(torch.optim.SGD):
    """Takes a closure or none."""


def config(name, **params):
    optimizer = {"name": name, "lr": 0.1, "params": params}
    return read_config({"student": {"model": "resnet8"}, "training": {"optimizer": optimizer}})


@pytest.mark.parametrize("name", ["torch.optim:LBFGS", f"{__name__}:Sharpness"])
def test_an_optimiser_that_needs_a_closure_is_refused(name):
    with pytest.raises(distpro.UserError, match=f"optimiser '{name}' evaluates the loss itself, in step\\(closure\\)"):
        build_optimizer(config(name), [torch.nn.Parameter(torch.zeros(3))])


@pytest.mark.parametrize(
    ("name", "params"),
    [(f"torch.optim:{kind}", {}) for kind in ("SGD", "AdamW", "Adagrad", "Rprop", "NAdam", "RMSprop", "Adafactor")]
    + [("torch.optim:Muon", {"momentum": 0.9}), (f"{__name__}:Plain", {"nesterov": True, "momentum": 0.9})],
)
def test_other_optimisers_are_taken(name, params):
    parameter = torch.nn.Parameter(torch.zeros(3, 3))
    optimizer = build_optimizer(config(name, **params), [parameter])
    parameter.grad = torch.randn(3, 3)
    optimizer.step()
    assert parameter.any()


def test_it_is_one_message_before_anything_is_written(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(
        yaml.safe_dump({**settings(), "training": {"epochs": 1, "optimizer": {"name": "torch.optim:LBFGS"}}})
    )
    assert main(["train", str(path), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("distpro: optimiser 'torch.optim:LBFGS'") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
