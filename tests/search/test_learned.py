"""Numbers beside the weights that a search over a horizon learns: their gradient against autograd through the whole training
and against real trainings, and how they move."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distpro.losses import build_loss
from distpro.objective import Objective, Term
from distpro.search.estimators import ESTIMATORS
from distpro.search.estimators.swap import swapped
from distpro.search.estimators.unrolled import _DIFFERENTIABLE, _clip
from distpro.search.learned import Constants, LearnedScalars
from distpro.search.relative import RelativeStep
from distpro.search.searcher import Searcher
from distpro.search.weighting import WEIGHTINGS
from distpro.train.state import no_trace
from pathways.registry import UserError
from tests.search.algorithm_1 import Batches, objective_of_four
from tests.search.test_hypergradient import relative
from tests.search.test_sweep import Horizon

NAMES = ["task", "kd.temperature", "hcl.level_weights.1"]
VALUES = [0.7, 3.0, 0.6]


class Learning(Horizon):
    """The BatchNorm pair with KD and a hierarchical context loss beside its pathways, and three numbers beside the weights."""

    def __init__(self, name, **params):
        super().__init__(name, **params)
        torch.manual_seed(4)
        terms = [
            *self.objective.terms,
            Term(build_loss("kd"), "kd"),
            Term(build_loss("hcl", [(6, 8, 8)], [(6, 8, 8)], levels=(4, 2, 1)), "hcl", ["2"], ["2"]),
        ]
        self.objective = Objective(self.objective.teacher.model, self.objective.student.model, terms)
        self.weights = torch.cat([self.weights, torch.rand(2, dtype=self.weights.dtype) + 0.1])
        self.scalars = LearnedScalars(self.objective, NAMES, 1)
        self.values = torch.tensor(VALUES, dtype=self.weights.dtype)
        self.set(VALUES)

    def set(self, values):
        with torch.no_grad():
            self.scalars.log.copy_(torch.tensor(values).log())
        self.scalars._numbers = values
        self.scalars._give(values)

    def sweep(self, **settings):
        """The estimator after the whole training, and what it says."""
        self.restore()
        torch.manual_seed(7)
        steps = len(self.batches)
        estimator = ESTIMATORS.build("sweep", self.objective, self.optimizer, self.max_norm, self.clip_by, steps=steps)
        estimator.scalars = self.scalars
        for name, value in settings.items():
            setattr(estimator, name, value)
        original = estimator.before_step

        def before_step(step):
            step.scalars, step.number = self.values, number
            original(step)

        estimator.before_step = before_step
        for number, batch in enumerate(self.batches):  # noqa: B007  (before_step reads it)
            step = self.step(batch, self.weights, estimator)
        return estimator, estimator(step, [self.validation])

    def through_all_steps(self):
        """dL_val by w and the scalars of every step, (T, N + S), by float64 autograd through all steps (`higher`)."""
        self.restore()
        torch.manual_seed(7)
        rows = [torch.cat([self.weights, self.values]).requires_grad_() for _ in self.batches]
        optimizer = _DIFFERENTIABLE[type(self.optimizer)](self.optimizer, self.params)
        place = {p: n for n, p in enumerate(self.params)}
        groups = [[place[p] for p in group] for group in self.objective.clip_groups(self.clip_by)]
        clip = None if self.max_norm is None else _clip(self.max_norm, groups)
        rates = {"lr": [group["lr"] for group in self.optimizer.param_groups]}
        values = [p.detach().clone().requires_grad_() for p in self.params]
        count = len(self.weights)
        with no_trace(self.objective.student, self.objective.terms):
            for batch, row in zip(self.batches, rows, strict=True):
                held = self.scalars.held(row[count:].unbind())
                with held, swapped(self.objective, dict(zip(self.params, values, strict=True))):
                    loss = self.objective.training_pass(batch, self.scale * row[:count]).loss
                values = optimizer.step(loss, params=values, override=rates, grad_callback=clip)
            with swapped(self.objective, dict(zip(self.params, values, strict=True))):
                output, _ = self.objective.run_student(self.validation)
                loss = self.objective.task_loss_of(output, self.validation)
            return torch.stack(torch.autograd.grad(loss, rows))


@pytest.mark.slow
@pytest.mark.parametrize("over_reverse", [True, False], ids=["forward over reverse", "double backward"])
@pytest.mark.parametrize("name", ["nesterov", "nesterov, clipped by module", "adamw"])
def test_the_gradient_of_every_step_is_exact(name, over_reverse):
    case = Learning(name)
    estimator, h = case.sweep(over_reverse=over_reverse)
    truth = case.through_all_steps()
    assert estimator.over_reverse is over_reverse and h.shape == (len(case.weights) + len(NAMES),)
    assert (truth[:, -3:].abs() > 1e-9).all()
    assert relative(estimator.per_step, truth) < 1e-8
    for n in range(1, 4):
        assert relative(estimator.per_step[:, -n], truth[:, -n]) < 1e-8, NAMES[-n]
    assert torch.allclose(h, truth.sum(0), rtol=1e-8, atol=1e-12)


@pytest.mark.slow
def test_what_is_right_is_found_out():
    """Forward over reverse is taken after a comparison with double backward, and the objective has its numbers back."""
    case = Learning("nesterov")
    case.batches = case.batches[:3]
    estimator, _ = case.sweep()
    assert estimator.over_reverse
    assert case.objective.task_weight == VALUES[0] and case.objective.terms[-2].loss.temperature == VALUES[1]
    assert case.objective.terms[-1].loss.level_weights[1] == VALUES[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_real_trainings_agree(name):
    """In which a scalar is moved at one step alone, by a little to both sides."""
    case = Learning(name, activation=nn.Tanh)
    case.batches = case.batches[:5]
    estimator, _ = case.sweep()

    def validation_loss(at, which, by):
        case.restore()
        torch.manual_seed(7)
        for number, batch in enumerate(case.batches):
            values = list(VALUES)
            values[which] += by * (number == at)
            case.set(values)
            case.step(batch, case.weights)
        output, _ = case.objective.run_student(case.validation)
        return case.objective.task_loss_of(output, case.validation).item()

    for at in (0, 2, 4):
        for which in range(len(NAMES)):
            difference = (validation_loss(at, which, 1e-5) - validation_loss(at, which, -1e-5)) / 2e-5
            found = estimator.per_step[at, len(case.weights) + which].item()
            assert found == pytest.approx(difference, rel=1e-5, abs=1e-9), (at, NAMES[which])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kt.temperature", "scalar 'kt.temperature' is of no term"),
        ("kd.heat", "'heat' of term 'kd' cannot move (allowed: temperature, ce_weight)"),
        (
            "kd.ce_weight",
            "scalar 'kd.ce_weight' starts from 0.0; a learned one moves as its logarithm: state a start above 0",
        ),
        (
            "hcl.level_weights",
            "'level_weights' of term 'hcl' is a list: name an item, level_weights.0 to level_weights.3",
        ),
        ("hcl.level_weights.4", "'level_weights.4' of term 'hcl' is a list: name an item"),
    ],
)
def test_names_of_nothing_are_refused(name, message):
    objective = Learning("sgd").objective
    with pytest.raises(UserError) as refused:
        LearnedScalars(objective, [name], 1)
    assert message in str(refused.value)


# The search


def searcher(**settings):
    objective = objective_of_four()
    optimizer = torch.optim.SGD(objective.trainable_parameters(), lr=0.1)
    name = settings.pop("estimator", "sweep")
    estimator = ESTIMATORS.build(name, objective, optimizer, **({"steps": 3} if name == "sweep" else {}))
    settings = {"optimizer": "relative", "scalars": ["task", "kd.temperature"], **settings}
    return Searcher(
        objective,
        estimator,
        WEIGHTINGS.build("log"),
        Batches(11).endless,
        total_steps=12,
        learning_rate=0.5,
        **settings,
    )


@pytest.mark.parametrize("estimator", ["forward_mode", "finite_difference", "unrolled"])
def test_only_a_sweep_learns_them(estimator):
    with pytest.raises(
        UserError, match=f"task, kd.temperature can be learned by a search over a horizon alone .* has {estimator}"
    ):
        searcher(estimator=estimator)


def test_weights_and_scalars_share_one_step():
    """Their logarithms are one group: the largest of all gradients moves by the step's size, the others in proportion."""
    found = searcher()
    found.alpha_tilde.grad = torch.tensor([0.1, -0.2, 0.0])
    found.beside.log.grad = torch.tensor([0.4, -0.1])
    before = torch.cat([found.alpha_tilde, found.beside.log]).detach().clone()
    found.optimizer.step()
    moved = torch.cat([found.alpha_tilde, found.beside.log]).detach() - before
    assert torch.allclose(moved, torch.tensor([-0.125, 0.25, 0.0, -0.5, 0.125]))


