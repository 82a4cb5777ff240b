"""What a model holds besides parameters and buffers is left as it was by whatever only looks."""

import collections
import dataclasses
import itertools
import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distpro.batch import batch_of
from distpro.losses import build_loss
from distpro.objective import Objective, Term
from distpro.search.estimators import ESTIMATORS
from distpro.search.estimators.base import TrainingStep
from distpro.train.state import no_trace, random_state
from pathways.own_state import own_state_kept
from pathways.probing import probe_shapes, untouched


class Owner:
    """An object of somebody's own that is no module."""

    def __init__(self):
        self.mean = torch.zeros(3)
        self.passes = 0


@dataclasses.dataclass(slots=True)
class Slotted:
    """An object without a ``__dict__``."""

    n: int = 0
    mean: torch.Tensor = dataclasses.field(default_factory=lambda: torch.zeros(3))


def in_place(tensor, y):
    tensor.mul_(0.9).add_(0.1 * y.detach().mean(0))
    return tensor


def added(container, y):
    container.append(y.detach().mean(0))
    return sum(container)


def counted(values, key):
    values[key] += 1
    return values[key]


def noted(model, y):
    former = 0 if model.held is None else model.held
    model.held = y.detach().mean(0)
    return former


def summed(array, y):
    array += y.detach().mean(0).numpy()
    return torch.from_numpy(array.copy())


def through_data(parameter, y):
    parameter.data = 0.9 * parameter.data + 0.1 * y.detach().mean(0)
    return parameter


def momentum(encoder, y):
    for parameter in encoder.parameters():
        through_data(parameter, y)
    return encoder(y)


def of_object(owner, y):
    owner.passes += 1
    return in_place(owner.mean, y) * owner.passes


def of_slots(slotted, y):
    slotted.n += 1
    slotted.mean = 0.9 * slotted.mean + 0.1 * y.detach().mean(0)
    return slotted.mean * slotted.n


def encoder():
    """A momentum encoder, whose BatchNorm follows the passes too."""
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).requires_grad_(False)


KINDS = {  # what the model holds, and what a pass adds to its output, having changed it
    "tensor": (lambda: torch.zeros(3), lambda m, y: in_place(m.held, y)),
    "another tensor": (lambda: None, noted),
    "tensor in a dict": (lambda: {"a": {"mean": torch.zeros(3)}}, lambda m, y: in_place(m.held["a"]["mean"], y)),
    "tensor in a tuple": (lambda: (torch.zeros(3),), lambda m, y: in_place(m.held[0], y)),
    "list": (list, lambda m, y: added(m.held, y)),
    "deque": (lambda: collections.deque(maxlen=2), lambda m, y: added(m.held, y)),
    "number": (lambda: 0, lambda m, y: counted(vars(m), "held")),
    "number in a dict": (lambda: {"a": {"n": 0}}, lambda m, y: counted(m.held["a"], "n")),
    "array": (lambda: np.zeros(3, np.float32), lambda m, y: summed(m.held, y)),
    "frozen parameter": (
        lambda: nn.Parameter(torch.zeros(3), requires_grad=False),
        lambda m, y: through_data(m.held, y),
    ),
    "momentum encoder": (lambda: nn.Linear(3, 3).requires_grad_(False), lambda m, y: momentum(m.held, y)),
    "generator": (lambda: torch.Generator().manual_seed(0), lambda m, y: torch.rand(3, generator=m.held)),
    "Random": (lambda: random.Random(0), lambda m, y: m.held.random()),
    "NumPy generator": (lambda: np.random.default_rng(0), lambda m, y: float(m.held.random())),
    "NumPy RandomState": (lambda: np.random.RandomState(0), lambda m, y: float(m.held.rand())),
    "count": (lambda: itertools.count(1), lambda m, y: next(m.held)),
    "namespace": (lambda: SimpleNamespace(n=0), lambda m, y: counted(vars(m.held), "n")),
    "object": (Owner, lambda m, y: of_object(m.held, y)),
    "object with slots": (Slotted, lambda m, y: of_slots(m.held, y)),
    "module in a tuple": (lambda: (encoder(),), lambda m, y: momentum(m.held[0], y)),
    "module in a dict": (lambda: {"a": [encoder()]}, lambda m, y: momentum(m.held["a"][0], y)),
    "module in an object": (lambda: SimpleNamespace(e=encoder()), lambda m, y: momentum(m.held.e, y)),
    "module in a module in a tuple": (lambda: (Student("object"),), lambda m, y: m.held[0].change(m.held[0], y)),
    "parameter in a list": (lambda: [nn.Parameter(torch.zeros(3))], lambda m, y: through_data(m.held[0], y)),
}


