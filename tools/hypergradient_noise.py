"""How far a forward-mode pass in bfloat16 moves the hypergradient, beside how far another validation batch does.

    python tools/hypergradient_noise.py search_configs/cifar10_resnet56_resnet20.yaml --steps 48

Searches for real; in every third step h is computed three times at the same θ: with the forward-mode pass in float32, in
bfloat16, and in float32 with another validation batch. Prints relative differences and cosines to the first. The data folder
is the config's ($DISTPRO_DATA).
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch import Tensor

from distpro import build
from distpro.batch import Batch
from distpro.config.reading import read_config
from distpro.search.estimators.base import TrainingStep
from distpro.search.estimators.forward_mode import ForwardMode


class Compared(ForwardMode):
    """Forward mode that computes h in three ways in every third step, and goes on with the first."""

    rows: list[dict[str, float]]
    others: object

    def __call__(self, step: TrainingStep, validation: Batch) -> Tensor:
        self.calls = getattr(self, "calls", -1) + 1
        self.precision = None
        h = super().__call__(step, validation)
        if self.calls % 3 == 0:
            self.precision = torch.bfloat16
            rounded = super().__call__(step, validation)
            self.precision = None
            other = super().__call__(step, next(self.others))  # type: ignore[call-overload]
            row = {"step": float(self.calls)}
            for name, found in (("bfloat16", rounded), ("other batch", other)):
                row[f"{name}: difference"] = float((found - h).norm() / h.norm())
                row[f"{name}: cosine"] = float(torch.nn.functional.cosine_similarity(found, h, dim=0))
            self.rows.append(row)
        return h


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("config")
    command.add_argument("--steps", type=int, default=48)
    command.add_argument("--json", type=Path, default=Path("runs/hypergradient_noise.json"))
    options, overrides = command.parse_known_args()
    config = read_config(options.config, [f"training.max_steps={options.steps}", "precision=bfloat16", *overrides])
    trainer = build.build_search(config, build.build_data(config))
    searcher = trainer.weights
    estimator = searcher.estimator  # type: ignore[attr-defined]
    estimator.__class__ = Compared
    estimator.rows, estimator.others = [], searcher._validation_from(10_000)  # type: ignore[attr-defined]
    trainer.fit()
    rows = estimator.rows
    print("\n    median   range")
    for name in list(rows[0])[1:]:
        values = [row[name] for row in rows]
        print(f"{statistics.median(values):10.4f}   {min(values):.4f} - {max(values):.4f}   {name}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(
        json.dumps({"config": options.config, "torch": torch.__version__, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
