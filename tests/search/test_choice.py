"""Which students forward mode can do with is found out before the first step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from torchvision.ops import roi_align

import distpro
from distpro.batch import batch_of
from distpro.build import runs as build_runs
from distpro.cli import main
from distpro.losses import build_loss
from distpro.models import build_model
from distpro.objective import Objective, Term
from distpro.schedule import Schedule
from distpro.search.estimators import obstacle, second_obstacle
from distpro.search.estimators.tangents import NoRule, forward_mode
from tests.digits import settings


class Rounded(torch.autograd.Function):
    """A straight-through quantiser."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(x * 4) / 4

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Tripled(torch.autograd.Function):
    """Its forward-mode rule is wrong."""

    @staticmethod
    def forward(ctx, x):
        return 3 * x

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * tangent


@torch.library.custom_op("distpro_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


doubled.register_autograd(lambda ctx, gradient: 2 * gradient)


class Net(nn.Module):
    """A convolution, ``middle`` of its map, and a linear layer."""

    def __init__(self, middle, *modules: nn.Module):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.middle, self.inside, self.head = middle, nn.ModuleList(modules), nn.LazyLinear(3)
        self(torch.randn(2, 3, 6, 6))

    def forward(self, x):
        return self.head(self.middle(self.norm(self.conv(x)), *self.inside).flatten(1))


def tokens(x):
    return x.flatten(2).transpose(1, 2)


def scaled(x):
    with torch.no_grad():
        largest = x.abs().amax()
    return x / largest


def grid(x):
    return F.grid_sample(x, torch.linspace(-1, 1, 2 * 9 * 2).view(2, 3, 3, 2), align_corners=False)


BOXES = [torch.tensor([[0.0, 0.0, 4.0, 4.0]])] * 2
LOST = "its tangents are not its derivative"
WITHOUT = {
    "lstm": (lambda: Net(lambda x, m: m(tokens(x))[0], nn.LSTM(4, 5, batch_first=True)), "mkldnn_rnn_layer"),
    "cdist": (lambda: Net(lambda x: torch.cdist(tokens(x), tokens(x) + 1)), "_euclidean_dist"),
    "grid_sample": (lambda: Net(grid), "grid_sampler_2d"),
    "weight_norm": (lambda: Net(lambda x, m: m(x), parametrizations.weight_norm(nn.Conv2d(4, 4, 1))), "_weight_norm"),
    "function": (lambda: Net(Rounded.apply), "autograd.Function Rounded has no"),
    "checkpoint": (lambda: Net(lambda x: checkpoint(torch.tanh, x, use_reentrant=True)), "CheckpointFunction"),
    "fake quantisation": (
        lambda: Net(lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, 0, 255)),
        "fake_quant",
    ),
    "a wrong rule": (lambda: Net(Tripled.apply), LOST),
    "a custom operator": (lambda: Net(doubled), LOST),
    "a custom operator in one branch": (lambda: Net(lambda x: torch.cat([x, doubled(x)])[2:] + 9 * x), LOST),
    "torchvision's operator": (lambda: Net(lambda x: roi_align(x, BOXES, 2)), LOST),
}
WITH = {
    "plain": lambda: Net(torch.relu),
    "dropout": lambda: Net(lambda x: F.dropout(x, 0.5)),
    "gru": lambda: Net(lambda x, m: m(tokens(x))[0], nn.GRU(4, 5, batch_first=True)),
    "spectral_norm": lambda: Net(lambda x, m: m(x), parametrizations.spectral_norm(nn.Conv2d(4, 4, 1))),
    "no_grad": lambda: Net(scaled),
    "straight through by detach": lambda: Net(lambda x: x + (torch.round(x) - x).detach()),
    "attention": lambda: Net(lambda x, m: m(*3 * [tokens(x)])[0], nn.MultiheadAttention(4, 2, 0.1, batch_first=True)),
    "checkpoint": lambda: Net(lambda x: checkpoint(torch.tanh, x, use_reentrant=False)),
    "nothing to train": lambda: Net(torch.relu).requires_grad_(False),
}


def found(student):
    torch.manual_seed(0)
    student = student()
    before = {name: b.clone() for name, b in student.state_dict().items()}
    batch, random = batch_of(torch.randn(2, 3, 6, 6), torch.tensor([0, 1])), torch.get_rng_state()
    answer = obstacle(Objective(None, student, []), batch)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(b, before[name]) for name, b in student.state_dict().items())
    assert all(p.grad is None for p in student.parameters())
    return answer


@pytest.mark.parametrize("name", WITHOUT)
def test_a_student_with_an_operator_without_its_rule(name):
    student, message = WITHOUT[name]
    answer = found(student)
    if name == "torchvision's operator" and "jvp is not implemented" in answer:
        return  # older versions of torchvision say so, later ones lose the tangent
    assert message in answer


@pytest.mark.parametrize("name", WITH)
def test_a_student_that_has_tangents(name):
    answer = found(WITH[name])
    if name == "checkpoint" and "_NoopSaveInputs has no forward-mode rule" in answer:
        return  # nor have they in older versions of PyTorch
    assert answer == ""


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class SquaredOnce(Squared):
    backward = staticmethod(once_differentiable(Squared.backward))


@pytest.mark.parametrize(("function", "named"), [(Squared, ""), (SquaredOnce, "SquaredOnce")])
def test_what_has_no_second_derivative_is_named(function, named):
    torch.manual_seed(0)
    student, batch = Net(function.apply), batch_of(torch.randn(4, 3, 6, 6), torch.tensor([0, 1, 0, 1]))
    assert second_obstacle(Objective(None, student, []), batch) == named


