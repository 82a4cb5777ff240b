"""Optimisers that a training can use, and those that it cannot."""

from __future__ import annotations

import copy

import pytest
import torch
import yaml

import distpro
from distpro.build.optimizer import build_optimizer, libraries
from distpro.cli import main
from distpro.config.reading import merge, read_config
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
    + [(f"{__name__}:Plain", {"nesterov": True, "momentum": 0.9})]
    + ([("torch.optim:Muon", {"momentum": 0.9})] if hasattr(torch.optim, "Muon") else []),  # from PyTorch 2.9 on
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


# By name


@pytest.mark.parametrize("name", ["rmsprop", "nadam", "lion", "lamb", "adan", "muon", "sgdw", "rprop"])
def test_optimisers_of_torch_and_timm_by_name(name):
    """Against the library's own, over three steps of two tensors; resumed after the second to the same bytes."""
    timm = pytest.importorskip("timm.optim")

    def start():
        generator = torch.Generator().manual_seed(0)
        return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3, 2, 2), (3, 5), (4,))]

    def steps(optimizer, params, count):
        for _ in range(count):
            for p in params:
                p.grad = 0.1 * p.detach() + 0.01
            optimizer.step()

    ours, theirs, again = start(), start(), start()
    without = {} if name != "rprop" else {"training": {"optimizer": {"weight_decay": 0.0}}}
    checked = read_config(merge(config(name).model_dump(), without))
    optimizer = build_optimizer(checked, ours)
    steps(optimizer, ours, 2)
    state = copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        for p, value in zip(again, ours, strict=True):
            p.copy_(value)
    steps(optimizer, ours, 1)
    kinds = {"rmsprop": torch.optim.RMSprop, "nadam": torch.optim.NAdam, "rprop": torch.optim.Rprop}
    kind = kinds.get(name) or timm.get_optimizer_class(name)
    options = {"rprop": {}, "sgdw": {"weight_decay": 5e-4, "momentum": 0.9}}.get(name, {"weight_decay": 5e-4})
    steps(kind(theirs, lr=0.1, **options), theirs, 3)
    resumed = build_optimizer(checked, again)
    resumed.load_state_dict(state)
    steps(resumed, again, 1)
    for one, two, three in zip(ours, theirs, again, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "lionn"}, "unknown optimiser 'lionn'; did you mean 'lion"),
        ({"name": "lbfgs"}, "unknown optimiser 'lbfgs'"),
        ({"name": "adahessian"}, "unknown optimiser 'adahessian'"),
        ({"name": "rprop"}, "training.optimizer.weight_decay: rprop has none; set it to 0"),
        (
            {"name": "lion", "momentum": 0.5},
            "training.optimizer.momentum: lion takes it under training.optimizer.params",
        ),
        ({"name": "nadam", "params": {"betta": 1}}, "optimiser 'nadam' has no parameter 'betta'"),
        (
            {"name": "nadam", "params": {"momentum_decay": -1.0}},
            "optimiser 'nadam': Invalid momentum_decay value: -1.0",
        ),
        (
            {"name": "lamb", "params": {"betas": [0.9]}},
            "optimiser 'lamb' cannot step with these training.optimizer.params (not enough",
        ),
        (
            {"name": "nadam", "params": {"weight_decay": 0.1}},
            "training.optimizer.params.weight_decay: has a key of its own",
        ),
        ({"name": "nadam", "params": {"lr": 0.1}}, "training.optimizer.params.lr: has a key of its own"),
        ({"name": "sgd", "params": {"lr": 1}}, "training.optimizer.params: for other optimisers; sgd takes"),
    ],
)
def test_what_an_optimiser_does_not_take_is_one_message(changes, message):
    checked = read_config({"student": {"model": "resnet8"}, "training": {"optimizer": changes}})
    with pytest.raises(distpro.UserError) as error:
        build_optimizer(checked, [torch.nn.Parameter(torch.zeros(3, 3))])
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_without_timm_its_optimisers_are_unknown_with_what_to_install(monkeypatch):
    monkeypatch.setattr("distpro.build.optimizer._timm", lambda: None)
    libraries.cache_clear()
    with pytest.raises(distpro.UserError, match=r"unknown optimiser 'lion'.*pip install 'distpro\[timm\]'"):
        build_optimizer(config("lion"), [torch.nn.Parameter(torch.zeros(3))])
    monkeypatch.undo()
    libraries.cache_clear()