def test_the_objective_computes_with_what_is_recorded():
    """From the start, after an update, and after a state is loaded."""
    found = searcher()
    found.weights(0)
    with torch.no_grad():
        found.beside.log.copy_(torch.tensor([0.5, 8.0]).log())
    found.beside.moved()
    found.weights(1)
    assert found.beside.history[:2].tolist() == [pytest.approx([1, 4]), pytest.approx([0.5, 8])]
    again = searcher()
    again.load_state_dict(found.state_dict())
    for one in (found, again):
        assert one.objective.task_weight_at(1) == pytest.approx(0.5)
        assert one.objective.terms[-1].loss.temperature == pytest.approx(8)
    schedule = again.schedule(5, {}, Constants(torch.ones(3), torch.tensor([2.0, 3.0])))
    assert {name: values.tolist() for name, values in schedule.scalars.items()} == {"task": [2], "kd.temperature": [3]}
    assert {name: values.tolist() for name, values in again.schedule(5, {}).scalars.items()} == {
        "task": pytest.approx([1, 0.5]),
        "kd.temperature": pytest.approx([4, 8]),
    }
    logged = again.scalars()
    assert logged["scalar/task"].item() == 0.5 and logged["scalar/kd.temperature"].item() == pytest.approx(8)


def test_steps_are_of_a_group_that_they_have_in_common():
    p, q = (torch.zeros(2, requires_grad=True) for _ in range(2))
    p.grad, q.grad = torch.tensor([1.0, 2.0]), torch.tensor([-4.0, 0.0])
    RelativeStep([{"params": [p]}, {"params": [q]}], lr=1.0, momentum=0.0).step()
    assert p.tolist() == [-0.5, -1.0] and q.tolist() == [1.0, 0.0]