@pytest.mark.parametrize("name", ["resnet8", "mobilenet_v2", "shufflenet_v1", "vgg8"])
def test_the_models_here_have_tangents(name):
    student = build_model(name, num_classes=3)
    assert obstacle(Objective(None, student, []), batch_of(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))) == ""


def test_a_loss_of_several_weights():
    student, teacher = build_model("resnet8", num_classes=3), build_model("resnet8", num_classes=3)
    shapes = [(16, 32, 32), (16, 32, 32)]
    term = Term(build_loss("l2", shapes, shapes), "l2", ["relu", "layer1"], ["relu", "layer1"], per_level=True)
    batch = batch_of(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    assert obstacle(Objective(teacher, student, [term], batch.inputs), batch) == "term 'l2' has several weights"


def test_what_is_computed_without_gradients_has_no_tangent():
    """As finite differences of the values cannot know it: against the gradient in float64."""
    student = WITH["no_grad"]().double()
    x, cotangent = torch.randn(2, 3, 6, 6).double(), torch.randn(2, 3).double()
    parameters = dict(student.named_parameters())
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}
    gradients = torch.autograd.grad(student(x), list(parameters.values()), cotangent)
    expected = sum((g * d).sum() for g, d in zip(gradients, direction.values(), strict=True))
    torch.testing.assert_close((forward_mode(student, parameters, direction, x) * cotangent).sum(), expected)


def test_an_operator_met_later_is_one_message_too():
    student = WITHOUT["function"][0]()
    parameters = dict(student.named_parameters())
    with pytest.raises(
        NoRule, match="Function Rounded has no forward-mode rule; use search.estimator=finite_difference"
    ):
        forward_mode(student, parameters, parameters, torch.randn(2, 3, 6, 6))
    with torch.autograd.forward_ad.dual_level():  # forward mode works afterwards
        dual = torch.autograd.forward_ad.make_dual(torch.ones(2), torch.ones(2))
        assert torch.autograd.forward_ad.unpack_dual(2 * dual).tangent.tolist() == [2.0, 2.0]


def test_not_implemented_by_the_model_itself_stays_as_it_is():
    def refuse(x):
        raise NotImplementedError("no such mode")

    student = Net(torch.relu)
    student.middle = refuse
    parameters = dict(student.named_parameters())
    with pytest.raises(NotImplementedError, match="no such mode"):
        forward_mode(student, parameters, parameters, torch.randn(2, 3, 6, 6))


# Runs


class Quantised(nn.Module):
    """Halves a weight, straight through."""

    def forward(self, weight):
        return Rounded.apply(weight)


def quantised():
    student = build_model("resnet8", num_classes=10)
    parametrize.register_parametrization(student.conv1, "weight", Quantised())
    return student


def searched(folder, student, resume=False, **search):
    torch.manual_seed(0)
    teacher = build_model("resnet14", num_classes=10)
    return distpro.search(settings_of(**search), out=folder, resume=resume, teacher=teacher, student=student)


def settings_of(**search):
    changes = {"training": {"max_steps": 3}, "search": search}
    settled = settings(None, changes)
    return settled | {"terms": [{"loss": "kd"}, {"loss": "dkd"}]}


def recorded(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())["search"]["estimator"]


@pytest.mark.slow
def test_auto_takes_forward_mode_and_says_nothing(tmp_path, capsys):
    schedule = searched(tmp_path / "auto", build_model("resnet8", num_classes=10))
    assert "estimator" not in capsys.readouterr().out
    assert recorded(tmp_path / "auto") == schedule.meta["config"]["search"]["estimator"] == "forward_mode"


@pytest.mark.slow
def test_auto_takes_finite_differences_where_it_must_and_keeps_to_them(tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    student = quantised()
    auto = searched(tmp_path / "auto", student)
    out = capsys.readouterr().out
    assert out.count("search.estimator: finite_difference is taken; forward_mode cannot be used with this student") == 1
    assert "autograd.Function Rounded has no forward-mode rule" in out
    assert recorded(tmp_path / "auto") == auto.meta["config"]["search"]["estimator"] == "finite_difference"
    explicit = searched(tmp_path / "explicit", student, estimator="finite_difference")
    assert torch.equal(explicit.alpha_tilde, auto.alpha_tilde) and torch.equal(explicit.weights, auto.weights)
    # A resumed run does not ask again.
    monkeypatch.setattr(build_runs, "obstacle", lambda objective, batch: pytest.fail("asked again"))
    resumed = searched(tmp_path / "auto", student, resume=True)
    assert torch.equal(resumed.alpha_tilde, auto.alpha_tilde)
    assert Schedule.load(tmp_path / "auto" / "alpha.pt").meta["config"]["search"]["estimator"] == "finite_difference"


def test_forward_mode_where_it_cannot_be_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(distpro.UserError) as error:
        searched(tmp_path / "run", quantised(), estimator="forward_mode")
    assert str(error.value) == (
        "search.estimator: forward_mode cannot be used with this student: autograd.Function Rounded has no forward-mode "
        "rule; use search.estimator=finite_difference"
    )
    assert not (tmp_path / "run").exists()


def test_auto_has_no_parameters(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(settings_of(estimator={"auto": {"precision": "float32"}})))
    assert main(["search", str(path), "--dry-run"]) == 2
    assert "search.estimator 'auto' has no parameter 'precision'" in capsys.readouterr().err