def test_a_search_says_which_optimisers_have_a_derivative():
    with pytest.raises(distpro.UserError, match=r"the step of lion has no known derivative.*allowed: adam, adamw, sgd"):
        distpro.search(settings("none.pt", {"training": {"optimizer": {"name": "lion"}}}))


class Bag(torch.nn.Module):
    """Its embedding gives sparse gradients."""

    def __init__(self, sparse=True):
        super().__init__()
        self.table, self.head = torch.nn.Embedding(10, 5, sparse=sparse), torch.nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.table(x).mean(1))


class Fourier(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.filter = torch.nn.Linear(5, 3), torch.nn.Parameter(torch.randn(3, dtype=torch.cfloat))

    def forward(self, x):
        return self.head(torch.fft.irfft(torch.fft.rfft(x) * self.filter, n=5))


IDS = torch.tensor([[0, 3, 3], [7, 1, 0]])


@pytest.mark.parametrize(
    ("make", "x", "options"),
    [
        (Bag, IDS, {"name": "sgd", "momentum": 0.9, "weight_decay": 0.0}),
        (Fourier, torch.linspace(-1, 1, 10).view(2, 5), {"name": "sgd", "momentum": 0.9, "weight_decay": 0.01}),
        (Fourier, torch.linspace(-1, 1, 10).view(2, 5), {"name": "adam", "weight_decay": 0.01}),
        (Fourier, torch.linspace(-1, 1, 10).view(2, 5), {"name": "adamw", "weight_decay": 0.01}),
    ],
)
def test_what_a_fused_step_does_not_take_is_trained_as_by_plain_torch(make, x, options):
    """Complex numbers count as pairs of real ones; of a sparse gradient, what the dense one would do."""
    torch.manual_seed(0)
    model = make()
    twin = make(sparse=False) if make is Bag else make()
    twin.load_state_dict(model.state_dict())
    plain = {
        name: torch.view_as_real(p).detach().clone() if p.is_complex() else p for name, p in twin.named_parameters()
    }
    plain = {name: p.detach().clone().requires_grad_() for name, p in plain.items()}
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    more = {"momentum": 0.9, "nesterov": True} if options["name"] == "sgd" else {}
    truth = kinds[options["name"]](plain.values(), lr=0.1, weight_decay=options["weight_decay"], **more)
    read = read_config({"student": {"model": "resnet8"}, "training": {"optimizer": {"lr": 0.1, **options}}})
    optimizer = build_optimizer(read, [*model.parameters()], model)
    for step in range(3):
        optimizer.zero_grad()
        model(x + step % 2).square().mean().backward()
        optimizer.step()
        truth.zero_grad()
        seen = {n: torch.view_as_complex(p) if n == "filter" else p for n, p in plain.items()}
        torch.func.functional_call(twin, seen, (x + step % 2,)).square().mean().backward()
        truth.step()
    for name, p in model.named_parameters():
        found = torch.view_as_real(p) if p.is_complex() else p
        assert torch.allclose(found, plain[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize(("name", "decay", "said"), [("adam", 0, "at all"), ("sgd", 0.1, "weight_decay")])
def test_sparse_gradients_that_no_step_takes_are_refused(name, decay, said):
    model = Bag()
    options = {"name": name, "lr": 0.1, "weight_decay": decay}
    read = read_config({"student": {"model": "resnet8"}, "training": {"optimizer": options}})
    with pytest.raises(distpro.UserError, match=f"takes no sparse gradients .*{said}.* student's 'table' gives"):
        build_optimizer(read, [*model.parameters()], model)
    model.table.requires_grad_(False)  # which is then none
    build_optimizer(read, [*model.head.parameters()], model)


def test_real_and_dense_parameters_have_a_fused_step():
    for name in ("sgd", "adam", "adamw"):
        model = Bag(sparse=False)
        read = read_config({"student": {"model": "resnet8"}, "training": {"optimizer": {"name": name, "lr": 0.1}}})
        assert build_optimizer(read, [*model.parameters()], model).defaults["fused"]
