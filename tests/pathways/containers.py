"""Models whose inputs and outputs are containers, as they are found in the field."""

from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class ModelOutput(OrderedDict):
    """A dataclass that is a mapping of its fields that are not None, as the outputs of Hugging Face's models are."""

    logits: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple | None = None

    def __post_init__(self):
        for field in fields(self):
            if getattr(self, field.name) is not None:
                self[field.name] = getattr(self, field.name)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, hidden_states, attention_mask=None):
        scores = self.query(hidden_states) @ self.key(hidden_states).mT
        weights = (scores if attention_mask is None else scores + (1 - attention_mask[:, None]) * -1e9).softmax(-1)
        return weights @ hidden_states, weights


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.dense = Attention(), nn.Linear(6, 6)

    def forward(self, hidden_states, attention_mask=None):
        context, _ = self.attention(hidden_states=hidden_states, attention_mask=attention_mask)
        return (self.dense(context),)


class Encoder(nn.Module):
    """Layers called by keyword; the output is written to in place after it was given."""

    def __init__(self, layers=4):
        super().__init__()
        self.layer = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, hidden_states, attention_mask=None):
        states = (hidden_states,)
        for layer in self.layer:
            states += (layer(states[-1], attention_mask=attention_mask)[0],)
        return ModelOutput(last_hidden_state=states[-1], hidden_states=states)


class TextClassifier(nn.Module):
    """As in Hugging Face's library: keyword arguments in, a `ModelOutput` out."""

    def __init__(self, layers=4):
        super().__init__()
        self.embeddings, self.encoder, self.classifier = nn.Embedding(20, 6), Encoder(layers), nn.Linear(6, 3)

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        encoded = self.encoder(hidden_states=self.embeddings(input_ids), attention_mask=attention_mask)
        logits = self.classifier(F.relu(encoded.last_hidden_state.add_(1), inplace=True)[:, 0])
        return ModelOutput(logits=logits, hidden_states=encoded["hidden_states"])


def text(samples=2, length=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 20, (samples, length), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < length - 1).float().expand(samples, length)}


class Detector(nn.Module):
    """As torchvision's: a list of images in; a dict of losses in training, a list of dicts in evaluation."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3, padding=1), pool=nn.MaxPool2d(2)))
        self.neck, self.head = Neck(), nn.Conv2d(4, 5, 1)

    def forward(self, images, targets=None):
        if self.training and targets is None:
            raise ValueError("targets should not be none when in training mode")
        levels = self.neck(self.backbone(torch.stack([image / 2 for image in images])))
        boxes = self.head(levels["fine"])
        if self.training:
            return {"boxes": boxes.square().mean(), "scores": boxes.abs().mean()}
        return [{"boxes": b.flatten(1)[:4].T, "scores": b[4].flatten()} for b in boxes]


class Neck(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        fine = self.inner(x)
        return OrderedDict(fine=fine, coarse=F.max_pool2d(fine, 2))


def pictures(samples=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 16, 16, generator=generator) for _ in range(samples)]


class Pair(NamedTuple):
    main: Tensor
    rest: dict


class Block(nn.Module):
    """Gives its one feature map inside a container of some kind."""

    KINDS = {  # what is given, the key of the feature map, and how a model takes it
        "tuple": (lambda y: (y, y.mean()), "0", lambda out: out[0]),
        "list": (lambda y: [y, y.mean()], "0", lambda out: out[0]),
        "dict": (lambda y: {"main": y, "mean": y.mean()}, "main", lambda out: out["main"]),
        "ordered": (lambda y: OrderedDict(main=y, mean=y.mean()), "main", lambda out: out["main"]),
        "named tuple": (lambda y: Pair(y, {"mean": y.mean()}), "main", lambda out: out.main),
        "model output": (
            lambda y: ModelOutput(last_hidden_state=y, hidden_states=(y.mean(),)),
            "last_hidden_state",
            lambda out: out.last_hidden_state,
        ),
        "nested": (lambda y: ([y.mean(), {"main": y}], None, "word"), "0.1.main", lambda out: out[0][1]["main"]),
    }

    def __init__(self, kind):
        super().__init__()
        self.kind, self.conv = kind, nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.KINDS[self.kind][0](self.conv(x))


class Overwritten(nn.Module):
    """A block whose feature map is written to in place after the block gave it."""

    def __init__(self, kind):
        super().__init__()
        self.block, self.relu = Block(kind), nn.ReLU(inplace=True)
        self.name = f"block[{Block.KINDS[kind][1]}]"
        self.take = Block.KINDS[kind][2]

    def forward(self, x):
        return self.relu(self.take(self.block(x))).mean((2, 3))
