"""How a config trains, in one line."""

from __future__ import annotations

from typing import Any

from distpro.config.schema import Config
from pathways.space import parse_spec


def recipe_of(config: Config, searching: bool) -> str:
    """Optimiser, learning rate, augmentation and what is kept, as far as they are not the plain ones."""
    training, data = config.training, config.data
    optimizer, rate = training.optimizer, training.learning_rate
    said = [f"{optimizer.name}, learning rate {optimizer.lr:g}, {rate.name}"]
    if rate.warmup_epochs:
        said.append(f"warm-up of {_epochs(rate.warmup_epochs)}")
    if rate.final or rate.cooldown_epochs:
        said.append(f"down to {rate.final:g} of it, cool-down of {_epochs(rate.cooldown_epochs)}")
    if optimizer.weight_decay:
        spared = " (not of norms and biases)" if optimizer.no_decay != "none" else ""
        said.append(f"weight decay {optimizer.weight_decay:g}{spared}")
    if optimizer.layer_decay != 1:
        said.append(f"layer-wise rates, {optimizer.layer_decay:g} a layer")
    if data.augment:
        said.append(f"augmentation {', '.join(parse_spec(entry, 'data.augment')[0] for entry in data.augment)}")
    if data.repeats > 1:
        said.append(f"{data.repeats} copies of each image")
    if data.sampler is not None:
        said.append(f"sampler {_words(data.sampler)}")
    if searching:
        return "; ".join(said)
    if training.ema is not None:
        said.append(f"moving average, decay {training.ema.decay:g}{', with warm-up' if training.ema.warmup else ''}")
    if training.chooses:
        part = (
            "the validation part"
            if training.validation_fraction is None
            else f"{training.validation_fraction:g} of the samples"
        )
        kept = {"last": "the last", "best": "the best", "average": f"the mean of the {training.average_of} best"}[
            training.keep
        ]
        said.append(f"keeps {kept} by {part}")
    if training.patience is not None:
        said.append(f"ends after {training.patience} evaluations without a better one")
    return "; ".join(said)


def _words(value: Any) -> str:
    return value if isinstance(value, str) else ", ".join(f"{x:g}" for x in value)


def _epochs(count: float) -> str:
    return f"{count:g} epoch{'s' * (count != 1)}"
