"""Models and data of tasks beside classification, small enough for hundreds of trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

SIZE = 16


def make_data(place: Path) -> None:
    """Folders ``maps``, ``depths``, ``boxes`` and ``texts``, the same each time. 12 to 20 samples in each part."""
    draw = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for n in range(12):
            image = Image.fromarray(draw.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8))
            _save(image, place / "maps" / split / f"{n}.png")
            labels = draw.choice([0, 1, 2, 255], (SIZE, SIZE)).astype(np.uint8)
            _save(Image.fromarray(labels), place / "maps" / f"{split}annot" / f"{n}.png")
            if split != "val":
                _save(image, place / "depths" / split / f"{n}.jpg")
                metres = draw.integers(0, 5000, (SIZE, SIZE)).astype(np.uint16)
                _save(Image.fromarray(metres), place / "depths" / split / f"{n}.png")
    lines = ["file,width,height,class,xmin,ymin,xmax,ymax"]
    for n in range(20):
        image = Image.fromarray(draw.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8))
        _save(image, place / "boxes" / "images" / f"{n}.png")
        left, top = draw.integers(0, SIZE // 2, 2)
        lines.append(f"{n}.png,{SIZE},{SIZE},{'cat' if n % 2 else 'dog'},{left},{top},{left + 6},{top + 7}")
    (place / "boxes" / "boxes.csv").write_text("\n".join(lines) + "\n")
    words = "the quick brown fox jumps over a lazy dog while it rains in spain again".split()
    (place / "texts").mkdir(parents=True, exist_ok=True)
    for part in ("train", "validation", "test"):
        rows = [f"{' '.join(draw.choice(words, draw.integers(2, 9)))}\t{n % 2}" for n in range(20)]
        (place / "texts" / f"{part}.tsv").write_text("\n".join(["text\tlabel", *rows]) + "\n")


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


class Maps(nn.Module):
    """(N, 3, H, W) to a map per class, of half the size."""

    def __init__(self, num_classes: int, width: int = 6):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(width, num_classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


class Images(Maps):
    """Logits of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean((2, 3))  # type: ignore[no-any-return]


class Depths(Maps):
    """A distance per pixel, above 0."""

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(super().forward(x))


class Texts(nn.Module):
    """Token ids and their mask to logits."""

    def __init__(self, num_classes: int, width: int = 8):
        super().__init__()
        self.embed, self.norm = nn.Embedding(120, width), nn.LayerNorm(width)
        self.body = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(0.1))
        self.head = nn.Linear(width, num_classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> dict[str, Tensor]:
        hidden = self.norm(self.body(self.embed(input_ids)))
        mask = attention_mask[..., None].to(hidden.dtype)
        return {"logits": self.head((hidden * mask).sum(1) / mask.sum(1))}


class Boxes(nn.Module):
    """A detector of one box per image: a list of images in; losses in training, else a list of mappings."""

    def __init__(self, num_classes: int, width: int = 6):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.box, self.score = nn.Linear(width, 4), nn.Linear(width, num_classes)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        pooled = self.body(torch.stack(list(images))).mean((2, 3))
        corners, scores = SIZE * self.box(pooled).sigmoid(), self.score(pooled)
        boxes = torch.cat(
            [torch.minimum(corners[:, :2], corners[:, 2:]), torch.maximum(corners[:, :2], corners[:, 2:])], 1
        )
        if self.training:
            assert targets is not None
            truth = torch.stack([target["boxes"][0] for target in targets])
            labels = torch.stack([target["labels"][0] for target in targets])
            return {"box": F.smooth_l1_loss(boxes / SIZE, truth / SIZE), "class": F.cross_entropy(scores, labels)}
        found = scores[:, 1:].softmax(1).max(1)
        return [
            {"boxes": box[None], "scores": score[None], "labels": label[None] + 1}
            for box, score, label in zip(boxes, found.values, found.indices, strict=True)
        ]
