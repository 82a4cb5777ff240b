"""Algorithm 1 of the paper, lines 1-7, on a small problem, with nothing but tensors and autograd: what a search is
compared with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from distpro.batch import batch_of
from distpro.losses import build_loss
from distpro.objective import Objective, Term

SGD = {"lr": 0.2, "momentum": 0.9, "weight_decay": 1e-2}


class Batches:
    """A loader of the same few batches in every epoch."""

    def __init__(self, seed: int, count: int = 5, shape=(6,), size: int = 7):
        generator = torch.Generator().manual_seed(seed)
        draw = (torch.randn(size, *shape, generator=generator) for _ in range(count))
        self.batches = [batch_of(x, torch.randint(4, (size,), generator=generator)) for x in draw]

    def __len__(self):
        return len(self.batches)

    def epoch(self, epoch, start=0):
        return iter(self.batches[start:])

    def endless(self, start=0):
        while True:
            yield self.batches[start % len(self)]
            start += 1


class Projected(nn.Module):
    """Mean squared difference after a linear map of the student's feature; counts its passes."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(8, 8), 0

    def forward(self, student, teacher, target=None, index=None):
        self.calls += 1
        return F.mse_loss(self.linear(student), teacher)


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def objective_of_four() -> Objective:
    """Two pathways, KD, and a term of constant weight in between."""
    teacher, student = network(0), network(1)
    first, second, constant = Projected(), Projected(), Projected()
    terms = [
        Term(first, "first", ["1"], ["3"], level=(1, 1, 0)),
        Term(constant, "constant", ["3"], ["1"], weight=0.3),
        Term(second, "second", ["3"], ["3"], level=(1, 2, 0)),
        Term(build_loss("kd"), "kd"),
    ]
    return Objective(teacher, student, terms)


FORMULAS = {
    "biased_softmax": lambda a: a.exp() / (a.exp().sum() + math.e),
    "softmax": lambda a: a.exp() / a.exp().sum(),
    "biased_l1": lambda a: a / (a.abs().sum() + 1),
    "l1": lambda a: a / a.abs().sum(),
    "sigmoid": lambda a: 1 / (1 + (-a).exp()),
    "log": lambda a: a.exp(),
}


def linear(x, weight, bias):
    return x @ weight.T + bias


class ByHand:
    """Algorithm 1, lines 1-7, on `objective_of_four`, with nothing but tensors and autograd through the steps."""

    def __init__(self, objective, weighting, gamma, betas, window, every, repeats, scale):
        self.theta = [p.detach().clone() for p in objective.trainable_parameters()]
        self.momentum = [torch.zeros_like(p) for p in self.theta]
        self.teacher = [p.detach() for p in objective.teacher.parameters()]
        self.weighting, self.gamma, self.betas = FORMULAS[weighting], gamma, betas
        self.window, self.every, self.repeats, self.scale = window, every, repeats, scale
        self.alpha = torch.full((3,), -math.log(4)) if weighting == "log" else torch.ones(3)
        self.moments = [torch.zeros(3), torch.zeros(3)]
        self.updates = 0
        self.rows = []
        self.rate = lambda t: 1.0

    @staticmethod
    def forward(params, x):
        first = torch.tanh(linear(x, *params[0:2]))
        second = torch.tanh(linear(first, *params[2:4]))
        return first, second, linear(second, *params[4:6])

    def loss(self, theta, alpha, batch):
        first, second, logits = self.forward(theta, batch.inputs)
        teacher_first, teacher_second, teacher_logits = self.forward(self.teacher, batch.inputs)
        first_term = (linear(first, *theta[6:8]) - teacher_second).square().mean()
        constant_term = (linear(second, *theta[8:10]) - teacher_first).square().mean()
        second_term = (linear(second, *theta[10:12]) - teacher_second).square().mean()
        p = (teacher_logits / 4).softmax(1)
        kd = 16 * (p * (p.log() - (logits / 4).log_softmax(1))).sum(1).mean()
        weights = self.scale * self.weighting(alpha)
        terms = weights[0] * first_term + weights[1] * second_term + weights[2] * kd
        return self.task(logits, batch.target) + terms + 0.3 * constant_term

    @staticmethod
    def task(logits, y):
        return -logits.log_softmax(1)[torch.arange(len(y)), y].mean()

    def step(self, theta, momentum, alpha, batch, t):
        gradients = torch.autograd.grad(self.loss(theta, alpha, batch), theta, create_graph=True)
        decayed = [g + SGD["weight_decay"] * p for g, p in zip(gradients, theta, strict=True)]
        momentum = [SGD["momentum"] * m + g for m, g in zip(momentum, decayed, strict=True)]
        rate = SGD["lr"] * self.rate(t)
        return [p - rate * m for p, m in zip(theta, momentum, strict=True)], momentum

    def fresh(self):
        """θ and α̃ as the leaves of a new graph."""
        self.theta = [p.detach().requires_grad_() for p in self.theta]
        self.momentum = [m.detach() for m in self.momentum]
        self.alpha = self.alpha.detach().requires_grad_()

    def run(self, steps):
        train, validation = Batches(10).endless(), Batches(11).endless()
        for t in range(steps):
            batch = next(train)
            if self.every - 1 - t % self.every >= self.window or (t - self.every + self.window) % self.every == 0:
                self.fresh()
            before, used = (self.theta, self.momentum), self.alpha
            self.theta, self.momentum = self.step(*before, self.alpha, batch, t)
            if (t + 1) % self.every == 0:
                held_out = next(validation)
                loss = self.task(self.forward(self.theta, held_out.inputs)[2], held_out.target)
                self.update(*torch.autograd.grad(loss, self.alpha))
                if self.repeats:
                    used = self.alpha
                    self.theta, self.momentum = self.step(*before, self.alpha, batch, t)
            self.rows.append((used.detach(), self.weighting(used).detach()))
        return [torch.stack(column) for column in zip(*self.rows, strict=True)]

    def update(self, gradient):
        """One step of Adam (Kingma, Ba, 2015, Algorithm 1)."""
        self.updates += 1
        beta1, beta2 = self.betas
        first, second = self.moments
        self.moments = [beta1 * first + (1 - beta1) * gradient, beta2 * second + (1 - beta2) * gradient**2]
        mean, square = self.moments[0] / (1 - beta1**self.updates), self.moments[1] / (1 - beta2**self.updates)
        self.alpha = self.alpha.detach() - self.gamma * mean / (square.sqrt() + 1e-8)
