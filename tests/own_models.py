"""Models, tasks and data sets as somebody else would write them: a tagger of tokens that takes and gives dicts, a
classifier of texts that gives a `ModelOutput` like Hugging Face's, and a detector that gives losses in training and
lists otherwise. Configs name them as ``tests.own_models:name``."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from pathways.call import Call

# Data


class Texts(Dataset):
    """Token ids, their mask and labels: one per token (−100 where there is none), or one per text."""

    def __init__(self, count, seed, per_token):
        draw = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, 8, (count, 1), generator=draw)
        self.mask = (torch.arange(7) < lengths).long()
        self.ids = torch.randint(1, 12, (count, 7), generator=draw) * self.mask
        self.labels = (self.ids % 3).masked_fill(self.mask == 0, -100) if per_token else self.ids.sum(1) % 3

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, n):
        return {"input_ids": self.ids[n], "attention_mask": self.mask[n], "labels": self.labels[n]}


class Boxes(Dataset):
    """Images of different sizes with one bright box in each."""

    def __init__(self, count, seed):
        draw = torch.Generator().manual_seed(seed)
        self.samples = []
        for n in range(count):
            image = 0.1 * torch.rand(3, 16 + 4 * (n % 3), 16 + 4 * (n % 2), generator=draw)
            left, top = torch.randint(0, 8, (2,), generator=draw).tolist()
            image[:, top : top + 6, left : left + 6] += 1
            box = torch.tensor([[left, top, left + 6, top + 6]], dtype=torch.float32)
            self.samples.append((image, {"boxes": box, "labels": torch.ones(1, dtype=torch.int64)}))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, n):
        return self.samples[n]


def tagged_texts(count=24):
    return tuple(Texts(size, seed, per_token=True) for seed, size in enumerate((count, 8, 8)))


def texts(count=24):
    return tuple(Texts(size, seed, per_token=False) for seed, size in enumerate((count, 8, 8)))


def boxes(count=12):
    return tuple(Boxes(size, seed) for seed, size in enumerate((count, 4, 5)))


# Models


class Block(nn.Module):
    """A layer of tokens that gives a tuple, as those of transformers do."""

    def __init__(self, width):
        super().__init__()
        self.mix, self.norm = nn.Linear(2 * width, width), nn.LayerNorm(width)

    def forward(self, hidden, mask=None):
        weights = mask[..., None].to(hidden.dtype)
        mean = (hidden * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        return (self.norm(hidden + torch.tanh(self.mix(torch.cat([hidden, mean.expand_as(hidden)], -1)))),)


class Encoder(nn.Module):
    def __init__(self, width, layers):
        super().__init__()
        self.embed = nn.Embedding(12, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, ids, mask):
        every = [self.embed(ids)]
        for layer in self.layers:
            every.append(layer(every[-1], mask=mask)[0])
        return every


class Tagger(nn.Module):
    """Dict of keyword arguments in, dict out."""

    def __init__(self, width=8, layers=2):
        super().__init__()
        self.encoder, self.head = Encoder(width, layers), nn.Linear(width, 3)

    def forward(self, input_ids, attention_mask):
        hidden = self.encoder(input_ids, attention_mask)[-1]
        return {"hidden": hidden, "logits": self.head(hidden)}


@dataclass
class TextOutput(OrderedDict):
    """As `transformers.utils.ModelOutput`: fields that are None are no keys; attributes, keys and positions read it."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None

    def __post_init__(self):
        for field in fields(self):
            if getattr(self, field.name) is not None:
                super().__setitem__(field.name, getattr(self, field.name))

    def __getitem__(self, key):
        return dict(self.items())[key] if isinstance(key, str) else tuple(self.values())[key]


class TextClassifier(nn.Module):
    """Keyword arguments in, `TextOutput` out, with a dropout that trains."""

    def __init__(self, width=8, layers=2, num_labels=3, dropout=0.1):
        super().__init__()
        self.encoder, self.dropout = Encoder(width, layers), nn.Dropout(dropout)
        self.classifier = nn.Linear(width, num_labels)

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        every = self.encoder(input_ids, attention_mask)
        logits = self.classifier(self.dropout(every[-1][:, 0]))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return TextOutput(loss, logits, tuple(every))


class Detector(nn.Module):
    """List of images in; dict of losses in training, when it needs the targets; list of dicts otherwise."""

    def __init__(self, width=6):
        super().__init__()
        self.backbone = nn.Sequential(
            OrderedDict(
                first=nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()),
                second=nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU()),
            )
        )
        self.box, self.score = nn.Linear(2 * width, 4), nn.Linear(2 * width, 1)

    def forward(self, images, targets=None):
        if self.training and targets is None:
            raise ValueError("in training, targets are needed")
        size = [max(image.shape[side] for image in images) for side in (1, 2)]
        batch = torch.stack([F.pad(i, (0, size[1] - i.shape[2], 0, size[0] - i.shape[1])) for i in images])
        pooled = self.backbone(batch).mean((2, 3))
        boxes, scores = 16 * self.box(pooled).sigmoid(), self.score(pooled)[:, 0]
        if self.training:
            truth = torch.cat([target["boxes"] for target in targets])
            objectness = F.binary_cross_entropy_with_logits(scores, torch.ones_like(scores))
            return {"loss_box": F.smooth_l1_loss(boxes / 16, truth / 16), "loss_objectness": objectness}
        return [{"boxes": box[None], "scores": score.sigmoid()[None]} for box, score in zip(boxes, scores, strict=True)]


# Tasks


class Mean:
    """Metrics that are means over samples."""

    def __init__(self, measure):
        self.measure, self.sums, self.count = measure, {}, 0

    def update(self, output, batch):
        for name, value in self.measure(output, batch).items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)
        self.count += batch.samples

    def state(self):
        return [self.sums, self.count]

    def merge(self, states):
        names = {name for sums, _ in states for name in sums}
        self.sums = {name: sum(sums.get(name, 0.0) for sums, _ in states) for name in sorted(names)}
        self.count = sum(count for _, count in states)

    def compute(self):
        return {name: value / self.count for name, value in self.sums.items()}


class Tagging:
    """A label per token."""

    headline, higher_is_better = "tags", True

    def model_arguments(self, data):
        return {}

    def call(self, batch, training):
        return Call.of(batch.inputs)

    def loss(self, output, batch):
        return F.cross_entropy(output["logits"].transpose(1, 2), batch.target, ignore_index=-100)

    def response(self, output):
        return output["logits"]

    def labels(self, batch):
        return batch.target, batch.target != -100

    def metrics(self):
        return Mean(self._right)

    def _right(self, output, batch):
        counts = batch.target != -100
        right = (output["logits"].argmax(-1) == batch.target) & counts
        return {"tags": (right.sum(1) / counts.sum(1)).sum()}


class Detection:
    """Boxes: the model's own losses in training, and the distance of its boxes from the truth otherwise."""

    headline, higher_is_better = "distance", False

    def model_arguments(self, data):
        return {}

    def call(self, batch, training):
        return Call((batch.inputs, batch.target) if training else (batch.inputs,))

    def loss(self, output, batch):
        return sum(output.values())

    def response(self, output):
        return None

    def labels(self, batch):
        return None, None

    def metrics(self):
        return Mean(self._distance)

    def _distance(self, output, batch):
        found = [(o["boxes"] - t["boxes"]).abs().mean() for o, t in zip(output, batch.target, strict=True)]
        return {"distance": sum(found)}