class Student(nn.Module):
    """Linear, 8 features, and something of a kind that every pass changes, in training and evaluation mode."""

    def __init__(self, kind):
        super().__init__()
        self.body, self.fc = nn.Linear(4, 8), nn.Linear(8, 3)
        make, self.change = KINDS[kind]
        self.held = make()

    def forward(self, x):
        y = self.fc(self.body(x))
        return y * (1 + 0.1 * torch.as_tensor(self.change(self, y)))


def student(kind):
    torch.manual_seed(0)
    return Student(kind)


def teacher():
    torch.manual_seed(1)
    return nn.Sequential(collections.OrderedDict(body=nn.Linear(4, 8), fc=nn.Linear(8, 3)))


def terms():
    return [Term(build_loss("l2", [(8,)], [(8,)]), "l2", ["body"], ["body"]), Term(build_loss("kd"), "kd")]


def batches(count):
    generator = torch.Generator().manual_seed(2)
    return [batch_of(torch.randn(6, 4, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2])) for _ in range(count)]


@pytest.mark.parametrize("look", ["construction", "probe"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_look_leaves_what_a_model_holds(kind, look):
    model, x = student(kind), batches(1)[0].inputs
    expected = [student(kind)(x)]
    assert not torch.equal(model(x), model(x))  # each pass shows what the one before has changed
    model = student(kind)
    held = model.held
    if look == "construction":
        Objective(teacher(), model, terms(), example_input=x)
    else:
        probe_shapes(model, ["body"], x)
    assert kind == "count" or model.held is held
    assert torch.equal(model(x), expected[0])


def trained(kind, estimator):
    """The student after three steps with fixed weights, with an estimate after each (None: without any)."""
    model, weights = student(kind), torch.ones(2)
    objective = Objective(teacher(), model, terms())
    optimizer = torch.optim.SGD(objective.trainable_parameters(), 0.1)
    options = {"steps": 1} if estimator in ("unrolled", "sweep") else {}
    built = estimator and ESTIMATORS.build(estimator, objective, optimizer, **options)
    *training, validation = batches(4)
    for number, batch in enumerate(training):
        optimizer.zero_grad()
        state, theta = random_state(model), {p: p.detach().clone() for p in objective.trainable_parameters()}
        if built:
            built.before_pass()
        done = objective.training_pass(batch, weights, capture=True)  # it fixes the order of sums
        done.loss.backward()
        step = TrainingStep(batch, weights, 1.0, theta, state, done, number)
        if built:
            built.before_step(step)
        optimizer.step()
        if built:
            assert built(step, [validation]).isfinite().all()
    return model


@pytest.mark.parametrize("estimator", ["forward_mode", "finite_difference", "unrolled", "sweep"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_estimate_leaves_what_a_student_holds(kind, estimator):
    plain, searching = trained(kind, None), trained(kind, estimator)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), searching.parameters(), strict=True))
    x = batches(1)[0].inputs
    assert torch.equal(plain(x), searching(x))


@pytest.mark.parametrize("keep", [own_state_kept, untouched, no_trace])
def test_aliases_stay(keep):
    """What somebody else holds too stays the same object and memory, as does a reassigned attribute's."""
    model = student("object")
    owner, mean = model.held, model.held.mean
    view, model.history = mean[1:], [mean]
    history = model.history
    with keep(model):
        mean.add_(1)
        history.append(mean)
        model.held, model.new = Owner(), 1
        owner.mean = torch.ones(3)
        mean.data = torch.full((5,), 2.0)
    assert model.held is owner and owner.mean is mean and model.history is history and not hasattr(model, "new")
    assert len(history) == 1 and history[0] is mean and mean.tolist() == [0, 0, 0]
    mean.add_(3)
    assert view.tolist() == [3, 3]


def test_a_backward_pass_goes_on_through_what_was_put_back():
    model = student("tensor")
    x = torch.ones(3, requires_grad=True)
    product = (x * model.held).sum()  # autograd keeps the attribute, and counts its versions
    with own_state_kept(model):
        model.held.data.add_(1)
    product.backward()
    assert x.grad.tolist() == [0, 0, 0]


def test_what_is_left_alone():
    """Modules that the model is in, trained parameters, data sets, and what has no copy."""
    model = student("number")
    whole = nn.ModuleDict({"model": model, "norm": nn.BatchNorm1d(3)})
    model.whole, model.data = (whole,), torch.utils.data.TensorDataset(torch.zeros(2))
    model.listed, model.drawn, model.wide = [model.fc.bias], (n for n in range(3)), torch.zeros(1).expand(3)
    model.itself = [model.listed]
    model.itself.append(model.itself)
    with own_state_kept(nn.Sequential(model)), torch.no_grad():
        whole["norm"].running_mean.add_(1)
        model.data.tensors[0].add_(1)
        model.fc.bias.fill_(7)
        next(model.drawn)
    assert whole["norm"].running_mean.tolist() == [1, 1, 1] and model.data.tensors[0].tolist() == [1, 1]
    assert model.fc.bias.tolist() == [7, 7, 7] and next(model.drawn) == 1 and model.itself[1] is model.itself


def test_hidden_modules_keep_their_buffers_and_modes():
    model, norm = student("number"), nn.BatchNorm1d(3)
    model.hidden, mean = (nn.Sequential(norm),), norm.running_mean
    with own_state_kept(model), torch.no_grad():
        norm.eval()
        norm.running_mean, norm.running_var = torch.ones(5), norm.running_var.add_(1)
        norm.register_buffer("seen", torch.ones(1))
        norm.passes = 1
    assert norm.training and norm.running_mean is mean and not mean.any() and norm.running_var.tolist() == [1, 1, 1]
    assert not hasattr(norm, "seen") and not hasattr(norm, "passes")


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("keep", [own_state_kept, untouched, no_trace])
def test_embeddings_are_not_rescaled(keep, kind):
    """A pass of an embedding with a ``max_norm`` scales longer rows down, in the trained weight itself."""
    torch.manual_seed(0)
    model = nn.Sequential(kind(5, 4, max_norm=0.5), nn.Linear(4, 4))
    (weight, *_), tokens = model.parameters(), torch.tensor([[0, 1, 2]])
    before = weight.detach().clone()
    with keep(model):
        model(tokens)
        assert weight[:3].norm(dim=1).max() < 0.51 < before[:3].norm(dim=1).min()
    assert model[0].weight is weight and torch.equal(weight, before)


class Builds(nn.Module):
    """A classifier that makes its last layers, with ``build``, when it sees how many features there are."""

    def __init__(self, attributes, built, build):
        super().__init__()
        self.body, self.built, self.build = nn.Linear(4, 8), built, build
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        if not self.built(self):
            self.build(self, nn.Linear(h.shape[1], 3))
        return self.head(h)

    def head(self, h):
        return (self.fc[0] if isinstance(self.fc, nn.ModuleList) else self.fc)(h) + getattr(self, "shift", 0)


def builds_with_a_flag(model, layer):
    model.fc, model.done = layer, True
    model.register_buffer("shift", torch.ones(3))


def builds_in_a_list(model, layer):
    model.fc.append(layer)
    model.done = True


def builds_under_a_name(model, layer):
    model.add_module("fc", layer)
    model.names.append("fc")


def builds_parameters(model, layer):
    model.fc, model.weight = partial(F.linear, weight=layer.weight), layer.weight


BUILDERS = {
    "for None": lambda: Builds({"fc": None}, lambda m: m.fc, lambda m, layer: setattr(m, "fc", layer)),
    "with a flag": lambda: Builds({"done": False}, lambda m: m.done, builds_with_a_flag),
    "for another layer": lambda: Builds({"done": False, "fc": nn.Identity()}, lambda m: m.done, builds_with_a_flag),
    "in a list": lambda: Builds({"done": False, "fc": nn.ModuleList()}, lambda m: m.done, builds_in_a_list),
    "under a name": lambda: Builds({"names": []}, lambda m: m.names, builds_under_a_name),
    "parameters": lambda: Builds({"fc": None}, lambda m: m.fc, builds_parameters),
}


def seeded(make):
    torch.manual_seed(0)
    return make()


@pytest.mark.parametrize("kind", BUILDERS)
def test_what_the_first_pass_builds_is_trained(kind):
    """Looking is that first pass: training then is what it is in plain PyTorch after one."""
    teaching, (batch,) = teacher(), batches(1)
    plain = seeded(BUILDERS[kind])
    plain(batch.inputs)
    looked_at = seeded(BUILDERS[kind])
    objective = Objective(teaching, looked_at, terms(), example_input=batch.inputs)
    for model, parameters in ((plain, plain.parameters()), (looked_at, objective.trainable_parameters())):
        optimizer = torch.optim.SGD(parameters, 0.5)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(batch.inputs), batch.target).backward()
            optimizer.step()
    expected, found = plain.state_dict(), looked_at.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(v, found[k]) for k, v in expected.items())
    assert torch.equal(plain(batch.inputs), looked_at(batch.inputs))
