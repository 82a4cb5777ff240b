"""Numbers beside the weights that a search over a horizon learns: their gradient against autograd through the whole training
and against real trainings, and which scalars can be learned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distpro.losses import build_loss
from distpro.objective import Objective, Term
from distpro.search.estimators import ESTIMATORS
from distpro.search.estimators.swap import swapped
from distpro.search.estimators.unrolled import _DIFFERENTIABLE, _clip
from distpro.search.learned import LearnedScalars
from distpro.train.state import no_trace
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
        for number, batch in enumerate(self.batches):
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


def test_what_is_right_is_found_out():
    """Forward over reverse is taken after a comparison with double backward, and the objective has its numbers back."""
    case = Learning("nesterov")
    case.batches = case.batches[:3]
    estimator, _ = case.sweep()
    assert estimator.over_reverse
    assert case.objective.task_weight == VALUES[0] and case.objective.terms[-2].loss.temperature == VALUES[1]
    assert case.objective.terms[-1].loss.level_weights[1] == VALUES[2]


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
