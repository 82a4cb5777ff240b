"""The recipe of SuperGradients' article: what its file says, a dry run, and a small pair trained by it."""

from __future__ import annotations

import pytest
import torch

import distpro
from distpro.config.reading import for_retrain, read_config
from distpro.files import save_atomically
from distpro.models import build_model
from distpro.report.cost import describe
from tests.conftest import ROOT
from tests.data.test_folder import write_images

RECIPE = ROOT / "retrain_configs" / "imagenet_beit_supergradients.yaml"


def test_the_numbers_are_those_of_the_recipe():
    pytest.importorskip("timm")
    config = for_retrain(read_config(RECIPE))
    training = config.training
    assert (training.epochs, training.batch_size) == (610, 8 * 192)
    assert (training.optimizer.name, training.optimizer.lr, training.optimizer.weight_decay) == ("lamb", 5e-3, 0.02)
    assert training.optimizer.no_decay == "norms_and_biases" and config.data.repeats == 3
    rate = training.learning_rate
    assert (rate.name, rate.warmup_epochs, rate.cooldown_epochs, rate.final) == ("cosine", 5, 10, 0.01)
    assert training.ema is not None and (training.ema.decay, training.keep, training.average_of) == (
        0.9999,
        "average",
        10,
    )
    assert config.task_weight == 0.2
    assert [(t.loss, t.weight, t.params) for t in config.terms] == [("kd", 0.8, {"temperature": 1})]


def small(tmp_path):
    torch.manual_seed(0)
    teacher = tmp_path / "teacher.pt"
    save_atomically(build_model("resnet14", num_classes=2).state_dict(), teacher)
    says = {
        "teacher.model": "resnet14",
        "teacher.checkpoint": teacher,
        "student.model": "resnet8",
        "data.root": write_images(tmp_path / "images"),
        "data.params.image_size": 16,
        "data.params.resize": 20,
        "data.num_classes": 2,
        "data.image_shape": "[3,16,16]",
        "data.workers": 0,
        "retrain.training.epochs": 11,
        "retrain.training.batch_size": 4,
        "retrain.training.validation_fraction": 0.3,
        "tracking.tensorboard": "false",
        "tracking.evaluate_every": 4,
    }
    return [f"{key}={value}" for key, value in says.items()]


@pytest.mark.slow
def test_a_small_pair_is_described_and_trained(tmp_path):
    pytest.importorskip("timm")
    overrides = small(tmp_path)
    config = for_retrain(read_config(RECIPE, [*overrides, "data.samples=12"]))
    found = describe(config, searching=False)
    assert found.steps == 11 * 2 and found.recipe.startswith("lamb, learning rate 0.005, cosine; warm-up of 5 epochs")
    metrics = distpro.retrain(RECIPE, out=tmp_path / "run", overrides=overrides).metrics
    assert metrics["accuracy"] >= 0 and {"ema_accuracy", "validation_accuracy", "last_accuracy"} <= metrics.keys()
