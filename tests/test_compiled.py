"""torch.compile on teacher, student and pathways: one graph each, and the same numbers."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import distpro
from distpro.batch import batch_of
from distpro.losses import build_loss
from distpro.models import build_model
from distpro.objective import Objective, Term
from distpro.schedule import Schedule
from pathways import build_pathways, tap
from tests.digits import settings

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def objective(compile, precision=None):
    torch.manual_seed(0)
    teacher, student = build_model("resnet14", num_classes=10).eval(), build_model("resnet8", num_classes=10)
    x = torch.randn(4, 3, 32, 32)
    taps = teacher.stage_taps.pre, student.stage_taps.post
    pathways = build_pathways(teacher, student, x, *taps, connect="same", transforms=["conv1x1", "attention"])
    terms = [*pathways, Term(build_loss("kd"), "kd"), Term(build_loss("at"), "at", taps[1], taps[0])]
    return Objective(teacher, student, terms, x, precision=precision, compile=compile), x


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("captured", [True, False], ids=["search", "retrain"])
def test_a_step_has_no_graph_breaks_and_the_same_numbers(captured, precision):
    compiled, x = objective("aot_eager", precision)
    plain, _ = objective(None, precision)
    y = torch.tensor([0, 1, 2, 3])
    weights = torch.linspace(0.1, 1, 8)
    results = []
    for of in (compiled, plain):
        result = of.training_pass(batch_of(x, y), weights if captured else weights.tolist(), captured)
        result.loss.backward()
        results.append(result)
    assert counters["graph_break"] == {} and counters["stats"]["unique_graphs"] == 3  # teacher, student, pathways
    one, other = results
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if precision is None else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(one.terms, other.terms, **tolerance)
    if captured:
        assert all(v.grad is not None for views in one.views for v in views.values())
    if precision is None:
        for (name, p), q in zip(compiled.named_parameters(), plain.parameters(), strict=True):
            if q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, msg=name)
        if captured:
            for ours, theirs in zip(one.views, other.views, strict=True):
                for tap in theirs:
                    torch.testing.assert_close(ours[tap].grad, theirs[tap].grad, rtol=1e-3, atol=1e-6)


def test_later_steps_compile_nothing_again():
    compiled, x = objective("eager")
    y = torch.tensor([0, 1, 2, 3])
    for step in range(4):
        weights = [0.1 * (step + n + 1) for n in range(8)]
        compiled.at(step)
        compiled.training_pass(batch_of(x, y), weights).loss.backward()
    assert counters["stats"]["unique_graphs"] == 3


def test_a_copy_compiles_its_own_models():
    compiled, x = objective("eager")
    twin, y = copy.deepcopy(compiled), torch.tensor([0, 1, 2, 3])
    with torch.no_grad():
        twin.student.model.fc.bias.add_(torch.arange(10.0))
        assert not torch.allclose(twin.training_pass(batch_of(x, y)).task, compiled.training_pass(batch_of(x, y)).task)
        torch.testing.assert_close(twin.training_pass(batch_of(x, y)).output, twin.student.model(x))


class Own(nn.Module):
    """Somebody's own student, whose code reads an attribute; it is read by hooks."""

    def __init__(self):
        super().__init__()
        self.body, self.fc, self.scale = nn.Conv2d(3, 4, 3), nn.Linear(4, 10), 1.0

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3))) * self.scale


def doubled(forward, x):
    return forward(x) * 2


CHANGES = {
    "nothing": lambda m: None,
    "attribute": lambda m: setattr(m, "scale", 3.0),
    "hook": lambda m: m.register_forward_hook(lambda _, args, output: output * 2),
    "hook on a layer": lambda m: m.fc.register_forward_hook(lambda _, args, output: output * 2),
    "forward": lambda m: setattr(m, "forward", partial(doubled, m.forward)),
    "layer": lambda m: setattr(m, "fc", nn.Linear(m.fc.in_features, 10)),
    "method": lambda m: setattr(type(m), "forward", lambda self, x: self.fc(self.body(x).mean((2, 3))) + 1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("own", [True, False])
def test_a_compiled_model_that_changes(own, change):
    if change == "method" and not own:
        pytest.skip("changes the class of the zoo")
    torch.manual_seed(0)
    kind = type("Own", (Own,), {})
    student = kind() if own else build_model("resnet8", num_classes=10)
    names = ["body"] if own else ["layer1"]
    x = torch.randn(4, 3, 32, 32)
    term = Term(build_loss("at"), "at", names, names, 1.0)
    compiled = Objective(copy.deepcopy(student), student, [term], x, compile="eager").eval()
    assert compiled.student.traced is not own
    for step in range(3):
        if step == 1:
            CHANGES[change](student)
        output, features = compiled.run_student(batch_of(x))
        with tap(student, names) as taps:
            expected = student(x)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(features[names[0]], taps[names[0]])


def test_a_copy_of_a_compiled_objective_reads_its_own_student():
    torch.manual_seed(0)
    student, x = Own(), torch.randn(4, 3, 8, 8)
    compiled = Objective(Own(), student, [Term(build_loss("at"), "at", ["body"], ["body"], 1.0)], x, compile="eager")
    compiled.run_student(batch_of(x))
    twin = copy.deepcopy(compiled)
    with torch.no_grad():
        twin.student.model.body.bias.add_(1)
    for objective in (compiled, twin, compiled):
        output, features = objective.run_student(batch_of(x))
        assert torch.equal(features["body"], objective.student.model.body(x))
        torch.testing.assert_close(output, objective.student.model(x))


def test_from_a_config(tmp_path):
    """A search and a retrain, compiled, end where they end uncompiled."""
    torch.manual_seed(5)
    torch.save(build_model("resnet14", num_classes=10).state_dict(), tmp_path / "teacher.pt")
    found = {}
    for backend in (None, "eager"):
        config = {**settings(tmp_path / "teacher.pt"), "compile": backend}
        schedule = distpro.search(config, out=tmp_path / f"search {backend}")
        retrained = distpro.retrain(
            config, schedule=tmp_path / f"search {backend}" / "alpha.pt", out=tmp_path / f"{backend}"
        )
        found[backend] = schedule.alpha_tilde, retrained.metrics["loss"]
    assert isinstance(Schedule.load(tmp_path / "search eager" / "alpha.pt"), Schedule)
    torch.testing.assert_close(found["eager"][0], found[None][0], rtol=1e-3, atol=1e-3)
    assert found["eager"][1] == pytest.approx(found[None][1], rel=1e-3)
