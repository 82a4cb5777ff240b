"""Two spirals: points of the plane in two classes."""

import math

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from pathways.call import Call


class Spirals(Dataset):
    classes = ["one", "other"]

    def __init__(self, count, seed):
        draw = torch.Generator().manual_seed(seed)
        self.targets = torch.randint(2, (count,), generator=draw)
        angle = 3 * torch.rand(count, generator=draw) + math.pi * self.targets
        self.points = torch.stack([angle.cos(), angle.sin()], 1) * (0.2 + torch.rand(count, 1, generator=draw))

    def __len__(self):
        return len(self.points)

    def __getitem__(self, n):
        return self.points[n], self.targets[n]


def parts(count=40):
    return Spirals(count, 0), Spirals(16, 1), Spirals(20, 2)


def loaders(count=40):
    train, validation, test = parts(count)
    return DataLoader(train, 10, shuffle=True), DataLoader(validation, 8, shuffle=True), DataLoader(test, 7)


class Own(Sampler):
    """In an order that nobody knows."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter(torch.randperm(self.count).tolist())


def unsteady(count=40):
    train, validation, test = parts(count)
    return DataLoader(train, 10, sampler=Own(count)), validation, test


class Net(nn.Module):
    def __init__(self, width=4, outputs=2):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(2, width), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.head = nn.Linear(width, outputs)

    def forward(self, points):
        hidden = self.second(self.first(points))
        return {"scores": self.head(hidden), "hidden": hidden}


class Margin:
    """Classes by a hinge; the mean hinge is its headline, and lower is better."""

    headline, higher_is_better = "hinge", False

    def __init__(self, margin=1.0):
        self.margin = margin

    def model_arguments(self, data):
        return {"outputs": data.num_classes}

    def call(self, batch, training):
        return Call.of(batch.inputs)

    def loss(self, output, batch):
        return nn.functional.multi_margin_loss(output["scores"], batch.target, margin=self.margin)

    def response(self, output):
        return output["scores"]

    def labels(self, batch):
        return batch.target, None

    def metrics(self):
        return Mean("hinge", lambda output, batch: self.loss(output, batch) * batch.samples)


class Mean:
    def __init__(self, name, measure):
        self.name, self.measure, self.sum, self.count = name, measure, 0.0, 0

    def update(self, output, batch):
        self.sum += float(self.measure(output, batch))
        self.count += batch.samples

    def state(self):
        return [self.sum, self.count]

    def merge(self, states):
        self.sum, self.count = (sum(values) for values in zip(*states, strict=True))

    def compute(self):
        return {self.name: self.sum / self.count}


class Soft(Margin):
    """Of a loss that has a second derivative."""

    def loss(self, output, batch):
        return nn.functional.cross_entropy(output["scores"], batch.target)


class Hits(Mean):
    """Share of right answers, times ``scale``."""

    def __init__(self, scale=1.0):
        super().__init__("hits", lambda o, b: scale * (o["scores"].argmax(1) == b.target).sum())


class Signs(torch.optim.Optimizer):
    """Steps along the signs of the averaged gradient."""

    def __init__(self, params, lr, decay=0.5):
        super().__init__(params, {"lr": lr, "decay": decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                    mean.mul_(group["decay"]).add_(p.grad, alpha=1 - group["decay"])
                    p.sub_(group["lr"] * mean.sign())
