"""Constant weights tuned by Optuna: what one would do without a schedule search.

    python tools/tune.py search_configs/cifar10_resnet20_resnet8.yaml --weights review=2 at=100 --out runs/tuned
    distpro retrain runs/tuned/tuned.yaml

Each trial trains the config's student for ``--epochs`` on the part of the data that a search trains on, with constant
weights, and is judged by its accuracy on the part that a search validates on. The first trial takes the given
weights, the others log-uniform ones within a factor of ten of them, by Optuna's TPE. The folder gets the config with
the best weights (`tuned.yaml`), `result.json` with all trials, and `environment.json`. Needs optuna.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from distpro import build
from distpro.config.reading import read_config
from distpro.data import Split, split
from distpro.files import write_atomically
from distpro.runs.commands import retrain
from distpro.runs.folder import environment


def write_split(config: Any, path: Path) -> None:
    """The two parts of a search's data, as training and test set of a data set of their own."""
    data = build.build_data(config)
    validation, train = split(data.train, config.search.fraction_of(len(data.train)), config.seed)

    def arrays(name: str, part: Split) -> dict[str, Any]:
        images = part.peek(len(part)).permute(0, 2, 3, 1)
        return {f"x_{name}": images.numpy(), f"y_{name}": part.labels.numpy()}

    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays("train", train), **arrays("test", validation), names=np.array(data.names))


def terms(weights: dict[str, float]) -> list[dict[str, Any]]:
    return [{"loss": loss, "weight": float(f"{weight:.4g}")} for loss, weight in weights.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--weights", nargs="+", required=True, metavar="LOSS=WEIGHT")
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=1, help="of a trial")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    try:
        import optuna
    except ImportError:
        raise SystemExit("tune.py needs optuna: pip install 'distpro[study]'") from None
    published = {loss: float(weight) for loss, _, weight in (text.partition("=") for text in options.weights)}
    overrides = [*options.overrides, "pathways=null", "retrain.weights=constant"]
    config = read_config(options.config, overrides)
    start = time.time()
    data = options.out / "split.npz"
    write_split(config, data)
    on_split = ["data.name=npz", f"data.root={json.dumps(str(data.resolve()))}", "data.samples=null"]
    trials: list[dict[str, Any]] = []

    def objective(trial: optuna.Trial) -> float:
        weights = {
            k: math.exp(trial.suggest_float(k, math.log(w / 10), math.log(w * 10))) for k, w in published.items()
        }
        chosen = f"terms={json.dumps(terms(weights))}"
        short = [f"training.epochs={options.epochs}", f"tracking.evaluate_every={options.epochs}"]
        accuracy = retrain(options.config, None, None, [*overrides, *on_split, *short, chosen]).metrics["accuracy"]
        trials.append({"terms": terms(weights), "accuracy": accuracy})
        return accuracy

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=config.seed))
    study.enqueue_trial({k: math.log(w) for k, w in published.items()})
    study.optimize(objective, n_trials=options.trials)
    best = {k: math.exp(v) for k, v in study.best_params.items()}
    data.unlink()
    content = {**config.model_dump(mode="json"), "terms": terms(best)}
    write_atomically(yaml.safe_dump(content, sort_keys=False), options.out / "tuned.yaml")
    write_atomically(json.dumps(environment(), indent=1) + "\n", options.out / "environment.json")
    result = {"accuracy": study.best_value, "loss": None, "seconds": time.time() - start, "trials": trials}
    write_atomically(json.dumps(result, indent=1) + "\n", options.out / "result.json")


if __name__ == "__main__":
    main()
