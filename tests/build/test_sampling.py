"""What copies and weighted samples do not go with, and what a dry run says of a recipe."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import distpro
from distpro import build
from distpro.config.reading import merge, read_config
from distpro.report.cost import as_text, describe
from tests.digits import random_teacher, settings

KEYS = pytest.mark.parametrize(("key", "value"), [("repeats", 2), ("sampler", "balanced")])
CONSTANT = {"pathways": None, "retrain": {"weights": "constant"}}


@KEYS
def test_a_loss_that_keeps_every_sample_refuses_copies(tmp_path, key, value):
    config = settings(random_teacher(tmp_path), {**CONSTANT, "data": {key: value}})
    config["terms"] = [{"loss": "crd", "weight": 1}]
    with pytest.raises(distpro.UserError, match=f"data.{key}: crd keeps something of every sample"):
        distpro.retrain(config)


@KEYS
def test_a_cache_of_the_teacher_refuses_copies(tmp_path, key, value):
    changes = {**CONSTANT, "data": {key: value}, "cache": {"folder": str(tmp_path / "cache")}}
    config = settings(random_teacher(tmp_path), changes)
    config["terms"] = [{"loss": "kd", "weight": 1}]
    with pytest.raises(
        distpro.UserError, match=r"cache: data.repeats and data.sampler augment copies of a sample apart"
    ):
        distpro.retrain(config)


@KEYS
def test_a_dataset_of_ones_own_has_its_own_sampler(key, value):
    data = TensorDataset(torch.zeros(8, 3), torch.zeros(8).long())
    config = {"student": {"model": "object"}, "data": {key: value}, "training": {"batch_size": 4}}
    with pytest.raises(distpro.UserError, match=f"data.{key} is for distpro's own data sets"):
        distpro.train(config, data=(data, data), student=nn.Linear(3, 2))


def test_a_search_validates_on_each_sample_once(tmp_path):
    changes = {
        "data": {"repeats": 4, "sampler": "balanced"},
        "training": {"optimizer": {"no_decay": "norms_and_biases", "layer_decay": 0.5}},
    }
    config = read_config(settings(random_teacher(tmp_path), changes))
    trainer = build.build_search(config, build.build_data(config))
    plans = trainer.train_loader._plan, trainer.weights._validation_from.__self__._plan
    assert trainer.weights._rate() == 1 and trainer.optimizer.param_groups[0]["lr"] == 0.05
    assert [(plan.repeats, plan.weights is None) for plan in plans] == [(4, False), (1, True)]


def test_a_dry_run_says_the_recipe_and_counts_what_is_held_out():
    config = {
        "student": {"model": "resnet8"},
        "data": {"name": "cifar10", "augment": ["crop", {"rand_augment": {"magnitude": 5}}], "repeats": 3},
        "retrain": {"weights": "none"},
        "training": {
            "epochs": 10,
            "batch_size": 100,
            "optimizer": {"name": "adamw", "lr": 0.01, "weight_decay": 0.02, "no_decay": "norms_and_biases"},
            "learning_rate": {"name": "cosine", "warmup_epochs": 2, "final": 0.01, "cooldown_epochs": 1},
            "ema": {},
            "keep": "best",
            "patience": 3,
            "validation_fraction": 0.1,
        },
    }
    found = describe(read_config(config), searching=False)
    assert found.steps == 10 * 450
    assert (
        "recipe   adamw, learning rate 0.01, cosine; warm-up of 2 epochs; down to 0.01 of it, cool-down of 1 epoch; weight decay "
        "0.02 (not of norms and biases); augmentation crop, rand_augment; 3 copies of each image; moving average, decay 0.9999, "
        "with warm-up; keeps the best by 0.1 of the samples; ends after 3 evaluations without a better one"
    ) in as_text(found)
    with pytest.raises(distpro.UserError, match="cooldown_epochs is 1, of 1 epochs in all"):
        read_config(merge(config, {"training": {"epochs": 1}}))
