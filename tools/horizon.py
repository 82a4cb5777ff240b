"""How far must a hypergradient look ahead to see what a distillation term is good for?

    python tools/horizon.py search_configs/horizon_cifar10_resnet20_resnet8.yaml --steps 1 8 24

One training with equal weights that never move, watched by exact hypergradients through K steps (`unrolled`) for every
K of ``--steps``. Probing leaves no trace, so that every K sees the same training. For each term and K it prints the
mean of h = dL_val/dw per step of the window and its standard error over the windows, and in how many windows h is
negative: where a search would strengthen the term. Windows that begin before ``--first`` are left out: at the very
beginning h is larger than ever after. The rows go to ``--json``; ``--render FILE`` prints a table of such rows.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distpro import build
from distpro.batch import Batch
from distpro.config.reading import read_config
from distpro.files import write_atomically
from distpro.runs.folder import environment
from distpro.search.estimators.base import TrainingStep
from distpro.search.estimators.unrolled import Unrolled
from distpro.search.searcher import Searcher


class Recorded(Unrolled):
    """Keeps what it finds."""

    rows: list[list[float]]

    def __call__(self, step: TrainingStep, validation: Batch) -> Tensor:
        h = super().__call__(step, validation)
        self.rows.append((h / self.window).tolist())
        return h


def record(config: str, overrides: list[str], steps: int, length: int) -> tuple[list[str], list[list[float]]]:
    """Names of the terms, and h per step of every window of ``steps`` steps in a training of ``length``."""
    horizon = [f"search.estimator={json.dumps({'unrolled': {'steps': steps}})}", f"training.max_steps={length}"]
    checked = read_config(config, [*overrides, *horizon, f"tracking.evaluate_every={10**6}"])
    if checked.threads:
        torch.set_num_threads(checked.threads)
    torch.manual_seed(checked.seed)
    trainer = build.build_search(checked, build.build_data(checked))
    searcher = trainer.weights
    assert isinstance(searcher, Searcher)
    searcher.optimizer.param_groups[0]["lr"] = 0.0
    estimator: Any = searcher.estimator
    estimator.__class__, estimator.rows = Recorded, []
    trainer.fit()
    return [entry.key for entry in searcher.entries], estimator.rows


def render(content: dict[str, Any]) -> str:
    """Markdown: a row per term, a column per K."""
    measured, first = content["h"], content["first"]
    lines = ["| term | " + " | ".join(f"K = {k}" for k in measured) + " |", "|---" * (1 + len(measured)) + "|"]
    for n, key in enumerate(content["keys"]):
        cells = []
        for k, seeds in measured.items():
            values = [row[n] for rows in seeds for at, row in enumerate(rows) if at * int(k) >= first]
            error = statistics.stdev(values) / math.sqrt(len(values))
            negative = sum(v < 0 for v in values)
            cells.append(f"{1000 * statistics.mean(values):+.1f} ± {1000 * error:.1f} ({negative} of {len(values)})")
        lines.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 8, 24], metavar="K")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--length", type=int, default=96, help="steps of the training")
    parser.add_argument("--first", type=int, default=24)
    parser.add_argument("--json", type=Path, default=Path("runs/horizon.json"))
    parser.add_argument("--render", type=Path)
    options, overrides = parser.parse_known_args()
    if options.render:
        print(render(json.loads(options.render.read_text())))
        return
    content: dict[str, Any] = {"config": options.config, "overrides": overrides, "first": options.first, "h": {}}
    for steps in options.steps:
        for seed in options.seeds:
            found = record(options.config, [*overrides, f"seed={seed}"], steps, options.length)
            content["keys"], rows = found
            content["h"].setdefault(str(steps), []).append(rows)
            print(f"K = {steps}, seed {seed}: {len(rows)} windows", flush=True)
    content["environment"] = environment()
    write_atomically(json.dumps(content) + "\n", options.json)
    print(render(content))


if __name__ == "__main__":
    main()
